"""Stable Diffusion in memory, of either family: a UNet, a VAE and CLIP text encoders.

`sdxl` and `sd15` read the files.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphalayer import catalog
from alphalayer.catalog import ModelEntry
from alphalayer.catalog.headers import Header, read_header
from alphalayer.core.errors import AlphalayerError, CorruptFile, ModelUnusable
from alphalayer.engine.acceleration import Acceleration, GraphRunner, Run, accelerate
from alphalayer.engine.canvas import SIZE_MULTIPLE
from alphalayer.engine.families import vae_names
from alphalayer.engine.families.base import LatentSpec, LayerDiffuseFiles, NoiseProcess, Part
from alphalayer.engine.families.clip_files import read_text_folder
from alphalayer.engine.families.configs import LDM_UNET, check_counts, fitted_vae
from alphalayer.engine.families.folders import read_part
from alphalayer.engine.families.scaled import load_scaled
from alphalayer.engine.families.vae import Vae, read_vae
from alphalayer.engine.memory import Precision, is_out_of_memory, move
from alphalayer.engine.networks.clip import ClipTextModel
from alphalayer.engine.networks.transparent import TransparentDecoder, TransparentEncoder
from alphalayer.engine.networks.unet import Prepared, UNet, UNetConfig
from alphalayer.engine.networks.weights import build
from alphalayer.engine.parameter_names import ldm_to_diffusers
from alphalayer.engine.sampling.schedules import SigmaTable
from alphalayer.engine.text.chunks import CHUNK_LENGTH
from alphalayer.engine.text.encoders import Conditioning, TextEncoders, TextOutputs
from alphalayer.engine.text.tokenizer import ClipTokenizer, read_tokenizers
from alphalayer.engine.transparency.attention_sharing import restore_attention
from alphalayer.engine.transparency.decode import load_decoder
from alphalayer.engine.transparency.encode import load_encoder
from alphalayer.engine.transparency.patch import WeightPatcher, patchers

logger = logging.getLogger(__name__)

COLOURS = 3
MIN_TRAINING_STEPS, MAX_TRAINING_STEPS = 200, 100_000
"""Limits of a model's table. Samplers select up to 150 levels, LCM every 20th one."""
ROW_LENGTH = CHUNK_LENGTH + 2
"""Tokens of a row: a chunk, its start and its end."""


@dataclass(frozen=True)
class Parts:
    """Networks and tokenizers of a model, and the configs that go with them."""

    unet: UNet
    inpaint_weight: Tensor | None
    """See `DiffusionModel.inpaint_weight`."""
    vae: Vae
    vae_config: Mapping[str, Any]
    text_encoders: Sequence[ClipTextModel]
    tokenizers: Sequence[ClipTokenizer]
    text_outputs: TextOutputs
    scheduler: Mapping[str, Any]


class StableDiffusion:
    """Model in memory: its networks, and the numbers that sampling needs.

    Implements `alphalayer.engine.families.base.DiffusionModel`.
    """

    def __init__(
        self,
        entry: ModelEntry,
        parts: Parts,
        precision: Precision,
        models_dir: Path,
    ):
        self.entry = entry
        self.unet, self.vae, self.text_encoders = parts.unet, parts.vae, parts.text_encoders
        self.inpaint_weight = parts.inpaint_weight
        is_v = parts.scheduler.get("prediction_type") == "v_prediction"
        self.process = NoiseProcess(_sigma_table(parts.scheduler), "v" if is_v else "epsilon")
        self.defaults = catalog.model_defaults(entry.path, entry.family)
        self.layerdiffuse = LayerDiffuseFiles(entry, catalog.layer_config(entry.path), models_dir)
        self.text = TextEncoders(
            [*zip(parts.tokenizers, parts.text_encoders, strict=True)], parts.text_outputs
        )
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
        self._encoder: tuple[Path, TransparentEncoder] | None = None
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
    def encoder(self) -> TransparentEncoder:
        """Return the transparent encoder, read on first use. Raises `LayerDiffuseMissing`."""
        path = self.layerdiffuse.required_encoder()
        if self._encoder is None or self._encoder[0] != path:
            self._encoder = path, load_encoder(path)
        return self._encoder[1]

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

        SDXL is conditioned on the size of the original image, the crop and the target size, and on
        pooled text. SD 1.5 ignores these.
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
        encoded = self.vae.encode(rgb.to(weight.device, weight.dtype).contiguous(), offset)
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
        restore_attention(self.unet)
        for patcher in (self._patchers or {}).values():
            patcher.remove()
        self._patchers = None

    def _loaded(self) -> list[nn.Module]:
        encoders = [self._encoder[1]] if self._encoder else []
        return [*self.modules.values(), *([self._decoder] if self._decoder else []), *encoders]


