"""What is done to a picture before the networks see it: colours turned, softness added, laid on backgrounds. Batches are torch
tensors (B, 4, H, W) in [0, 1], straight alpha."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def turn_hue(rgba: Tensor, angles: Tensor) -> Tensor:
    """Turn the hue of each picture by its angle (B,) in radians, in YIQ."""
    zero, one = torch.zeros_like(angles), torch.ones_like(angles)
    cos, sin = angles.cos(), angles.sin()
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], -1).view(-1, 3, 3)
    matrix = torch.linalg.inv(YIQ) @ turn @ YIQ
    rgb = torch.einsum("bij,bjhw->bihw", matrix, rgba[:, :3]).clamp(0, 1)
    return torch.cat([rgb, rgba[:, 3:]], 1)


def soften(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Make alpha softer the way glass, fog and glow are: a lower opacity, a fade to one side, or a halo."""
    kind = int(torch.randint(0, 3, (1,), generator=generator))
    amount = float(torch.rand(1, generator=generator))
    alpha = rgba[:, 3:]
    if kind == 0:
        return torch.cat([rgba[:, :3], alpha * (0.25 + 0.6 * amount)], 1)
    if kind == 1:
        angle = amount * 2 * math.pi
        y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in rgba.shape[-2:]), indexing="ij")
        fade = ((x * math.cos(angle) + y * math.sin(angle)) * 0.7 + 0.6).clamp(0.1, 1)
        return torch.cat([rgba[:, :3], alpha * fade], 1)
    return halo(rgba, 6 + 18 * amount, 0.9)


def halo(rgba: Tensor, radius: float, strength: float) -> Tensor:
    """The picture over a glow of its own colours that fades over about `radius` pixels."""
    alpha = rgba[:, 3:]
    soft_edge = int(radius)

    def blur(each: Tensor) -> Tensor:
        """Two box blurs, each along rows and then columns."""
        for _ in range(2):
            for size, pad in (((1, 2 * soft_edge + 1), (0, soft_edge)), ((2 * soft_edge + 1, 1), (soft_edge, 0))):
                each = F.avg_pool2d(each, size, 1, pad, count_include_pad=False)
        return each

    soft = blur(alpha)
    color = blur(rgba[:, :3] * alpha) / soft.clamp(min=1e-3)
    glow = soft * strength
    total = alpha + glow * (1 - alpha)
    rgb = (rgba[:, :3] * alpha + color.clamp(0, 1) * glow * (1 - alpha)) / total.clamp(min=1e-3)
    return torch.cat([rgb.clamp(0, 1), total.clamp(0, 1)], 1)


def over(rgba: Tensor, background: Tensor) -> Tensor:
    """The pictures over a background (B or 1, 3, H or 1, W or 1): opaque, (B, 3, H, W)."""
    return rgba[:, :3] * rgba[:, 3:] + background * (1 - rgba[:, 3:])


def random_background(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Plain colours, and gradients between two; (count, 3, height, width)."""
    colors = torch.rand(count, 3, 2, 1, generator=generator)
    colors[: count // 2, :, 1] = colors[: count // 2, :, 0]
    gradient = F.interpolate(colors, (height, 1), mode="bilinear", align_corners=True).expand(-1, -1, -1, width)
    return gradient if torch.rand(1, generator=generator) < 0.5 else gradient.flip(2)
