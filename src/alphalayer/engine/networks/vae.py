"""VAE of Stable Diffusion: from images to latents and back.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models".
Shapes are (B, C, H, W). Parameter names are those of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from alphalayer.engine.networks.blocks import (
    Downsample,
    ResnetBlock,
    SpatialAttention,
    Upsample,
)

EPS = 1e-6


class AutoencoderKL(nn.Module):
    """Encoder and decoder of the VAE, with the 1x1 convolutions at the latent.

    Args:
        config: Content of the `config.json` of diffusers' class of this name.
    """

    FIXED: ClassVar[Mapping[str, Any]] = {"act_fn": "silu", "mid_block_add_attention": True}
    """Entries of the config, each with the only value that is supported."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        widths: Sequence[int] = config["block_out_channels"]
        blocks, groups = config["layers_per_block"], config.get("norm_num_groups", 32)
        self.latent_channels: int = config["latent_channels"]
        self.cell: int = 2 ** (len(widths) - 1)
        moments = 2 * self.latent_channels  # mean and logarithm of the variance
        self.encoder = Encoder(config.get("in_channels", 3), moments, widths, blocks, groups)
        self.decoder = Decoder(
            self.latent_channels, config.get("out_channels", 3), widths, blocks, groups
        )
        self.quant_conv = self.post_quant_conv = None
        if config.get("use_quant_conv", True):
            self.quant_conv = nn.Conv2d(moments, moments, 1)
        if config.get("use_post_quant_conv", True):
            self.post_quant_conv = nn.Conv2d(self.latent_channels, self.latent_channels, 1)

    def encode(self, rgb: Tensor, offset: Tensor | None = None) -> Tensor:
        """Return the mean of the latent's distribution, (B, C, H/cell, W/cell).

        Args:
            rgb: Image in [-1, 1], (B, 3, H, W), in the dtype of the network.
            offset: Added to the mean, in standard deviations of the distribution, shaped like it.
        """
        moments = self.encoder(rgb)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        if offset is None:
            return mean
        return mean + (log_variance.float().clamp(-30, 20) / 2).exp() * offset.to(mean.device)

    def decode(self, latent: Tensor) -> Tensor:
        """Return the image, about [-1, 1], (B, 3, h*cell, w*cell).

        Args:
            latent: (B, C, h, w), in the dtype of the network.
        """
        if self.post_quant_conv is not None:
            latent = self.post_quant_conv(latent)
        return self.decoder(latent)


class Encoder(nn.Module):
    """Residual blocks in levels. All levels but the last halve both sides."""

    def __init__(
        self, entering: int, leaving: int, widths: Sequence[int], blocks: int, groups: int
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(entering, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = _resnets(widths[max(i - 1, 0)], width, blocks, groups)
            if i < len(widths) - 1:
                level["downsamplers"] = nn.ModuleList([Downsample(width, padding=0)])
            self.down_blocks.append(level)
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], leaving, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, leaving, h, w) of an image (B, entering, H, W)."""
        x = self.conv_in(x)
        for layer in _layers(self.down_blocks):
            x = layer(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


class Decoder(nn.Module):
    """Residual blocks in levels. All levels but the last double both sides."""

    def __init__(
        self, entering: int, leaving: int, widths: Sequence[int], blocks: int, groups: int
    ):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(entering, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = _resnets(widths[max(i - 1, 0)], width, blocks + 1, groups)
            if i < len(widths) - 1:
                level["upsamplers"] = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], leaving, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return an image (B, leaving, H, W) of (B, entering, h, w)."""
        x = self.mid_block(self.conv_in(x))
        for layer in _layers(self.up_blocks):
            x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


class MidBlock(nn.Module):
    """Residual block, attention with one head over all positions, residual block."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(width, width, groups, EPS)])
        self.resnets = nn.ModuleList([ResnetBlock(width, width, groups, EPS) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, h, w), shaped like x."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def _resnets(entering: int, width: int, blocks: int, groups: int) -> nn.ModuleDict:
    resnets = [ResnetBlock(width if i else entering, width, groups, EPS) for i in range(blocks)]
    return nn.ModuleDict({"resnets": nn.ModuleList(resnets)})


def _layers(levels: nn.ModuleList) -> Iterator[nn.Module]:
    """Iterate over the layers of all levels.

    In one flat loop nothing holds the input of a level while its later layers run. At full size
    that input has 1 GiB in float32.
    """
    for level in levels:
        for part in level.children():
            yield from part.children()
