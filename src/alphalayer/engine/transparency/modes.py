"""Mathematics of the modes of LayerDiffuse: how a sampled latent becomes layers.

`alphalayer.core.modes` holds their names, labels and files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphalayer.core.modes import MODES as MODE_DATA
from alphalayer.core.modes import InputRole, LayerRole
from alphalayer.core.request import ResolvedRequest
from alphalayer.engine.base import RgbaImage
from alphalayer.engine.canvas import Canvas
from alphalayer.engine.families.base import DiffusionModel, check_finite
from alphalayer.engine.memory import MemoryMode
from alphalayer.engine.progress import Stopwatch
from alphalayer.engine.transparency.attention_sharing import Sharing
from alphalayer.engine.transparency.conditions import condition_image
from alphalayer.engine.transparency.decode import (
    choose_passes,
    decode_transparent,
    decoder_inputs,
    to_opaque,
    to_uint8,
)
from alphalayer.engine.transparency.patch import PatchFile, PatchSpec

FIRST_CONVOLUTION = "conv_in.weight"
NO_WEIGHT = "layerdiffuse_weight: ignored, because the mode shares attention at full strength."
Inputs = Mapping[InputRole, RgbaImage]
"""Pixels of the input images by role."""


@dataclass(frozen=True)
class Layer:
    """One layer of a result."""

    rgba: RgbaImage
    role: LayerRole


@dataclass(frozen=True)
class Decoding:
    """What composing needs besides the latent."""

    model: DiffusionModel
    request: ResolvedRequest
    memory: MemoryMode
    stopwatch: Stopwatch

    def rgb(self, latent: Tensor) -> Tensor:
        """Decode a latent (1, C, h, w) with the VAE to (1, 3, H, W), about [-1, 1]."""
        with self.stopwatch.stage("vae"):
            return check_finite(self.model.decode(latent), "the VAE")


def decode_with_alpha(decoding: Decoding, latent: Tensor) -> RgbaImage:
    """Decode a latent (1, C, h, w) to an image with alpha."""
    model, request = decoding.model, decoding.request
    rgb = decoding.rgb(latent)
    with decoding.stopwatch.stage("decode"):
        spec = model.latent
        pixel, decoder_latent = decoder_inputs(
            rgb, latent, spec.scaling_factor, request.decode, spec.shift_factor
        )
        passes = choose_passes(model.decoder, pixel, decoding.memory.passes_at_once)
        decoded = decode_transparent(model.decoder, pixel, decoder_latent, passes)
        return to_uint8(check_finite(decoded, "the transparent decoder"))


def no_condition(_model: DiffusionModel, _request: ResolvedRequest, _inputs: Inputs) -> None:
    """Return no condition: the mode has no input images."""


def encode_condition(model: DiffusionModel, request: ResolvedRequest, inputs: Inputs) -> Tensor:
    """Return what input images add to the output of the denoiser's first convolution.

    The images are encoded and convolved with the channels by which the mode's patch widens the
    convolution. The condition is the same at all noise levels, so it is computed once.

    Returns:
        Condition (1, width of the first level, h, w), float32.
    """
    info = MODE_DATA[request.mode]
    canvas = Canvas.of(request.width, request.height)
    images = [
        condition_image(inputs[role], (request.width, request.height), request.resize_mode)
        for role in info.needs
    ]
    latents = [model.encode_image(canvas.extend(image)) for image in images]
    weight = model.patchers["denoiser"].read_condition(_patch_file(model, info.name))
    joined = torch.cat(latents, dim=1)
    scaled = weight.to(joined.device) * request.layerdiffuse_weight
    return torch.nn.functional.conv2d(joined, scaled, padding=1)


def _patch_file(model: DiffusionModel, mode: str) -> PatchFile:
    widened = FIRST_CONVOLUTION if MODE_DATA[mode].needs else None
    return PatchFile.at(model.layerdiffuse.patch(mode), widened)


@dataclass(frozen=True)
class Mode:
    """Mathematics of one mode: patch or shared attention, condition, and composition."""

    name: str
    condition: Callable[[DiffusionModel, ResolvedRequest, Inputs], Tensor | None] = no_condition

    @property
    def encodes_inputs(self) -> bool:
        """Return whether the VAE encodes the input images of the mode."""
        return self.condition is not no_condition

    @property
    def has_alpha(self) -> bool:
        """Return whether the transparent decoder is needed."""
        return MODE_DATA[self.name].has_alpha

    def patches(self, model: DiffusionModel, request: ResolvedRequest) -> tuple[PatchSpec, ...]:
        """Return the patches to merge, with weights. Raises `LayerDiffuseMissing`."""
        info = MODE_DATA[self.name]
        if info.shares_attention or not info.files:
            return ()
        return ((_patch_file(model, self.name), request.layerdiffuse_weight),)

    def sharing(
        self,
        model: DiffusionModel,
        request: ResolvedRequest,
        inputs: Inputs,
        loras: tuple[PatchSpec, ...],
    ) -> Sharing | None:
        """Return what replaces the denoiser's attentions, None in most modes.

        Args:
            model: The model.
            request: Request of a pass. An input image is fitted to its size.
            inputs: Input images by role.
            loras: LoRAs that are merged into the denoiser.

        Raises:
            LayerDiffuseMissing: The file does not exist.
        """
        info = MODE_DATA[self.name]
        if not info.shares_attention:
            return None
        size, control = (request.width, request.height), None
        for role in info.needs:
            image = condition_image(inputs[role], size, request.resize_mode)
            control = Canvas.of(*size).extend(image)
        file = PatchFile.at(model.layerdiffuse.patch(info.name))
        return Sharing(file, self.images, loras, control)

    @property
    def images(self) -> int:
        """Return the number of images that are generated as one set."""
        return len(MODE_DATA[self.name].layers)

    def role(self, number: int) -> LayerRole:
        """Return the role of the image with a number in its batch."""
        return MODE_DATA[self.name].layers[number % self.images]

    def is_transparent(self, number: int) -> bool:
        """Return whether the image with a number in its batch has alpha."""
        return MODE_DATA[self.name].is_transparent(self.role(number))

    def compose(self, decoding: Decoding, latent: Tensor, number: int) -> list[Layer]:
        """Decode a latent (1, C, h, w) to its layers.

        Args:
            decoding: What composing needs besides the latent.
            latent: The latent.
            number: Number of the image in its batch, from 0.
        """
        role = self.role(number)
        if self.is_transparent(number):
            return [Layer(decode_with_alpha(decoding, latent), role)]
        return [Layer(to_opaque(decoding.rgb(latent)), role)]

    def warnings(self, request: ResolvedRequest) -> tuple[str, ...]:
        """Return what of a request has no effect in the mode, one sentence each."""
        has_weight = not MODE_DATA[self.name].shares_attention
        return () if has_weight or request.layerdiffuse_weight == 1 else (NO_WEIGHT,)

    def decoders(self, model: DiffusionModel) -> list[nn.Module]:
        """Return the networks that `compose` uses. Raises `LayerDiffuseMissing`."""
        return [model.modules["vae"], *([model.decoder] if self.has_alpha else [])]


MODES = {
    mode.name: mode
    for mode in (
        Mode("attention"),
        Mode("conv"),
        Mode("fg2ble", encode_condition),
        Mode("fgble2bg", encode_condition),
        Mode("bg2ble", encode_condition),
        Mode("bgble2fg", encode_condition),
        Mode("sd15_attention"),
        Mode("sd15_fg2bg"),
        Mode("sd15_bg2fg"),
        Mode("sd15_joint"),
        Mode("opaque"),
    )
}
"""All modes by name."""
