"""Images to change and their masks: fitted to a size, softened, filled and pasted back.

The filters are those of Pillow and OpenCV on 8 bit, so the numbers are those of AUTOMATIC1111.
Masks are grey, white where an image is changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter, ImageOps

from alphalayer.core.cost import MAX_ENCODED_PIXELS
from alphalayer.core.edits import AlphaSource, EditFields, InitResizeMode
from alphalayer.images.codecs import Rgba, Size

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""
GREY, WHITE = 127, 255
FILL_RADII = (256, 64, 16, 16, 4, 4, 4, 4, 2, 2, 0)
KERNEL_SUM = 256
"""Sum of the whole numbers in OpenCV's kernels for 8 bit."""
MAX_SCALED_PIXELS = 2**26
"""Limit of an image that is resized as a whole before its middle is cut out."""
FILTER_RADIUS = 3
"""Radius of the Lanczos filter, in pixels of the coarser image."""


@dataclass(frozen=True)
class KeptImage:
    """What a result keeps of the image to change, at the size of the result."""

    rgba: Rgba
    mask: Pixels | None = None
    """Share of the generated image (H, W). None: all of it."""
    region: Box | None = None
    """Where the generated image is pasted. None: it has the size of the result."""

    def compose(self, generated: Rgba, alpha: AlphaSource, *, is_opaque: bool = False) -> Rgba:
        """Return the result. Where the mask is black, it has the bytes of the image.

        Args:
            generated: The generated image (height, width, 4).
            alpha: Alpha of the generated part.
            is_opaque: Whether the result is opaque. Then the image is flattened onto white.
        """
        own = self.rgba
        if is_opaque:
            own = np.asarray(_flatten(Image.fromarray(own), WHITE).convert("RGBA"))
        if self.region:
            generated = _paste(generated, own, self.region)
        generated = _with_alpha(generated, own[..., 3], alpha)
        return generated if self.mask is None else _mix(own, generated, self.mask)


@dataclass(frozen=True)
class FittedEdit:
    """An image to change and its mask, at the size that is generated."""

    rgba: Rgba
    """The image (H, W, 4), for the transparent encoder."""
    rgb: Pixels
    """What the VAE reads (H, W, 3): the image on a plain colour, its masked part filled."""
    mask: Pixels | None
    """Part to generate (height, width). None: everything."""
    kept: KeptImage


def fit_edit(
    init: Rgba, mask: Pixels | None, size: Size, fields: EditFields, *, is_opaque: bool
) -> FittedEdit:
    """Fit an image to change, and its mask, to the size that is generated.

    With "Latent" the image keeps its own size, and its latent is to be resized.

    Args:
        init: The image (H, W, 4).
        mask: Its mask (H, W). One of another size is stretched.
        size: Size that is generated.
        fields: How the image is changed.
        is_opaque: Whether the generated image is opaque.
    """
    image = Image.fromarray(init)
    flat = _flatten(image, WHITE if is_opaque else GREY)
    own = flat.convert("RGBA") if is_opaque and fields.alpha == "new" else image
    if mask is None:
        kept = KeptImage(np.asarray(fit_init(own, size, fields.init_resize_mode)))
        return _fit_pixels(image, flat, None, size, fields, kept)
    grey = soften(fit_init(Image.fromarray(mask), image.size, "Just Resize"), fields.mask_blur)
    if not fields.masked_only:
        fitted = fit_init(grey, size, fields.init_resize_mode)
        doubled = np.asarray(ImageChops.add(fitted, fitted))
        kept = KeptImage(np.asarray(fit_init(own, size, fields.init_resize_mode)), doubled)
        return _fit_pixels(image, flat, grey, size, fields, kept)
    region = masked_region(grey, fields.mask_padding, size)
    kept = KeptImage(np.asarray(own), np.asarray(grey), region)
    fields = fields.model_copy(update={"init_resize_mode": "Resize and Fill"})
    return _fit_pixels(image.crop(region), flat.crop(region), grey.crop(region), size, fields, kept)


def _fit_pixels(
    image: Image.Image,
    flat: Image.Image,
    mask: Image.Image | None,
    size: Size,
    fields: EditFields,
    kept: KeptImage,
) -> FittedEdit:
    mode = fields.init_resize_mode
    own = _limit(image.size) if mode == "Latent" else size
    rgb = fit_init(flat, own, mode)
    if mask and fields.mask_fill != "original":
        rgb = fill_masked(rgb, fit_init(mask, own, mode))
    return FittedEdit(
        np.asarray(fit_init(image, own, mode)),
        np.asarray(rgb),
        np.asarray(fit_init(mask, size, mode)) if mask else None,
        kept,
    )


