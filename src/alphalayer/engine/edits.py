"""Images to change: encoded to the latents where sampling starts, and pasted into results.

With LayerDiffuse the transparent encoder adds alpha to the latent. Inpainting checkpoints read the
mask and the masked image through their first convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alphalayer.core.errors import InvalidRequest, ModelUnusable
from alphalayer.core.modes import MODES, InputRole
from alphalayer.core.request import ResolvedRequest
from alphalayer.engine.base import RgbaImage
from alphalayer.engine.canvas import Canvas, fit_middle, to_tensor
from alphalayer.engine.families.base import DiffusionModel, check_finite
from alphalayer.engine.networks.transparent import TransparentEncoder
from alphalayer.engine.sampling.masking import KeptLatents, mask_generator
from alphalayer.engine.sampling.noise import randn
from alphalayer.engine.transparency.encode import encode_offset, fits_latent, pad_colours
from alphalayer.engine.transparency.modes import Layer
from alphalayer.images.inpainting import KeptImage, fit_edit, shrink_mask


@dataclass(frozen=True)
class Edit:
    """Image to change of a request, encoded."""

    request: ResolvedRequest
    kept: KeptImage
    latent: Tensor
    """Clean latent (1, C, h, w), float32."""
    mask: Tensor | None
    """1 where a cell is generated, 0 where it is kept, (1, 1, h, w). None: all are generated."""
    condition: Tensor | None
    """Condition of an inpainting checkpoint, see `inpaint_condition`."""

    def finish(self, rgba: RgbaImage, layer: Layer) -> RgbaImage:
        """Return a generated image with what the result keeps of the image to change."""
        alpha, mode = self.request.alpha, MODES[self.request.mode]
        is_opaque = alpha == "new" and not mode.is_transparent(layer.role)
        return self.kept.compose(rgba, alpha, is_opaque=is_opaque)

    def first_latents(self, device: torch.device) -> Tensor:
        """Return the clean latents of all images of the request, (images, C, h, w)."""
        seeds, shape = self.request.images, self.latent.shape[1:]
        latents = self.latent.expand(len(seeds), *shape)
        fill = self.request.mask_fill
        if self.mask is None or fill in ("original", "fill"):
            return latents
        kept = latents * (1 - self.mask)
        if fill == "latent nothing":
            return kept
        noise = randn([image.seed for image in seeds], shape, self.request.noise, device)
        return kept + noise.to(kept.device) * self.mask


def read_encoder(
    request: ResolvedRequest, model: DiffusionModel, device: torch.device
) -> TransparentEncoder | None:
    """Return the transparent encoder if a request needs it.

    Raises:
        LayerDiffuseMissing: The model has no such file.
        ModelUnusable: The file is another one, or the model's latent is of another kind.
    """
    if not (request.uses_init and MODES[request.mode].has_alpha):
        return None
    encoder = model.encoder
    if not fits_latent(encoder, model.latent):
        raise ModelUnusable(
            f"the transparent encoder does not fit the latent of {model.entry.name}.",
            hint="Use the encoder that was made for this model's VAE.",
        )
    return encoder.to(device)


def check_mode(request: ResolvedRequest, model: DiffusionModel) -> None:
    """Check that an inpainting checkpoint can run the mode of a request.

    Raises:
        InvalidRequest: Mask and input images would be read by the same channels.
    """
    mode = MODES[request.mode]
    if mode.family == "sdxl" and mode.needs and model.inpaint_weight is not None:
        raise InvalidRequest(
            f"{model.entry.name} is an inpainting checkpoint, which cannot run mode "
            f'"{request.mode}".',
            hint="Use an ordinary checkpoint for modes with input images.",
            field="model",
        )


def encode_edit(
    model: DiffusionModel,
    encoder: TransparentEncoder | None,
    request: ResolvedRequest,
    inputs: Mapping[InputRole, RgbaImage],
    canvas: Canvas,
) -> Edit:
    """Encode the image to change of a request.

    Args:
        model: The model.
        encoder: The transparent encoder. None: the image is opaque.
        request: The request.
        inputs: Pixels of the input images by role.
        canvas: Size that is generated.
    """
    mask = inputs["mask"][..., 0] if "mask" in inputs else None
    fitted = fit_edit(
        inputs["init"], mask, (canvas.width, canvas.height), request, is_opaque=encoder is None
    )
    cell = model.latent.cell
    rgb = _extend(to_tensor(fitted.rgb) * 2 - 1, canvas, cell)
    offset = None
    if encoder:
        colours = torch.from_numpy(pad_colours(fitted.rgba)).permute(2, 0, 1)[None]
        padded = torch.cat([colours, to_tensor(fitted.rgba)[:, 3:]], dim=1)
        offset = encode_offset(encoder, _extend(padded, canvas, cell))
    latent = check_finite(_fit_latent(model.encode_image(rgb, offset), canvas, cell), "the VAE")
    whole = None if fitted.mask is None else canvas.extend(to_tensor(fitted.mask[..., None]))
    condition = inpaint_condition(model, canvas, rgb, whole, offset)
    cells = None if whole is None else _cells(whole, latent)
    return Edit(request, fitted.kept, latent, cells, condition)


def start_latents(
    edits: Sequence[Edit], device: torch.device
) -> tuple[Tensor | None, KeptLatents | None]:
    """Return the clean latents of a batch, and the part that stays as it is.

    Both are None without images to change. The second is None without masks.
    """
    if not edits:
        return None, None
    latents = torch.cat([edit.first_latents(device) for edit in edits])
    masks = [
        edit.mask.expand(len(edit.request.images), -1, -1, -1)
        for edit in edits
        if edit.mask is not None
    ]
    if not masks:
        return latents, None
    seeds = [image.seed for edit in edits for image in edit.request.images]
    generators = [mask_generator(seed) for seed in seeds]
    return latents, KeptLatents(latents, torch.cat(masks), generators)


def inpaint_condition(
    model: DiffusionModel,
    canvas: Canvas,
    rgb: Tensor | None = None,
    mask: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor | None:
    """Return what mask and masked image add to the first convolution.

    Args:
        model: The model.
        canvas: Size that is generated.
        rgb: Image to change (1, 3, H, W) in [-1, 1]. None: grey.
        mask: Part to generate (1, 1, height, width) in [0, 1]. None: all of it.
        offset: Offset of the image's latent, in standard deviations.

    Returns:
        Condition (1, width of the first level, h, w), float32. None for other checkpoints.
    """
    if model.inpaint_weight is None:
        return None
    size = canvas.full_height, canvas.full_width
    hole = torch.ones(1, 1, *size) if mask is None else mask.round()
    image = torch.zeros(1, 3, *size) if rgb is None else rgb
    masked = image * (1 - F.interpolate(hole, size=image.shape[-2:], mode="nearest"))
    cell = model.latent.cell
    latent = check_finite(_fit_latent(model.encode_image(masked, offset), canvas, cell), "the VAE")
    cells = F.interpolate(hole, size=latent.shape[-2:], mode="nearest").to(latent.device)
    weight = model.inpaint_weight.to(latent.device)
    return F.conv2d(torch.cat([cells, latent], dim=1), weight, padding=1)


def _extend(image: Tensor, canvas: Canvas, cell: int) -> Tensor:
    """Repeat the border of an image (1, C, H, W) to the canvas, or to whole cells.

    An image whose latent is resized has a size of its own.
    """
    height, width = image.shape[-2:]
    if (width, height) == (canvas.width, canvas.height):
        return canvas.extend(image)
    return Canvas.of(width, height, cell).extend(image)


def _fit_latent(latent: Tensor, canvas: Canvas, cell: int) -> Tensor:
    """Resize a latent (1, C, h, w) to the canvas, unless it has that size."""
    size = canvas.full_height // cell, canvas.full_width // cell
    if latent.shape[-2:] == size:
        return latent
    window = max(canvas.height // cell, 1), max(canvas.width // cell, 1)
    return fit_middle(F.interpolate(latent, size=window, mode="bilinear"), *size)


def _cells(mask: Tensor, latent: Tensor) -> Tensor:
    """Return the cells of a latent (1, C, h, w) under a mask (1, 1, H, W) in [0, 1]."""
    height, width = latent.shape[-2:]
    pixels = (mask[0, 0] * 255).round().to(torch.uint8).numpy()
    return torch.from_numpy(shrink_mask(pixels, (width, height)))[None, None].to(latent.device)
