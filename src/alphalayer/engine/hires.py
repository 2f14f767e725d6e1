"""From the first pass to the second: latents are enlarged, or images of them.

An image is decoded, enlarged and encoded again. With LayerDiffuse, colour and alpha are enlarged
beside each other, and the transparent encoder adds the alpha to the latent. Without that encoder,
what the first latent holds beside its colours is interpolated and added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphalayer.core.modes import ENCODER_FILES
from alphalayer.core.request import LATENT_UPSCALERS, ResolvedRequest
from alphalayer.engine.base import RgbaImage
from alphalayer.engine.canvas import Canvas, fit_middle, to_tensor
from alphalayer.engine.families.base import DiffusionModel, check_finite
from alphalayer.engine.networks.transparent import TransparentEncoder
from alphalayer.engine.transparency.decode import to_opaque
from alphalayer.engine.transparency.encode import (
    encode_offset,
    fits_latent,
    on_grey,
    pad_colours,
)
from alphalayer.engine.transparency.modes import Decoding, Mode
from alphalayer.engine.upscalers import RgbImage, Upscale, Window, load_upscaler

NO_ENCODER = (
    "hires_upscaler: the transparent encoder "
    f"({' or '.join(names[0] for names in ENCODER_FILES.values())}) is missing or not for this "
    "model, so the transparency was enlarged in the latent."
)


@dataclass(frozen=True)
class Resizing:
    """Sizes of the enlargement. The images stay in the middle of their canvases."""

    width: int
    height: int
    """Size of the whole first canvas, enlarged, in pixels."""
    target: Canvas
    """Canvas of the second pass. It is filled with the border, or cuts the middle out."""

    @property
    def window(self) -> Window:
        """Return the part of the enlarged canvas that the target shows."""
        width = min(self.width, self.target.full_width)
        height = min(self.height, self.target.full_height)
        left, top = (self.width - width) // 2, (self.height - height) // 2
        return left, top, left + width, top + height

    @classmethod
    def of(cls, request: ResolvedRequest, first: Canvas, target: Canvas) -> Resizing:
        """Return the sizes between two canvases of a request."""
        width, height = request.enlarged_size
        return cls(
            first.full_width * width // first.width,
            first.full_height * height // first.height,
            target,
        )


@dataclass(frozen=True)
class Enlarger:
    """Enlargement of latents by a named upscaler."""

    name: str
    mode: Mode
    upscale: Upscale | None
    """Upscaler of images. None: latents are interpolated."""
    encoder: TransparentEncoder | None
    """Encoder of the alpha of images, if there is one."""
    check: Callable[[], None]
    """Called before each image and each tile of it. It may raise."""

    @classmethod
    def load(
        cls,
        request: ResolvedRequest,
        mode: Mode,
        model: DiffusionModel,
        models_dir: Path,
        device: torch.device,
        check: Callable[[], None],
    ) -> Enlarger:
        """Read what the upscaler of a request needs.

        Raises:
            AlphalayerError: See `load_upscaler` and `DiffusionModel.encoder`.
        """
        name = request.hires_upscaler
        if name in LATENT_UPSCALERS:
            return cls(name, mode, None, None, check)
        upscale = load_upscaler(models_dir, name, device, check)
        has_encoder = mode.has_alpha and model.layerdiffuse.encoder()
        encoder = model.encoder.to(device) if has_encoder else None
        fits = encoder is None or fits_latent(encoder, model.latent)
        return cls(name, mode, upscale, encoder if fits else None, check)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what is missing, one sentence each."""
        is_missing = self.upscale and self.mode.has_alpha and not self.encoder
        return (NO_ENCODER,) if is_missing else ()

    def networks(self, model: DiffusionModel) -> list[nn.Module]:
        """Return the networks of the model that the enlargement uses."""
        if self.upscale is None:
            return []
        return self.mode.decoders(model) if self.encoder else [model.modules["vae"]]

    def enlarge(self, decoding: Decoding, latents: Tensor, resizing: Resizing) -> Tensor:
        """Return latents (B, C, h, w) of the second canvas for those of the first."""
        if self.upscale is None:
            return enlarge_latents(latents, self.name, resizing, decoding.model.latent.cell)
        return torch.cat(
            [
                self._enlarge_image(decoding, latent[None], number, resizing, self.upscale)
                for number, latent in enumerate(latents)
            ]
        )

    def _enlarge_image(
        self,
        decoding: Decoding,
        latent: Tensor,
        number: int,
        resizing: Resizing,
        upscale: Upscale,
    ) -> Tensor:
        self.check()
        model, has_alpha = decoding.model, self.mode.is_transparent(number)

        def enlarge(image: RgbImage) -> RgbImage:
            return upscale(image, (resizing.width, resizing.height), resizing.window)

        if self.encoder and has_alpha:
            image = self.mode.compose(decoding, latent, number)[0].rgba
            colour = enlarge(np.rint(pad_colours(image) * 255).astype(np.uint8))
            alpha = enlarge(np.repeat(image[..., 3:], 3, axis=-1)).mean(-1, keepdims=True)
            rgba = _fit(np.concatenate([colour, alpha], axis=-1), resizing.target)
            enlarged = model.encode_image(on_grey(rgba), encode_offset(self.encoder, rgba))
        else:
            image = to_opaque(decoding.rgb(latent))[..., :3]
            enlarged = model.encode_image(_fit(enlarge(image), resizing.target) * 2 - 1)
            if has_alpha:
                # what the latent holds beside the colours is its transparency
                colours = model.encode_image(to_tensor(image) * 2 - 1)
                rest = enlarge_latents(latent - colours, "Latent", resizing, model.latent.cell)
                enlarged = enlarged + rest
        return check_finite(enlarged, "the VAE")


def enlarge_latents(latents: Tensor, name: str, resizing: Resizing, cell: int) -> Tensor:
    """Interpolate latents (B, C, h, w) to those of the second canvas.

    Args:
        latents: Latents of the first canvas.
        name: One of `LATENT_UPSCALERS`.
        resizing: Sizes in pixels.
        cell: Pixels of a latent cell along a side.
    """
    mode, antialias = LATENT_UPSCALERS[name]
    size = resizing.height // cell, resizing.width // cell
    enlarged = F.interpolate(latents, size=size, mode=mode, antialias=antialias)
    target = resizing.target
    return fit_middle(enlarged, target.full_height // cell, target.full_width // cell)


def _fit(planes: RgbaImage, target: Canvas) -> Tensor:
    """Return uint8 (H, W, channels) on a canvas, (1, channels, h, w) in [0, 1]."""
    return fit_middle(to_tensor(planes), target.full_height, target.full_width)
