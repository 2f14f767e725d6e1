"""The SDXL family: single files and diffusers folders, read offline.

The sizes of a single file come from its tensor shapes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphalayer import catalog
from alphalayer.catalog import ModelEntry
from alphalayer.catalog.headers import read_header
from alphalayer.core.errors import AlphalayerError, CorruptFile, ModelUnusable
from alphalayer.engine.acceleration import Acceleration, GraphRunner, Run, accelerate
from alphalayer.engine.canvas import SIZE_MULTIPLE
from alphalayer.engine.families import vae_names
from alphalayer.engine.families.base import LatentSpec, LayerDiffuseFiles, NoiseProcess, Part
from alphalayer.engine.families.clip_files import read_text_folder, read_text_models
from alphalayer.engine.families.configs import LDM_UNET, SHIPPED, check_counts, fitted_configs
from alphalayer.engine.families.folders import read_part
from alphalayer.engine.families.scaled import load_scaled
from alphalayer.engine.families.vae import Vae, read_vae
from alphalayer.engine.memory import Precision, is_out_of_memory, move
from alphalayer.engine.networks.clip import ClipTextModel
from alphalayer.engine.networks.transparent import TransparentDecoder
from alphalayer.engine.networks.unet import Prepared, UNet, UNetConfig
from alphalayer.engine.networks.weights import build
from alphalayer.engine.parameter_names import ldm_to_diffusers
from alphalayer.engine.sampling.schedules import SigmaTable
from alphalayer.engine.text.chunks import CHUNK_LENGTH
from alphalayer.engine.text.encoders import Conditioning, TextEncoders
from alphalayer.engine.text.tokenizer import ClipTokenizer, read_tokenizers
from alphalayer.engine.transparency.decode import load_decoder
from alphalayer.engine.transparency.patch import WeightPatcher, patchers

logger = logging.getLogger(__name__)

COLOURS = 3
MIN_TRAINING_STEPS, MAX_TRAINING_STEPS = 200, 100_000
"""Limits of a model's table. Samplers select up to 150 levels, LCM every 20th one."""
ROW_LENGTH = CHUNK_LENGTH + 2
"""Tokens of a row: a chunk, its start and its end."""


@dataclass(frozen=True)
class SdxlParts:
    """Networks and tokenizers of a model, and the configs that go with them."""

    unet: UNet
    vae: Vae
    vae_config: Mapping[str, Any]
    text_encoders: tuple[ClipTextModel, ClipTextModel]
    tokenizers: tuple[ClipTokenizer, ClipTokenizer]
    scheduler: Mapping[str, Any]


