"""Blocks that the UNet, the VAE and the transparent networks share.

Shapes are (B, C, H, W). Parameter names are those of diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from alphalayer.engine.networks.weights import FusedLinear


class ResnetBlock(nn.Module):
    """Residual block: normalisation, SiLU and a 3x3 convolution, twice."""

    def __init__(self, entering: int, width: int, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, entering, eps)
        self.conv1 = nn.Conv2d(entering, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(entering, width, 1) if entering != width else None

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return (B, width, H, W) of x (B, entering, H, W).

        `shift` (B, width, 1, 1) is added between the convolutions. It depends on the noise level.
        """
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if shift is not None:
            h = h + shift
        # one name for all, so that each tensor is released once the next exists
        h = F.silu(self.norm2(h), inplace=True)
        h = self.conv2(h)
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h


class SpatialAttention(nn.Module):
    """Self-attention over all positions of an image, added to its input."""

    def __init__(self, width: int, head_width: int, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.heads = width // head_width
        self.group_norm = nn.GroupNorm(groups, width, eps)
        self.to_qkv = FusedLinear(width, {"to_q": width, "to_k": width, "to_v": width})
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H, W), shaped like x."""
        b, c, h, w = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, H*W, C/heads)
            for part in self.to_qkv(tokens).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out(attended).transpose(1, 2).reshape(b, c, h, w) + x


class Downsample(nn.Module):
    """Halving of both sides by a strided 3x3 convolution.

    With `padding` 0 the input is padded at the right and at the bottom only, as in a VAE's encoder.
    """

    def __init__(self, width: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H/2, W/2) of x (B, width, H, W)."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubling of both sides: each value is repeated, then convolved 3x3."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Return (B, width, 2H, 2W) of x (B, width, H, W), or with sides of `size`.

        A side that was odd before it was halved ends one below twice its half.
        """
        size = size or [2 * side for side in x.shape[-2:]]
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