def load(
    read: Callable[[Path, Precision], Parts], entry: ModelEntry, precision: Precision, models: Path
) -> StableDiffusion:
    """Read a model onto the CPU, each part in the number format that it runs in.

    Args:
        read: Reads the parts of a file or folder.
        entry: The model.
        precision: Number formats.
        models: The models folder.

    Raises:
        CorruptFile, ModelUnusable: See `alphalayer.core.errors`.
        Exception: One that `is_out_of_memory` recognises.
    """
    try:
        parts = read(entry.path, precision)
        _check_parts(parts)
        return StableDiffusion(entry, parts, precision, models)
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
            hint=f"Check that it is a complete {catalog.FAMILY_NAMES[entry.family]} model; "
            "download it again if in doubt.",
        ) from error


def _check_parts(parts: Parts) -> None:
    """Check that the parts of a model fit together. Raises `ValueError`."""
    unet, vae, last = parts.unet.config, parts.vae, parts.text_encoders[-1]
    projection, config = last.text_projection, parts.vae_config
    pooled = projection.out_features if projection else last.width
    pooled = pooled if parts.text_outputs.pooled else 0
    context = sum(encoder.width for encoder in parts.text_encoders)
    sizes = {
        "the width of the text that the UNet reads": (unet.context, context),
        "the width of the pooled text that the UNet reads": (unet.pooled or pooled, pooled),
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


def read_folder(
    folder: Path, precision: Precision, text: Sequence[str], outputs: TextOutputs
) -> Parts:
    """Read a diffusers folder.

    Args:
        folder: The folder.
        precision: Number formats.
        text: Ends of the names of the text encoders and tokenizers, such as "_2".
        outputs: What the UNet reads of the text encoders.
    """
    vae_config = catalog.read_config(folder / "vae" / "config.json")
    return Parts(
        *_build_unet(
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
        [read_text_folder(folder / f"text_encoder{end}") for end in text],
        read_tokenizers(*(folder / f"tokenizer{end}" for end in text)),
        outputs,
        catalog.read_json(folder / "scheduler" / "scheduler_config.json"),
    )


@dataclass(frozen=True)
class SingleFile:
    """LDM single file, possibly with a VAE beside it.

    It is mapped once for each part. So its pages leave memory when the part was read.
    """

    path: Path
    precision: Precision

    @cached_property
    def header(self) -> Header:
        """Return the header of the file."""
        return read_header(self.path)

    def vae_config(self) -> dict[str, Any]:
        """Return the config of its VAE. What no shape shows is as in SDXL."""
        beside = catalog.separate_vae(self.path)
        shapes = vae_names.with_prefix(read_header(beside).shapes) if beside else self.header.shapes
        return fitted_vae(shapes)

    def read_vae(self, config: Mapping[str, Any]) -> Vae:
        """Read its VAE."""
        beside = catalog.separate_vae(self.path)
        tensors = (
            vae_names.with_prefix(load_scaled(beside, ""))
            if beside
            else load_scaled(self.path, vae_names.LDM_PREFIX)
        )
        names = vae_names.from_ldm(tensors)
        return read_vae(names, config, self.precision.vae, self.precision.memory_format)

    def read_unet(self, config: Mapping[str, Any]) -> tuple[UNet, Tensor | None]:
        """Read its UNet, see `_build_unet`."""
        tensors = {
            ldm_to_diffusers(name.removeprefix(LDM_UNET)): tensor
            for name, tensor in load_scaled(self.path, LDM_UNET).items()
        }
        return _build_unet(tensors, config, self.precision)

    def read_scheduler(self) -> dict[str, Any]:
        """Return its prediction type and noise schedule."""
        return catalog.scheduler_of(self.path, self.header)


def _build_unet(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], precision: Precision
) -> tuple[UNet, Tensor | None]:
    """Build the UNet, without what an inpainting checkpoint reads beside latents.

    Returns:
        The UNet, and the weight of its first convolution for mask and masked image.
    """
    check_counts(config, "norm_num_groups", "attention_head_dim")
    inpaint_weight, channels = None, config["out_channels"]
    if config["in_channels"] == 2 * channels + 1:
        weight = tensors["conv_in.weight"]
        inpaint_weight = weight[:, channels:].float()
        tensors = {**tensors, "conv_in.weight": weight[:, :channels]}
        config = {**config, "in_channels": channels}
    sizes = UNetConfig.of(config)
    for heads, width in zip(sizes.heads, sizes.widths, strict=True):
        if width % heads:
            raise ValueError(f"its UNet has {heads} heads for {width} channels")
    unet = build(lambda: UNet(sizes), tensors, precision.unet, precision.memory_format)
    return unet, inpaint_weight


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
