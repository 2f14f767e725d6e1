"""Transparent decoder and encoder of LayerDiffuse.

The decoder turns an image and its latent into alpha and colour. The encoder turns alpha and colour
into an offset of the latent. Parameter names are those of the published files.

Source: Zhang and Agrawala, "Transparent Image Layer Diffusion using Latent Transparency" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphalayer.engine.networks.blocks import Downsample, ResnetBlock, SpatialAttention, Upsample


class TransparentDecoder(nn.Module):
    """UNet without time embedding, from pixels and a latent to alpha and colour.

    The defaults are the published network of 104,104,804 parameters. `attention_blocks` counts from
    the coarse end. The latent, convolved 1x1, is added just before down block `latent_block`, so it
    is 2^latent_block times smaller than the image.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 4,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (32, 32, 64, 128, 256, 512, 512),
        layers_per_block: int = 2,
        attention_blocks: int = 3,
        latent_block: int = 3,
        norm_num_groups: int = 4,
        attention_head_dim: int = 8,
    ):
        super().__init__()
        widths, last = list(block_out_channels), len(block_out_channels) - 1
        if not 0 <= latent_block <= last:
            raise ValueError(
                f"latent_block {latent_block} is not one of the {last + 1} down blocks"
            )
        self.latent_block = latent_block
        self.multiple_of = 2**last
        sizes = norm_num_groups, attention_head_dim
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.latent_conv_in = nn.Conv2d(latent_channels, widths[max(latent_block - 1, 0)], 1)
        skips = [widths[0]]  # widths of the outputs that the way up reads
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            entering = [skips[-1], *[width] * (layers_per_block - 1)]
            attends = i > last - attention_blocks
            block = _DownBlock(entering, width, layers_per_block if attends else 0, *sizes)
            block.downsamplers = nn.ModuleList([Downsample(width)] if i < last else [])
            self.down_blocks.append(block)
            skips += [width] * (layers_per_block + len(block.downsamplers))
        self.mid_block = _MidBlock([widths[-1]] * 2, widths[-1], 1, *sizes)
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i, width in enumerate(reversed(widths)):
            entering = [h + skips.pop() for h in (below, *[width] * layers_per_block)]
            attends = i < attention_blocks
            block = _UpBlock(entering, width, len(entering) if attends else 0, *sizes)
            block.upsamplers = nn.ModuleList([Upsample(width)] if i < last else [])
            self.up_blocks.append(block)
            below = width
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, pixel: Tensor, latent: Tensor) -> Tensor:
        """Run one pass.

        Args:
            pixel: Pixels (B, in_channels, H, W) in [0, 1]; H and W are multiples of `multiple_of`.
            latent: Latents (B, latent_channels, h, w).

        Returns:
            Alpha and colour (B, out_channels, H, W), about [0, 1].
        """
        skips: list[Tensor] = [self.conv_in(pixel)]
        for i, block in enumerate(self.down_blocks):
            entering = skips[-1]
            if i == self.latent_block:
                entering = entering + self.latent_conv_in(latent)
            skips += block(entering)
        h = self.mid_block(skips[-1])
        for block in self.up_blocks:
            h = block(h, skips)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class _Block(nn.Module):
    """Residual blocks of one resolution. Attention follows the first `attentions` of them."""

    def __init__(
        self, entering: Sequence[int], width: int, attentions: int, groups: int, head_width: int
    ):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        for i, channels in enumerate(entering):
            attends = i < attentions
            self.resnets.append(ResnetBlock(channels, width, groups))
            self.attentions.append(
                SpatialAttention(width, head_width, groups) if attends else nn.Identity()
            )


class _DownBlock(_Block):
    """Block of the way down. All but the coarsest halve the resolution at their end."""

    downsamplers: nn.ModuleList

    def forward(self, h: Tensor) -> list[Tensor]:
        """Return all outputs in order."""
        outputs = [h]
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            outputs.append(attention(resnet(outputs[-1])))
        for downsample in self.downsamplers:
            outputs.append(downsample(outputs[-1]))
        return outputs[1:]


class _MidBlock(_Block):
    """Block of the coarsest resolution, between the ways down and up."""

    def forward(self, h: Tensor) -> Tensor:
        """Return (B, width, H, W), shaped like h."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            h = attention(resnet(h))
        return h


class _UpBlock(_Block):
    """Block of the way up. All but the finest double the resolution at their end."""

    upsamplers: nn.ModuleList

    def forward(self, h: Tensor, skips: list[Tensor]) -> Tensor:
        """Return the output. The skips that were read are removed."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            h = attention(resnet(torch.cat([h, skips.pop()], dim=1)))
        for upsample in self.upsamplers:
            h = upsample(h)
        return h


class TransparentEncoder(nn.Module):
    """Convolutions from alpha and colour to an offset of the latent.

    The offset counts in standard deviations of the VAE's latent distribution. The default widths
    are those of the published network.
    """

    STRIDES = (1, 1, 2, 1, 2, 1, 2, 1, 1)

    def __init__(self, widths: Sequence[int] = (32, 32, 64, 64, 128, 128, 256, 256, 4)):
        super().__init__()
        self.channels = widths[-1]
        self.cell = math.prod(self.STRIDES)
        layers: list[nn.Module] = []
        for entering, width, stride in zip((4, *widths), widths, self.STRIDES, strict=False):
            layers += [nn.Conv2d(entering, width, 3, stride, padding=1), nn.SiLU()]
        self.blocks = nn.Sequential(*layers[:-1])

    def forward(self, argb: Tensor) -> Tensor:
        """Return the offset (B, 4, H/8, W/8).

        Args:
            argb: Alpha and straight colour (B, 4, H, W) in [0, 1]. The colour of transparent pixels
                continues that of the visible pixels around them.
        """
        return self.blocks(argb)
