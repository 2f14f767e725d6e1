"""Interface between the pipeline and a model family, and the numbers that every family has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from alphalayer import catalog
from alphalayer.catalog import ModelEntry
from alphalayer.core.errors import CommandHint, EngineFailed, LayerDiffuseMissing
from alphalayer.core.modes import (
    DECODER_FILES,
    DEFAULT_MODE,
    ENCODER_DOWNLOADS,
    ENCODER_FILES,
    MODES,
    mode_for,
)
from alphalayer.core.request import ModelDefaults
from alphalayer.engine.acceleration import Acceleration
from alphalayer.engine.memory import Precision
from alphalayer.engine.networks.transparent import TransparentDecoder, TransparentEncoder
from alphalayer.engine.networks.unet import Prepared
from alphalayer.engine.sampling.schedules import SigmaTable
from alphalayer.engine.text.encoders import Conditioning, TextEncoders
from alphalayer.engine.transparency.patch import WeightPatcher

Part = Literal["denoiser", "vae", "text"]
"""Part of a model. Memory modes and patches go by these names."""


@dataclass(frozen=True)
class LatentSpec:
    """Shape of a model's latent, and its scale against the VAE's own latent."""

    channels: int
    cell: int
    """Pixels of one latent cell along a side."""
    scaling_factor: float
    """The sampler's latent is the VAE's latent, minus `shift_factor`, times this."""
    shift_factor: float = 0.0

    def from_vae(self, latent: Tensor) -> Tensor:
        """Return the sampler's latent of the VAE's latent."""
        return (latent - self.shift_factor) * self.scaling_factor

    def to_vae(self, latent: Tensor) -> Tensor:
        """Return the VAE's latent of the sampler's latent."""
        return latent / self.scaling_factor + self.shift_factor


@dataclass(frozen=True)
class NoiseProcess:
    """Noise levels that a model was trained on, and what its network predicts at each.

    Source: k-diffusion's parametrisation (Karras et al. 2022) of DDPM models.
    """

    table: SigmaTable
    prediction: Literal["epsilon", "v"]

    def scale_input(self, x: Tensor, sigma: float) -> Tensor:
        """Scale a noisy latent to unit variance, as the network expects it."""
        return x / math.sqrt(sigma**2 + 1)

    def end_sigma(self, share: float) -> float:
        """Return the noise level below which a patch is off.

        `share` is the share of the training time during which it is on.
        """
        if share <= 0:
            return math.inf
        return 0.0 if share >= 1 else self.table.sigma((1 - share) * (len(self.table) - 1))

    def to_denoised(self, x: Tensor, output: Tensor, sigma: float) -> Tensor:
        """Return the clean latent x0, float32, that a network output implies.

        epsilon: `x - s*out`; v: `x/(s²+1) - out*s/sqrt(s²+1)`.
        """
        if self.prediction == "v":
            return x / (sigma**2 + 1) - output * (sigma / math.sqrt(sigma**2 + 1))
        return x - output * sigma


@dataclass(frozen=True)
class LayerDiffuseFiles:
    """Paths of a model's LayerDiffuse files, see `catalog.layer_file`."""

    entry: ModelEntry
    config: dict[str, Any]
    """Contents of the model's own `layerdiffuse/config.json`."""
    models_dir: Path

    def patch(self, mode: str) -> Path:
        """Return the weight patch of a mode. Raises `LayerDiffuseMissing`."""
        return self._existing("patch", MODES[mode].files, MODES[mode].download)

    def decoder(self) -> Path:
        """Return the transparent decoder. Raises `LayerDiffuseMissing`."""
        family = self.entry.family
        download = mode_for(family, DEFAULT_MODE).download
        return self._existing("decoder", DECODER_FILES[family], download)

    def encoder(self) -> Path | None:
        """Return the transparent encoder, None if there is no such file."""
        configured = self.config.get("encoder")
        names = ENCODER_FILES[self.entry.family]
        path = catalog.layer_file(self.entry.path, names, configured, self.models_dir)
        return path if path.is_file() else None

    def required_encoder(self) -> Path:
        """Return the transparent encoder. Raises `LayerDiffuseMissing`."""
        family = self.entry.family
        return self._existing("encoder", ENCODER_FILES[family], ENCODER_DOWNLOADS[family])

    def _existing(self, kind: str, names: tuple[str, ...], download: str) -> Path:
        path = catalog.layer_file(self.entry.path, names, self.config.get(kind), self.models_dir)
        if not path.is_file():
            raise LayerDiffuseMissing(
                f"{path.name} is not in {path.parent}; transparency needs it.",
                hint=CommandHint("Run:", f"models pull {download}"),
            )
        return path