class SdxlModel:
    """SDXL in memory: its networks, and the numbers that sampling needs.

    Implements `alphalayer.engine.families.base.DiffusionModel`.
    """

    def __init__(
        self,
        entry: ModelEntry,
        parts: SdxlParts,
        precision: Precision,
        models_dir: Path,
    ):
        self.entry = entry
        self.unet, self.vae, self.text_encoders = parts.unet, parts.vae, parts.text_encoders
        is_v = parts.scheduler.get("prediction_type") == "v_prediction"
        self.process = NoiseProcess(_sigma_table(parts.scheduler), "v" if is_v else "epsilon")
        self.defaults = catalog.model_defaults(entry.path)
        self.layerdiffuse = LayerDiffuseFiles(entry, catalog.layer_config(entry.path), models_dir)
        self.text = TextEncoders(*parts.tokenizers, *parts.text_encoders)
        self.modules: Mapping[Part, nn.Module] = {
            "denoiser": self.unet,
            "vae": self.vae,
            "text": nn.ModuleList(self.text_encoders),
        }
        self.latent = _latent_spec(self.vae, parts.vae_config)
        self._run: Run = self.unet
        self._precision = precision
        self._patchers: Mapping[Part, WeightPatcher] | None = None
        self._decoder: TransparentDecoder | None = None
        # hashing takes seconds, so it runs while the first image is generated
        self.hashing = _in_thread(catalog.hash_model, entry, models_dir)

    @property
    def patchers(self) -> Mapping[Part, WeightPatcher]:
        """Return the patchers of "denoiser" and "text"."""
        if self._patchers is None:
            denoiser, text = patchers(self.unet, self.text_encoders)
            self._patchers = {"denoiser": denoiser, "text": text}
        return self._patchers

    @property
    def decoder(self) -> TransparentDecoder:
        """Return the transparent decoder, read on first use. Raises `LayerDiffuseMissing`."""
        if self._decoder is None:
            config = self.layerdiffuse.config.get("decoder_config")
            path = self.layerdiffuse.decoder()
            self._decoder = load_decoder(
                path, config, self._precision.decoder, self._precision.memory_format
            )
        return self._decoder

    @property
    def short_hash(self) -> str:
        """Return the first ten digits of the model's SHA-256, or "" if it is unreadable."""
        try:
            return self.hashing.result()[: catalog.SHORT_HASH_DIGITS]
        except CorruptFile as error:
            logger.warning("No hash is written into images of this model: %s", error)
            return ""

    def prepare(
        self, conditioning: Conditioning, width: int, height: int, crop: tuple[int, int]
    ) -> Prepared:
        """Compute what the UNet derives from text and sizes; see `DiffusionModel`.

        SDXL is conditioned on the size of the original image, the crop and the target size.
        """
        weight = self.unet.conv_in.weight
        return self.unet.prepare(
            conditioning.context.to(weight.device, weight.dtype),
            conditioning.pooled.to(weight.device, weight.dtype),
            (height, width, *crop, height, width),
        )

    def denoise(
        self, x: Tensor, sigma: float, prepared: Prepared, condition: Tensor | None = None
    ) -> Tensor:
        """Return the raw output of the UNet for scaled latents, float32."""
        timestep = torch.full((1,), self.process.table.timestep(sigma), device=x.device)
        dtype = self.unet.conv_in.weight.dtype
        return self._run(x.to(dtype), timestep, prepared, condition).float()

    def encode_image(self, rgb: Tensor, offset: Tensor | None = None) -> Tensor:
        """Encode RGB (B, 3, H, W) in [-1, 1] to sampler latents; see `DiffusionModel`."""
        weight = next(self.vae.parameters())
        encoded = self.vae.encode(rgb.to(weight.device, weight.dtype), offset)
        return self.latent.from_vae(encoded.float())

    def decode(self, latent: Tensor) -> Tensor:
        """Decode sampler latents (B, C, h, w) to RGB (B, 3, H, W), about [-1, 1], float32."""
        weight = next(self.vae.parameters())
        own = self.latent.to_vae(latent.to(weight.device))
        return self.vae.decode(own.to(weight.dtype)).float()

    def accelerate(self, kind: Acceleration) -> None:
        """Run the UNet in a faster way from now on; see `engine.acceleration`."""
        self._run = accelerate(self.unet, kind)

    def memory_bytes(self) -> int:
        """Return the memory of all weights in bytes."""
        return sum(weight.nbytes for module in self._loaded() for weight in module.parameters())

    def move(self, device: str) -> None:
        """Move all loaded networks to a device."""
        if isinstance(self._run, GraphRunner):
            self._run.forget()
        for module in self._loaded():
            move(module, torch.device(device))

    def remove_patches(self) -> None:
        """Remove all merged patches and release what was read for them."""
        for patcher in (self._patchers or {}).values():
            patcher.remove()
        self._patchers = None

    def _loaded(self) -> list[nn.Module]:
        return [*self.modules.values(), *([self._decoder] if self._decoder else [])]


def load_model(entry: ModelEntry, precision: Precision, models_dir: Path) -> SdxlModel:
    """Read a model onto the CPU, each part in the number format that it runs in.

    Raises:
        CorruptFile, ModelUnusable: See `alphalayer.core.errors`.
        Exception: One that `is_out_of_memory` recognises.
    """
    read = _from_folder if entry.kind == "diffusers" else _from_file
    try:
        parts = read(entry.path, precision)
        _check_parts(parts)
        return SdxlModel(entry, parts, precision, models_dir)
    except AlphalayerError:
        raise
    # files that are not trusted raise anything, from torch's errors to divisions by zero
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip() or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"{reason} is missing"
        raise ModelUnusable(
            f"{catalog.printable(str(entry.path))} cannot be loaded: "
            f"{catalog.printable(reason.splitlines()[0])[:300]}.",
            hint="Check that it is a complete SDXL model; download it again if in doubt.",
        ) from error


def _check_parts(parts: SdxlParts) -> None:
    """Check that the parts of a model fit together. Raises `ValueError`."""
    unet, vae, (first, second) = parts.unet.config, parts.vae, parts.text_encoders
    projection, config = second.text_projection, parts.vae_config
    pooled = projection.out_features if projection else second.width
    sizes = {
        "the width of the text that the UNet reads": (unet.context, first.width + second.width),
        "the width of the pooled text that the UNet reads": (
            unet.pooled or pooled,
            pooled,
        ),
        "the input channels of the UNet": (unet.in_channels, vae.latent_channels),
        "the output channels of the UNet": (unet.out_channels, vae.latent_channels),
        "the colours of the VAE's input": (config.get("in_channels", COLOURS), COLOURS),
        "the colours of the VAE's output": (config.get("out_channels", COLOURS), COLOURS),
        "the odd widths of the UNet": (unet.widths[0] % 2 + unet.size_width % 2, 0),
        "the cell of the VAE": (math.gcd(vae.cell, SIZE_MULTIPLE), vae.cell),
    }
    for name, (actual, expected) in sizes.items():
        if actual != expected:
            raise ValueError(f"{name}: got {actual}, expected {expected}")
    for encoder, tokenizer in zip(parts.text_encoders, parts.tokenizers, strict=True):
        embeddings = encoder.embeddings
        vocabulary, positions = (
            len(table.weight)
            for table in (embeddings.token_embedding, embeddings.position_embedding)
        )
        if positions < ROW_LENGTH or vocabulary < len(tokenizer):
            raise ValueError(
                f"a text model has {positions} positions and {vocabulary} tokens; expected at "
                f"least {ROW_LENGTH} and {len(tokenizer)}"
            )


