"""Autoencoder of convolutions only, which changes the size by pixel shuffles.

These are the residual levels of DC-AE, without its attention. The embedded model has such an
autoencoder.

Source: Chen et al. 2024, "Deep Compression Autoencoder for Efficient High-Resolution Diffusion
Models". Shapes are (B, C, H, W). Parameter names are those of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


class AutoencoderDC(nn.Module):
    """Encoder and decoder.

    Args:
        config: Content of the `config.json` of diffusers' class of this name.
    """

    FIXED: ClassVar[Mapping[str, Any]] = {
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "decoder_conv_act_fn": "relu",
        "downsample_block_type": "pixel_unshuffle",
        "upsample_block_type": "pixel_shuffle",
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
    }
    """Entries of the config, each with the only value that is supported."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        colors = config.get("in_channels", 3)
        widths: Sequence[int] = config["decoder_block_out_channels"]
        self.latent_channels: int = config["latent_channels"]
        self.cell: int = 2 ** (len(widths) - 1)
        self.encoder = Encoder(
            colors,
            self.latent_channels,
            config["encoder_block_out_channels"],
            config["encoder_layers_per_block"],
        )
        self.decoder = Decoder(
            self.latent_channels, colors, widths, config["decoder_layers_per_block"]
        )

    def encode(self, rgb: Tensor, offset: Tensor | None = None) -> Tensor:
        """Return the latent, (B, C, H/cell, W/cell).

        Args:
            rgb: Image in [-1, 1], (B, 3, H, W), in the dtype of the network.
            offset: Added to the latent, because it has no distribution with a deviation.
        """
        latent = self.encoder(rgb)
        return latent if offset is None else latent + offset.to(latent.device)

    def decode(self, latent: Tensor) -> Tensor:
        """Return the image, about [-1, 1], (B, 3, h*cell, w*cell).

        Args:
            latent: (B, C, h, w), in the dtype of the network.
        """
        return self.decoder(latent)


class Encoder(nn.Module):
    """Residual blocks in levels. All levels but the last halve both sides.

    If the first level has no blocks, the first convolution halves the sides instead.
    """

    def __init__(self, entering: int, leaving: int, widths: Sequence[int], blocks: Sequence[int]):
        super().__init__()
        if blocks[0]:
            self.conv_in = nn.Conv2d(entering, widths[0], 3, padding=1)
        else:
            self.conv_in = ShuffleDown(entering, widths[1], shortcut=False)
        self.down_blocks = nn.ModuleList()
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers: list[nn.Module] = [ResBlock(width) for _ in range(count)]
            if count and i < len(widths) - 1:
                layers.append(ShuffleDown(width, widths[i + 1]))
            self.down_blocks.append(nn.Sequential(*layers))
        self.conv_out = nn.Conv2d(widths[-1], leaving, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, leaving, h, w) of an image (B, entering, H, W)."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(x)


class Decoder(nn.Module):
    """Residual blocks in levels. All levels but the first double both sides.

    If the last level has no blocks, the last convolution doubles the sides instead.
    """

    def __init__(self, entering: int, leaving: int, widths: Sequence[int], blocks: Sequence[int]):
        super().__init__()
        self.conv_in = nn.Conv2d(entering, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()  # from the largest level to the smallest
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers: list[nn.Module] = [ResBlock(width) for _ in range(count)]
            if count and i < len(widths) - 1:
                layers.insert(0, ShuffleUp(widths[i + 1], width))
            self.up_blocks.append(nn.Sequential(*layers))
        width = widths[0] if blocks[0] else widths[1]
        self.norm_out = ChannelNorm(width)
        if blocks[0]:
            self.conv_out = nn.Conv2d(width, leaving, 3, padding=1)
        else:
            self.conv_out = ShuffleUp(width, leaving, shortcut=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return an image (B, leaving, H, W) of (B, entering, h, w)."""
        x = self.conv_in(x)
        for level in reversed(self.up_blocks):
            x = level(x)
        return self.conv_out(F.relu(self.norm_out(x), inplace=True))


class ResBlock(nn.Module):
    """Residual block: two 3x3 convolutions with SiLU between them, then a normalisation."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = ChannelNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H, W), shaped like x."""
        h = self.norm(self.conv2(F.silu(self.conv1(x), inplace=True)))
        h += x
        return h


class ShuffleDown(nn.Module):
    """Halving of both sides: 2x2 pixels become channels after a 3x3 convolution.

    The shortcut adds the shuffled input, averaged over groups of its channels.
    """

    def __init__(self, entering: int, width: int, *, shortcut: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(entering, width // 4, 3, padding=1)
        self.group = 4 * entering // width if shortcut else 0

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H/2, W/2) of x (B, entering, H, W)."""
        h = F.pixel_unshuffle(self.conv(x), 2)
        if not self.group:
            return h
        return h + F.pixel_unshuffle(x, 2).unflatten(1, (-1, self.group)).mean(2)


class ShuffleUp(nn.Module):
    """Doubling of both sides: channels become 2x2 pixels after a 3x3 convolution.

    The shortcut adds the input with repeated channels, shuffled in the same way.
    """

    def __init__(self, entering: int, width: int, *, shortcut: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(entering, 4 * width, 3, padding=1)
        self.repeats = 4 * width // entering if shortcut else 0

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, 2H, 2W) of x (B, entering, H, W)."""
        h = self.conv(x)
        if self.repeats:
            h.unflatten(1, (-1, self.repeats)).add_(x.unsqueeze(2))
        return F.pixel_shuffle(h, 2)


class ChannelNorm(nn.Module):
    """Division of each position by the root mean square of its channels, with scale and bias."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H, W), shaped like x. Squares are summed in float32."""
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + EPS)
        h = (x * scale).to(x.dtype)
        h *= self.weight[:, None, None]
        h += self.bias[:, None, None]
        return h
