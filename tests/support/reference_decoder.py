"""Transparent decoder of LayerDiffuse, built of the blocks of diffusers: reference of the tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block, get_up_block
from torch import Tensor, nn


class ReferenceDecoder(nn.Module):
    """Same sizes, names and random start as the network that this was before it was written out."""

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
        widths = list(block_out_channels)
        self.latent_block = latent_block
        block: dict[str, Any] = {
            "temb_channels": None,
            "resnet_eps": 1e-5,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
            "attention_head_dim": attention_head_dim,
        }
        entering = [widths[0], *widths]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.latent_conv_in = nn.Conv2d(latent_channels, entering[latent_block], 1)
        self.down_blocks = nn.ModuleList(
            _down_blocks(widths, layers_per_block, attention_blocks, block)
        )
        self.mid_block = UNetMidBlock2D(widths[-1], **block)
        self.up_blocks = nn.ModuleList(
            _up_blocks(widths[::-1], layers_per_block + 1, attention_blocks, block)
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, pixel: Tensor, latent: Tensor) -> Tensor:
        """Return alpha and colour (B, out_channels, H, W)."""
        sample = self.conv_in(pixel)
        skips: list[Tensor] = [sample]
        for i, block in enumerate(self.down_blocks):
            if i == self.latent_block:
                sample = sample + self.latent_conv_in(latent)
            sample, outputs = block(sample, None)
            skips += outputs
        sample = self.mid_block(sample, None)
        for block in self.up_blocks:
            taken = len(list(block.get_submodule("resnets").children()))
            sample, skips = block(sample, tuple(skips[-taken:]), None), skips[:-taken]
        return self.conv_out(nn.functional.silu(self.conv_norm_out(sample)))


def _down_blocks(
    widths: list[int], layers: int, attention_blocks: int, block: dict[str, Any]
) -> Iterator[nn.Module]:
    for i, (entering, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        yield get_down_block(
            "AttnDownBlock2D" if i >= len(widths) - attention_blocks else "DownBlock2D",
            num_layers=layers,
            in_channels=entering,
            out_channels=width,
            add_downsample=i < len(widths) - 1,
            downsample_padding=1,
            **block,
        )


def _up_blocks(
    widths: list[int], layers: int, attention_blocks: int, block: dict[str, Any]
) -> Iterator[nn.Module]:
    for i, width in enumerate(widths):
        yield get_up_block(
            "AttnUpBlock2D" if i < attention_blocks else "UpBlock2D",
            num_layers=layers,
            in_channels=widths[min(i + 1, len(widths) - 1)],
            out_channels=width,
            prev_output_channel=widths[max(i - 1, 0)],
            add_upsample=i < len(widths) - 1,
            **block,
        )
