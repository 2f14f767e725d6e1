"""Change images before the networks see them: colour, softness, geometry, backgrounds, styles.

Batches are torch tensors (B, 4, H, W) in [0, 1] with straight alpha. Sizes in pixels belong to
images of 512x512.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RGB_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def premultiply(rgba: Tensor) -> Tensor:
    """Multiply the colours by alpha."""
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def unpremultiply(rgba: Tensor) -> Tensor:
    """Divide the colours by alpha. Colours without alpha become black."""
    alpha = rgba[:, 3:]
    return torch.cat([(rgba[:, :3] / alpha.clamp(min=1e-3)).clamp(0, 1), alpha], 1)


def downsample(rgba: Tensor, factor: int = 2) -> Tensor:
    """Average squares of pixels with colours weighted by alpha."""
    return unpremultiply(F.avg_pool2d(premultiply(rgba), factor))


def composite(rgba: Tensor, background: Tensor) -> Tensor:
    """Lay images on a background.

    Args:
        rgba: (B, 4, H, W).
        background: (B or 1, 3, H or 1, W or 1).

    Returns:
        Opaque images, (B, 3, H, W).
    """
    return rgba[:, :3] * rgba[:, 3:] + background * (1 - rgba[:, 3:])


def random_background(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return plain colours and gradients between two colours, (count, 3, height, width)."""
    colors = torch.rand(count, 3, 2, 1, generator=generator)
    colors[: count // 2, :, 1] = colors[: count // 2, :, 0]
    gradient = F.interpolate(colors, (height, 1), mode="bilinear", align_corners=True)
    gradient = gradient.expand(-1, -1, -1, width)
    return gradient if torch.rand(1, generator=generator) < 0.5 else gradient.flip(2)


def rotate_hue(rgba: Tensor, angles: Tensor) -> Tensor:
    """Rotate the hue of each image by its angle in YIQ.

    Args:
        rgba: (B, 4, H, W).
        angles: (B,) in radians.
    """
    zero, one = torch.zeros_like(angles), torch.ones_like(angles)
    cos, sin = angles.cos(), angles.sin()
    rotation = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], -1).view(-1, 3, 3)
    matrix = torch.linalg.inv(RGB_TO_YIQ) @ rotation @ RGB_TO_YIQ
    rgb = torch.einsum("bij,bjhw->bihw", matrix, rgba[:, :3]).clamp(0, 1)
    return torch.cat([rgb, rgba[:, 3:]], 1)


