"""Sizes of a UNet with two levels, for tests that need no particular one."""

from __future__ import annotations

from alphalayer.engine.networks.unet import UNetConfig

CONFIG = UNetConfig(
    in_channels=4,
    out_channels=4,
    widths=(32, 32),
    resnets=1,
    depths=(0, 1),
    middle_depth=1,
    heads=(1, 1),
    context=16,
    pooled=8,
    size_width=4,
)