def _in_thread(function: Callable[..., str], *arguments: Any) -> Future[str]:
    executor = ThreadPoolExecutor(1, thread_name_prefix=function.__name__)
    try:
        return executor.submit(function, *arguments)
    finally:
        executor.shutdown(wait=False)


def _from_folder(folder: Path, precision: Precision) -> SdxlParts:
    """Read a diffusers folder."""
    vae_config = catalog.read_config(folder / "vae" / "config.json")
    return SdxlParts(
        _build_unet(
            read_part(folder / "unet"),
            catalog.read_config(folder / "unet" / "config.json"),
            precision,
        ),
        read_vae(
            vae_names.from_diffusers(read_part(folder / "vae")),
            vae_config,
            precision.vae,
            precision.memory_format,
        ),
        vae_config,
        (read_text_folder(folder / "text_encoder"), read_text_folder(folder / "text_encoder_2")),
        read_tokenizers(folder / "tokenizer", folder / "tokenizer_2"),
        catalog.read_json(folder / "scheduler" / "scheduler_config.json"),
    )


def _from_file(path: Path, precision: Precision) -> SdxlParts:
    """Read an LDM single file. What it does not hold is as in SDXL base.

    The file is mapped once for each part. So its pages leave memory when the part was read.
    """
    header = read_header(path)
    vae = catalog.separate_vae(path)
    vae_shapes = vae_names.with_prefix(read_header(vae).shapes) if vae else {}
    configs = fitted_configs(header.shapes | vae_shapes)
    return SdxlParts(
        _build_unet(_unet_of(load_scaled(path, LDM_UNET)), configs["unet"], precision),
        read_vae(
            vae_names.from_ldm(
                vae_names.with_prefix(load_scaled(vae, ""))
                if vae
                else load_scaled(path, vae_names.LDM_PREFIX)
            ),
            configs["vae"],
            precision.vae,
            precision.memory_format,
        ),
        configs["vae"],
        read_text_models(load_scaled(path, "conditioner.")),
        read_tokenizers(SHIPPED / "tokenizer", SHIPPED / "tokenizer_2"),
        catalog.scheduler_of(path, header),
    )


def _unet_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the UNet of an LDM single file, by canonical name."""
    return {
        ldm_to_diffusers(name.removeprefix(LDM_UNET)): tensor
        for name, tensor in tensors.items()
        if name.startswith(LDM_UNET)
    }


def _build_unet(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], precision: Precision
) -> UNet:
    check_counts(config, "norm_num_groups", "attention_head_dim")
    sizes = UNetConfig.of(config)
    for heads, width in zip(sizes.heads, sizes.widths, strict=True):
        if width % heads:
            raise ValueError(f"its UNet has {heads} heads for {width} channels")
    return build(lambda: UNet(sizes), tensors, precision.unet, precision.memory_format)


def _latent_spec(vae: Vae, config: Mapping[str, Any]) -> LatentSpec:
    scale = float(config.get("scaling_factor", 0.18215))
    shift = float(config.get("shift_factor") or 0.0)
    if not (math.isfinite(scale) and math.isfinite(shift) and scale > 0):
        raise ValueError(f"its VAE scales latents by {scale} and shifts them by {shift}")
    return LatentSpec(vae.latent_channels, vae.cell, scale, shift)


def _sigma_table(scheduler: Mapping[str, Any]) -> SigmaTable:
    steps = scheduler.get("num_train_timesteps", 1000)
    betas = scheduler.get("beta_start", 0.00085), scheduler.get("beta_end", 0.012)
    kind = scheduler.get("beta_schedule", "scaled_linear")
    if not (type(steps) is int and MIN_TRAINING_STEPS <= steps <= MAX_TRAINING_STEPS):
        raise ValueError(
            f"its num_train_timesteps: got {str(steps)[:20]}; "
            f"expected {MIN_TRAINING_STEPS} to {MAX_TRAINING_STEPS}"
        )
    if not all(isinstance(beta, float) and 0 < beta < 1 for beta in betas):
        raise ValueError(f"its betas: got {str(betas)[:60]}; expected numbers between 0 and 1")
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr"))
    table = SigmaTable.from_betas(*betas, kind, steps, zero_snr=zero_snr)
    if not (table.sigmas.isfinite().all() and (table.sigmas.diff() > 0).all()):
        raise ValueError(f"its noise levels do not rise from {betas[0]} to {betas[1]}")
    return table