def soften(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Make alpha soft like glass, fog or glow: a lower opacity, a fade to one side, or a halo."""
    kind = int(torch.randint(0, 3, (1,), generator=generator))
    amount = float(torch.rand(1, generator=generator))
    alpha = rgba[:, 3:]
    if kind == 0:
        return torch.cat([rgba[:, :3], alpha * (0.25 + 0.6 * amount)], 1)
    if kind == 1:
        angle = amount * 2 * math.pi
        axes = (torch.linspace(-1, 1, side) for side in rgba.shape[-2:])
        y, x = torch.meshgrid(*axes, indexing="ij")
        fade = ((x * math.cos(angle) + y * math.sin(angle)) * 0.7 + 0.6).clamp(0.1, 1)
        return torch.cat([rgba[:, :3], alpha * fade], 1)
    return add_glow(rgba, 24 + 60 * amount, 0.9)


def thin(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Give each image one opacity, as glass has, or the part of it beside a line.

    Args:
        rgba: (B, 4, H, W).
        generator: Source of random numbers.
    """
    count = len(rgba)
    axes = (torch.linspace(-1, 1, side) for side in rgba.shape[-2:])
    y, x = torch.meshgrid(*axes, indexing="ij")
    angle, shift, opacity = torch.rand(3, count, 1, 1, 1, generator=generator)
    distance = x * (angle * 2 * math.pi).cos() + y * (angle * 2 * math.pi).sin()
    # Beyond 1.5 the line is outside of the image.
    share = (distance < shift * 3 - 0.5).float()
    alpha = rgba[:, 3:] * (1 - share * (0.9 - 0.8 * opacity))
    return torch.cat([rgba[:, :3], alpha], 1)


def add_glow(rgba: Tensor, radius: float, strength: float) -> Tensor:
    """Put a glow of the image's own colours behind it.

    Args:
        rgba: (B, 4, H, W).
        radius: Distance in pixels at which the glow ends.
        strength: Opacity of the glow beside an edge, at most 1.
    """
    alpha = rgba[:, 3:]
    reach = max(1, round(radius / 2))

    def blur(image: Tensor) -> Tensor:
        # Two box blurs in each direction reach twice as far as one. A square window costs more.
        for _ in range(2):
            for size, pad in (
                ((1, 2 * reach + 1), (0, reach)),
                ((2 * reach + 1, 1), (reach, 0)),
            ):
                image = F.avg_pool2d(image, size, 1, pad, count_include_pad=False)
        return image

    soft_alpha = blur(alpha)
    color = blur(rgba[:, :3] * alpha) / soft_alpha.clamp(min=1e-3)
    glow = soft_alpha * strength
    total = alpha + glow * (1 - alpha)
    rgb = (rgba[:, :3] * alpha + color.clamp(0, 1) * glow * (1 - alpha)) / total.clamp(min=1e-3)
    return torch.cat([rgb.clamp(0, 1), total.clamp(0, 1)], 1)


def rgb_to_hsv(rgb: Tensor) -> Tensor:
    """Convert (B, 3, H, W) from RGB to HSV, all channels in [0, 1]."""
    value, _ = rgb.max(1)
    spread = value - rgb.min(1).values
    red, green, blue = rgb.unbind(1)
    safe = spread.clamp(min=1e-6)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    saturation = spread / value.clamp(min=1e-6)
    return torch.stack([(hue / 6) % 1.0 * (spread > 0), saturation, value], 1)


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """Convert (B, 3, H, W) from HSV to RGB, all channels in [0, 1]."""
    hue, saturation, value = hsv.unbind(1)
    shifted = (hue[:, None] * 6 + torch.tensor([5.0, 3.0, 1.0])[None, :, None, None]) % 6
    weights = torch.minimum(shifted, 4 - shifted).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * weights)


def main_hue(rgba: Tensor) -> float | None:
    """Return the hue that most of one image has.

    Args:
        rgba: (1, 4, H, W).

    Returns:
        Hue in [0, 1), or None for an image of many colours or of none.
    """
    hue, saturation, value = rgb_to_hsv(rgba[:, :3])[0]
    solid = rgba[0, 3] > 0.5
    vivid = solid & (saturation > 0.35) & (value > 0.25)
    if vivid.sum() < 0.4 * max(int(solid.sum()), 1):
        return None
    histogram = torch.histc(hue[vivid], 24, 0, 1)
    near = histogram + histogram.roll(1) + histogram.roll(-1)
    if near.max() <= 0.5 * histogram.sum():
        return None
    return float((near.argmax() + 0.5) / 24)


def recolor(
    rgba: Tensor,
    hue: float,
    target_hue: float,
    saturation: float = 1.0,
    gain: float = 1.0,
    lift: float = 0.0,
) -> Tensor:
    """Change the main colour of one image. Windows, leaves and wheels keep theirs.

    Pixels within a ninth of the colour circle of the main hue change. The change fades out to a
    sixth.

    Args:
        rgba: (1, 4, H, W).
        hue: Main hue in [0, 1).
        target_hue: Hue that the main hue becomes.
        saturation: Factor of the saturation.
        gain: Factor of the value.
        lift: Added to the value.
    """
    hsv = rgb_to_hsv(rgba[:, :3])
    distance = (hsv[:, 0] - hue).abs()
    distance = torch.minimum(distance, 1 - distance)
    share = ((1 / 6 - distance) / (1 / 6 - 1 / 9)).clamp(0, 1) * (hsv[:, 1] > 0.12)
    changed = torch.stack(
        [
            (hsv[:, 0] + target_hue - hue) % 1.0,
            (hsv[:, 1] * saturation).clamp(0, 1),
            (hsv[:, 2] * gain + lift).clamp(0, 1),
        ],
        1,
    )
    rgb = rgba[:, :3] * (1 - share[:, None]) + hsv_to_rgb(changed) * share[:, None]
    return torch.cat([rgb, rgba[:, 3:]], 1)