class DiffusionModel(Protocol):
    """Loaded model of any family, as the pipeline uses it.

    Everything around the networks is float32. The networks run in their own dtype.
    """

    entry: ModelEntry
    defaults: ModelDefaults
    process: NoiseProcess
    latent: LatentSpec
    modules: Mapping[Part, nn.Module]
    text: TextEncoders
    layerdiffuse: LayerDiffuseFiles
    inpaint_weight: Tensor | None
    """Weight of the first convolution for mask and masked image of an inpainting checkpoint.

    Its shape is (width of the first level, 1 + channels, 3, 3), float32. None: another checkpoint.
    """

    @property
    def patchers(self) -> Mapping[Part, WeightPatcher]:
        """Return the patchers of "denoiser" and "text"."""
        ...

    @property
    def decoder(self) -> TransparentDecoder:
        """Return the transparent decoder, read on first use. Raises `LayerDiffuseMissing`."""
        ...

    @property
    def encoder(self) -> TransparentEncoder:
        """Return the transparent encoder, read on first use. Raises `LayerDiffuseMissing`."""
        ...

    @property
    def short_hash(self) -> str:
        """Return the first ten digits of the model's SHA-256, or "" if it is unreadable."""
        ...

    def prepare(
        self, conditioning: Conditioning, width: int, height: int, crop: tuple[int, int]
    ) -> Prepared:
        """Compute what the denoiser derives from the text. It is the same at all steps.

        Args:
            conditioning: One row of text for each latent.
            width: Width of the image in pixels, as the model is conditioned on it.
            height: Height of the image in pixels.
            crop: Top and left of the crop, as the model is conditioned on it.
        """
        ...

    def denoise(
        self, x: Tensor, sigma: float, prepared: Prepared, condition: Tensor | None = None
    ) -> Tensor:
        """Return the raw network output for scaled latents.

        Args:
            x: Scaled noisy latents (rows, channels, h, w).
            sigma: Noise level.
            prepared: Text of the rows, as `prepare` returned it for the current weights.
            condition: Condition of a mode with input images, or of an inpainting checkpoint, one
                row for each latent. It is added to what the first convolution returns, (rows, width
                of the first level, h, w).

        Returns:
            Output (rows, channels, h, w), float32.
        """
        ...

    def encode_image(self, rgb: Tensor, offset: Tensor | None = None) -> Tensor:
        """Encode RGB (B, 3, H, W) in [-1, 1] to sampler latents (B, C, h, w), float32.

        The mean of the VAE's distribution, so the result does not depend on a seed.
        `offset` is added to it, in standard deviations of the distribution.
        """
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Decode sampler latents (B, C, h, w) to RGB (B, 3, H, W), about [-1, 1], float32."""
        ...

    def accelerate(self, kind: Acceleration) -> None:
        """Run the denoiser in a faster way from now on; see `engine.acceleration`."""
        ...

    def memory_bytes(self) -> int:
        """Return the memory of all weights in bytes."""
        ...

    def move(self, device: str) -> None:
        """Move all loaded networks to a device."""
        ...

    def remove_patches(self) -> None:
        """Remove all merged patches and release what was read for them."""
        ...


Load = Callable[[ModelEntry, Precision, Path], DiffusionModel]
"""Reads a model of a family: entry, number formats and models folder to a model on the CPU.

Raises `CorruptFile`, `ModelUnusable`, or an error that `is_out_of_memory` recognises.
"""


def check_finite(values: Tensor, source: str) -> Tensor:
    """Return the output of a network. Raises `EngineFailed` if a number is not finite.

    The image would be black or empty.
    """
    if not torch.isfinite(values).all():
        raise EngineFailed(
            f"{source} gave numbers that are not finite: they became too large for its number "
            "format, or its weights are damaged.",
            hint=CommandHint(
                "Start with --dtype bf16 or fp32, use fewer LoRAs or lower weights, or run:",
                "models verify",
            ),
        )
    return values