def _limit(size: Size) -> Size:
    """Return a size of at most `MAX_ENCODED_PIXELS`, with the same ratio of the sides."""
    factor = min(1.0, math.sqrt(MAX_ENCODED_PIXELS / math.prod(size)))
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def fit_init(image: Image.Image, size: Size, mode: InitResizeMode) -> Image.Image:
    """Fit an image to a size by Lanczos.

    Colours of invisible pixels of RGBA have no effect. "Crop and Resize" covers the size and cuts
    the middle out. "Resize and Fill" shows the whole image and repeats its border. The other modes
    stretch it.
    """
    (width, height), (own_width, own_height) = size, image.size
    # whole divisions, as in AUTOMATIC1111
    by_width = width, max(1, own_height * width // own_width)
    by_height = max(1, own_width * height // own_height), height
    is_wider = width * own_height > own_width * height
    if mode == "Crop and Resize":
        return _cover(image, by_width if is_wider else by_height, size)
    if mode != "Resize and Fill":
        return image.resize(size, Image.Resampling.LANCZOS)
    scaled = by_height if is_wider else by_width
    left, top = width // 2 - scaled[0] // 2, height // 2 - scaled[1] // 2
    pixels = np.asarray(image.resize(scaled, Image.Resampling.LANCZOS))
    around = [(top, height - scaled[1] - top), (left, width - scaled[0] - left), (0, 0)]
    return Image.fromarray(np.pad(pixels, around[: pixels.ndim], mode="edge"))


def _cover(image: Image.Image, scaled: Size, size: Size) -> Image.Image:
    """Resize an image to `scaled`, which covers `size`, and cut the middle out."""
    if math.prod(scaled) > MAX_SCALED_PIXELS:
        return _cover_part(image, scaled, size)
    left, top = scaled[0] // 2 - size[0] // 2, scaled[1] // 2 - size[1] // 2
    whole = image.resize(scaled, Image.Resampling.LANCZOS)
    return whole.crop((left, top, left + size[0], top + size[1]))


def _cover_part(image: Image.Image, scaled: Size, size: Size) -> Image.Image:
    """Resize the part of a very long image that the filter reads."""
    cut: list[tuple[int, int, int]] = []
    for old, new, target in zip(image.size, scaled, size, strict=True):
        first = new // 2 - target // 2
        margin = math.ceil(FILTER_RADIUS * max(new / old, 1)) + 1
        cut.append((first, max(first - margin, 0), min(first + target + margin, new)))
    (left, start, end), (top, above, below) = cut
    (own_width, own_height), (new_width, new_height) = image.size, scaled
    box = (
        start * own_width / new_width,
        above * own_height / new_height,
        end * own_width / new_width,
        below * own_height / new_height,
    )
    part = image.resize((end - start, below - above), Image.Resampling.LANCZOS, box)
    left, top = left - start, top - above
    return part.crop((left, top, left + size[0], top + size[1]))


def soften(mask: Image.Image, radius: int) -> Image.Image:
    """Blur a grey mask by a Gaussian, along x and then along y.

    Args:
        mask: The mask.
        radius: Standard deviation in pixels. 0: the mask stays as it is.

    Source: OpenCV, `GaussianBlur` of 8 bit, whose kernel has whole numbers.
    """
    if not radius or not (box := mask.getbbox()):
        return mask
    reach = int(2.5 * radius + 0.5)
    # beyond its reach the mask stays black
    margin = reach + 1
    box = (
        max(box[0] - margin, 0),
        max(box[1] - margin, 0),
        min(box[2] + margin, mask.width),
        min(box[3] + margin, mask.height),
    )
    kernel = _gaussian(radius, reach)
    values = np.asarray(mask.crop(box)).astype(np.uint16)
    for _ in range(2):
        values = _blur_rows(values.T, kernel)
    softened = Image.new("L", mask.size)
    softened.paste(Image.fromarray(values.astype(np.uint8)), box[:2])
    return softened


def _gaussian(radius: int, reach: int) -> list[int]:
    """Return the middle of a Gaussian and its right half.

    They are whole numbers, as OpenCV rounds them.
    """
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * radius**2))
    ends = weights[:reach].cumsum() * (KERNEL_SUM / weights.sum())
    half = np.diff(np.rint(ends), prepend=0).astype(int)
    return [int(KERNEL_SUM - 2 * half.sum()), *map(int, half[::-1])]


