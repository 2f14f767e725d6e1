"""Mathematics of the modes of LayerDiffuse: how a sampled latent becomes layers.

`alphalayer.core.modes` holds their names, labels and files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from alphalayer.core.modes import MODES as MODE_DATA
from alphalayer.core.modes import LayerRole
from alphalayer.core.request import ResolvedRequest
from alphalayer.engine.base import RgbaImage
from alphalayer.engine.families.base import DiffusionModel, check_finite
from alphalayer.engine.memory import MemoryMode
from alphalayer.engine.progress import Stopwatch
from alphalayer.engine.transparency.decode import (
    decode_transparent,
    decoder_inputs,
    to_opaque,
    to_uint8,
)
from alphalayer.engine.transparency.patch import PatchFile, PatchSpec


@dataclass(frozen=True)
class Layer:
    """One layer of a result."""

    rgba: RgbaImage
    role: LayerRole = "image"


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


def compose_transparent(decoding: Decoding, latent: Tensor) -> list[Layer]:
    """Decode a latent (1, C, h, w) to one layer with alpha."""
    model, request = decoding.model, decoding.request
    rgb = decoding.rgb(latent)
    with decoding.stopwatch.stage("decode"):
        spec = model.latent
        pixel, decoder_latent = decoder_inputs(
            rgb, latent, spec.scaling_factor, request.decode, spec.shift_factor
        )
        passes = decoding.memory.passes_at_once
        decoded = decode_transparent(model.decoder, pixel, decoder_latent, passes)
        return [Layer(to_uint8(check_finite(decoded, "the transparent decoder")))]


def compose_opaque(decoding: Decoding, latent: Tensor) -> list[Layer]:
    """Decode a latent (1, C, h, w) to one opaque layer."""
    return [Layer(to_opaque(decoding.rgb(latent)))]


@dataclass(frozen=True)
class Mode:
    """One way to generate layers: the patch while sampling, and the composition afterwards."""

    name: str
    compose: Callable[[Decoding, Tensor], list[Layer]]

    @property
    def has_alpha(self) -> bool:
        """Return whether the transparent decoder is needed."""
        return MODE_DATA[self.name].has_alpha

    def patches(self, model: DiffusionModel, request: ResolvedRequest) -> tuple[PatchSpec, ...]:
        """Return the weight patches to merge, with their weights. Raises `LayerDiffuseMissing`."""
        if not MODE_DATA[self.name].files:
            return ()
        file = PatchFile.at(model.layerdiffuse.patch(self.name))
        return ((file, request.layerdiffuse_weight),)

    def decoders(self, model: DiffusionModel) -> list[nn.Module]:
        """Return the networks that `compose` uses. Raises `LayerDiffuseMissing`."""
        return [model.modules["vae"], *([model.decoder] if self.has_alpha else [])]


MODES = {
    mode.name: mode
    for mode in (
        Mode("attention", compose_transparent),
        Mode("conv", compose_transparent),
        Mode("opaque", compose_opaque),
    )
}
"""All modes by name."""