def move(rgba: Tensor, generator: torch.Generator, amount: float = 1.0) -> Tensor:
    """Turn, scale, shear, shift and mirror each image at random.

    Args:
        rgba: (B, 4, H, W).
        generator: Source of the random numbers.
        amount: 1 for turns up to 23 degrees and scales from 0.7 to 0.93.
    """
    count = len(rgba)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, shear = uniform(-0.4, 0.4) * amount, uniform(-0.15, 0.15) * amount
    scale, stretch = 1 + uniform(0.08, 0.4) * amount, 1 + uniform(-0.12, 0.12) * amount
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift_x, shift_y = uniform(-0.08, 0.08) * amount, uniform(-0.08, 0.08) * amount
    rows = torch.stack(
        [
            torch.stack([cos * mirror, -sin + shear, shift_x], -1),
            torch.stack([sin * mirror, cos * stretch, shift_y], -1),
        ],
        1,
    )
    grid = F.affine_grid(rows, list(rgba.shape), align_corners=False)
    moved = F.grid_sample(premultiply(rgba), grid, mode="bicubic", align_corners=False)
    return unpremultiply(moved.clamp(0, 1))


def add_outline(rgba: Tensor, width: int, color: float) -> Tensor:
    """Put a plain rim of one grey around each object, like a die-cut sticker.

    Args:
        rgba: (B, 4, H, W).
        width: Width of the rim in pixels.
        color: Grey of the rim, 1 for white.
    """
    alpha = rgba[:, 3:]
    # Two soft discs instead of a square window, so that corners are round.
    radius = torch.arange(-width, width + 1, dtype=torch.float32)
    distance = (radius[:, None] ** 2 + radius[None] ** 2).sqrt()
    disc = (width + 0.5 - distance).clamp(0, 1)[None, None]
    side = rgba.shape[-1]
    spectrum = torch.fft.rfft2(F.pad(alpha, (width, width, width, width)))
    kernel = torch.fft.rfft2(disc, s=(side + 2 * width, rgba.shape[-2] + 2 * width))
    spread = torch.fft.irfft2(spectrum * kernel, s=(side + 2 * width, side + 2 * width))
    spread = spread[..., 2 * width :, 2 * width :][..., :side, :side]
    # The transform leaves noise of 1e-5 where nothing is.
    rim = ((spread - 1e-3) / 4).clamp(0, 1)
    total = alpha + rim * (1 - alpha)
    rgb = (rgba[:, :3] * alpha + color * rim * (1 - alpha)) / total.clamp(min=1e-3)
    return torch.cat([rgb.clamp(0, 1), total], 1)


def pixelate(rgba: Tensor, cells: int = 32, levels: int = 8) -> Tensor:
    """Make pixel art: few cells, few colours, hard alpha.

    Args:
        rgba: (B, 4, H, W) with H and W divisible by `cells`.
        cells: Number of cells on a side.
        levels: Number of values of each colour channel.
    """
    factor = rgba.shape[-1] // cells
    small = downsample(rgba, factor)
    rgb = (small[:, :3] * (levels - 1)).round() / (levels - 1)
    hard = torch.cat([rgb, (small[:, 3:] > 0.5).float()], 1)
    return F.interpolate(hard, scale_factor=factor, mode="nearest")


def pad_to_fit(rgba: Tensor, margin: int) -> Tensor:
    """Shrink images so that something can be added around them.

    Args:
        rgba: (B, 4, H, W).
        margin: Room to make on each side in pixels.
    """
    side = rgba.shape[-1]
    inner = side - 2 * margin
    smaller = F.interpolate(premultiply(rgba), (inner, inner), mode="bicubic", antialias=True)
    return unpremultiply(F.pad(smaller.clamp(0, 1), (margin, margin, margin, margin)))