def _blur_rows(values: NDArray[np.uint16], kernel: Sequence[int]) -> NDArray[np.uint16]:
    """Blur values (H, W) of at most 255 along their columns.

    16 bits hold the weighted sums.
    """
    reach, height = len(kernel) - 1, len(values)
    padded = np.pad(values, [(reach, reach), (0, 0)], mode="reflect")
    blurred = padded[reach : reach + height] * np.uint16(kernel[0]) + np.uint16(KERNEL_SUM // 2)
    for distance, weight in enumerate(kernel):
        if distance and weight:
            first, last = reach - distance, reach + distance
            both = padded[first : first + height] + padded[last : last + height]
            both *= np.uint16(weight)
            blurred += both
    return blurred // np.uint16(KERNEL_SUM)


def masked_region(mask: Image.Image, padding: int, size: Size) -> Box:
    """Return the box of a mask with padding, grown to the ratio of `size`.

    It stays within the image. The box of a black mask is the whole image.
    """
    width, height = mask.size
    left, top, right, bottom = mask.getbbox() or (0, 0, width, height)
    box = (
        max(left - padding, 0),
        max(top - padding, 0),
        min(right + padding, width),
        min(bottom + padding, height),
    )
    return grow(box, size, mask.size)


def grow(box: Box, size: Size, limit: Size) -> Box:
    """Grow a box to the ratio of `size`, within an image of the size `limit`.

    Source: AUTOMATIC1111, the region of "only masked".
    """
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if width * size[1] > height * size[0]:
        top, bottom = _grow_side(top, bottom, int(width * size[1] / size[0]), limit[1])
    else:
        left, right = _grow_side(left, right, int(height * size[0] / size[1]), limit[0])
    return left, top, right, bottom


def _grow_side(first: int, end: int, length: int, limit: int) -> tuple[int, int]:
    first = max(min(first - (length - (end - first)) // 2, limit - length), 0)
    return first, min(first + length, limit)


def fill_masked(rgb: Image.Image, mask: Image.Image) -> Image.Image:
    """Replace the masked part of an image by its blurred surroundings.

    Blurs of smaller radii lie over those of larger ones.
    """
    surroundings = Image.new("RGBa", rgb.size)
    surroundings.paste(rgb.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    filled = Image.new("RGBA", rgb.size)
    for radius in FILL_RADII:
        blurred = surroundings.filter(ImageFilter.GaussianBlur(radius))
        filled.alpha_composite(blurred.convert("RGBA"))
    return filled.convert("RGB")


def shrink_mask(mask: Pixels, size: Size) -> NDArray[np.float32]:
    """Return the mask of cells (height, width): 1 where one is generated.

    A mask that is too thin for any cell has those that it touches.
    """
    # of one channel Pillow would round otherwise
    shrunk = Image.fromarray(mask).resize(size, Image.Resampling.BICUBIC)
    cells: NDArray[np.float32] = np.rint(np.asarray(shrunk, np.float32) / 255)
    if cells.any() or not mask.any():
        return cells
    peaks = mask
    for axis, length in enumerate(reversed(size)):
        firsts = np.arange(length) * mask.shape[axis] // length
        peaks = np.maximum.reduceat(peaks, firsts, axis)
    return (peaks >= peaks.max() / 2).astype(np.float32)


def _flatten(image: Image.Image, grey: int) -> Image.Image:
    """Return RGBA as RGB on a plain grey."""
    flat = Image.new("RGB", image.size, (grey,) * 3)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def _paste(generated: Rgba, own: Rgba, region: Box) -> Rgba:
    """Return an image with the generated one in a region."""
    left, top, right, bottom = region
    whole = own.copy()
    part = fit_init(Image.fromarray(generated), (right - left, bottom - top), "Crop and Resize")
    whole[top:bottom, left:right] = np.asarray(part)
    return whole


def _with_alpha(generated: Rgba, own: Pixels, source: AlphaSource) -> Rgba:
    """Return an image with the alpha that `source` names."""
    if source == "new":
        return generated
    product = np.rint(generated[..., 3] * (own / 255)).astype(np.uint8)
    return np.dstack([generated[..., :3], own if source == "keep" else product])


def _mix(own: Rgba, generated: Rgba, mask: Pixels) -> Rgba:
    """Fade one image into another by a mask, with colours weighted by alpha."""
    mixed = np.where(mask[..., None] == WHITE, generated, own)
    soft = (mask > 0) & (mask < WHITE)
    share = mask[soft][:, None] / 255
    new, old = generated[soft].astype(np.float64), own[soft].astype(np.float64)
    # a little of the colour counts where both are invisible
    weights = (new[:, 3:] + 1e-3) * share, (old[:, 3:] + 1e-3) * (1 - share)
    colour = (new[:, :3] * weights[0] + old[:, :3] * weights[1]) / (weights[0] + weights[1])
    alpha = new[:, 3:] * share + old[:, 3:] * (1 - share)
    mixed[soft] = np.rint(np.concatenate([colour, alpha], axis=1)).astype(np.uint8)
    return mixed
