"""Models from disk into memory, offline: SDXL single files and diffusers folders of the SDXL class, with their LayerDiffuse files.

diffusers does the conversion of single files; the configs it wants ship with the package and are fitted to the file's tensor shapes.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from alphalayer import catalog
from alphalayer.catalog import ModelEntry
from alphalayer.catalog.headers import Header, read_header
from alphalayer.catalog.layer_files import DECODER_FILES, PATCH_FILES
from alphalayer.core.errors import CommandHint, CorruptFile, LayerDiffuseMissing, ModelUnusable
from alphalayer.core.request import ModelDefaults
from alphalayer.engine.families.configs import fitted_configs
from alphalayer.engine.memory import Precision, is_out_of_memory
from alphalayer.engine.sampling.schedules import SigmaTable
from alphalayer.engine.transparency.decode import TransparentDecoder, load_decoder
from alphalayer.engine.transparency.patch import WeightPatcher, patchers

logger = logging.getLogger(__name__)

# casting whole modules is meant; both libraries warn at each
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


TEXT_STORED = torch.float16


@dataclass(frozen=True)
class LayerDiffuseFiles:
    """Where a model's LayerDiffuse files are, see `catalog.layer_file`; `config` is that of its folder."""

    entry: ModelEntry
    config: dict[str, Any]
    models_dir: Path

    def patch(self, method: str) -> Path:
        """The patch of a method ("attention" or "conv"). Raises `LayerDiffuseMissing`."""
        return self._found("patch", PATCH_FILES[method], method)

    def decoder(self) -> Path:
        """The transparent decoder. Raises `LayerDiffuseMissing`."""
        return self._found("decoder", DECODER_FILES)

    def _found(self, what: str, names: tuple[str, ...], method: str = "attention") -> Path:
        path = catalog.layer_file(self.entry.path, names, self.config.get(what), self.models_dir)
        if not path.is_file():
            raise LayerDiffuseMissing(
                f"{path.name} is not in {path.parent}; transparency needs it.",
                hint=CommandHint(
                    "Run:", f"models pull layerdiffuse{'-conv' if method == 'conv' else ''}"
                ),
            )
        return path


@dataclass
class LoadedModel:
    """A model in memory: the parts that draw, and the numbers that the recipe needs to know."""

    entry: ModelEntry
    unet: nn.Module
    vae: Any
    text_encoder: nn.Module
    text_encoder_2: nn.Module
    tokenizer: Any
    tokenizer_2: Any
    prediction_type: str
    sigma_table: SigmaTable
    defaults: ModelDefaults
    layerdiffuse: LayerDiffuseFiles
    precision: Precision
    hashing: Future[str]
    """The file's SHA-256, computed in a thread while the first picture is drawn."""

    @property
    def short_hash(self) -> str:
        """The first ten digits of the SHA-256; waits for it. Empty if the file could not be read for it."""
        try:
            return self.hashing.result()[: catalog.SHORT_HASH_DIGITS]
        except CorruptFile as error:
            logger.warning("No hash is written into pictures of this model: %s", error)
            return ""

    @cached_property
    def patchers(self) -> tuple[WeightPatcher, WeightPatcher]:
        """Those that merge patches into the UNet and into the text encoders."""
        return patchers(self.unet, (self.text_encoder, self.text_encoder_2), TEXT_STORED)

    def remove_patches(self) -> None:
        """Take off all that was merged into the weights, and let go of what was read for it."""
        for patcher in vars(self).pop("patchers", ()):
            patcher.remove()

    @cached_property
    def decoder(self) -> TransparentDecoder:
        """The transparent decoder, read when first needed."""
        config = self.layerdiffuse.config.get("decoder_config")
        return load_decoder(self.layerdiffuse.decoder(), config, self.precision.decoder)

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return int(self.vae.config.latent_channels)

    @property
    def scale_factor(self) -> int:
        """Pixels a latent cell, along a side."""
        config = self.vae.config
        ratio = getattr(self.vae, "spatial_compression_ratio", None)
        if ratio:
            return int(ratio)
        blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
        return 2 ** (len(blocks) - 1)

    @property
    def scaling_factor(self) -> float:
        """The sampler's latent is the VAE's times this."""
        return float(self.vae.config.scaling_factor)

    @property
    def shift_factor(self) -> float:
        """Added to the VAE's latent after unscaling; 0 for most."""
        return float(self.vae.config.get("shift_factor") or 0.0)

    def decode_latent(self, latent: Tensor) -> Tensor:
        """The sampler's latent (B, C, h, w) → picture (B, 3, H, W), about [-1, 1], float32."""
        weight = next(self.vae.parameters())
        unscaled = latent.to(weight.device) / self.scaling_factor + self.shift_factor
        return self.vae.decode(unscaled.to(weight.dtype), return_dict=False)[0].float()


def load_model(entry: ModelEntry, precision: Precision, models_dir: Path) -> LoadedModel:
    """Read a model onto the CPU, each part in the number format it will work in.

    Raises:
        CorruptFile, ModelUnusable: see `alphalayer.core.errors`.
        Exception: one that `is_out_of_memory` knows.
    """
    try:
        parts, scheduler = (
            _from_folder(entry, precision)
            if entry.kind == "diffusers"
            else _from_file(entry, precision)
        )
    except (
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        SafetensorError,
        RuntimeError,
    ) as error:
        if is_out_of_memory(error):
            raise
        raise ModelUnusable(
            f"{entry.path} cannot be loaded: {(str(error).strip() or type(error).__name__).splitlines()[0][:300]}.",
            hint="Check that it is a complete SDXL model; download it again if in doubt.",
        ) from error
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        parts[part].eval().requires_grad_(False)
    return LoadedModel(
        entry=entry,
        **parts,
        prediction_type="v" if scheduler["prediction_type"] == "v_prediction" else "epsilon",
        sigma_table=_sigma_table(scheduler),
        defaults=catalog.model_defaults(entry.path),
        layerdiffuse=LayerDiffuseFiles(entry, catalog.layer_config(entry.path), models_dir),
        precision=precision,
        hashing=_in_thread(catalog.hash_model, entry, models_dir),
    )


def _in_thread(function: Callable[..., str], *arguments: Any) -> Future[str]:
    executor = ThreadPoolExecutor(1, thread_name_prefix=function.__name__)
    try:
        return executor.submit(function, *arguments)
    finally:
        executor.shutdown(wait=False)


def _from_folder(entry: ModelEntry, precision: Precision) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = entry.path

    def read(kind: Any, name: str, **options: Any) -> Any:
        variant = (
            "fp16"
            if any(catalog.FP16 in file.name for file in catalog.weight_files(folder / name))
            else None
        )
        return kind.from_pretrained(
            folder / name, variant=variant, local_files_only=True, **options
        )

    vae_class = getattr(diffusers, catalog.read_json(folder / "vae" / "config.json")["_class_name"])
    parts: dict[str, Any] = {
        "unet": read(UNet2DConditionModel, "unet", torch_dtype=precision.unet),
        "vae": read(vae_class, "vae", torch_dtype=precision.vae),
        "text_encoder": _text(read(CLIPTextModel, "text_encoder")),
        "text_encoder_2": _text(read(CLIPTextModelWithProjection, "text_encoder_2")),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
    }
    return parts, {
        "prediction_type": "epsilon",
        **catalog.read_json(folder / "scheduler" / "scheduler_config.json"),
    }


def _from_file(entry: ModelEntry, precision: Precision) -> tuple[dict[str, Any], dict[str, Any]]:
    header = read_header(entry.path)
    scheduler = _scheduler_of(entry.path, header)
    path = str(entry.path)
    with _config_folder(header) as folder:
        local: dict[str, Any] = {"config": folder, "local_files_only": True}
        unet = UNet2DConditionModel.from_single_file(
            path, subfolder="unet", torch_dtype=precision.unet, **local
        )
        vae = diffusers.AutoencoderKL.from_single_file(
            path, subfolder="vae", torch_dtype=precision.vae, **local
        )
        pipeline: Any = StableDiffusionXLPipeline.from_single_file(
            path, unet=unet, vae=vae, torch_dtype=torch.float16, **local
        )
    parts = {name: getattr(pipeline, name) for name in ("unet", "vae", "tokenizer", "tokenizer_2")}
    parts["text_encoder"], parts["text_encoder_2"] = (
        _text(pipeline.text_encoder),
        _text(pipeline.text_encoder_2),
    )
    return parts, scheduler


def _text(encoder: Any) -> nn.Module:
    """Weights rounded to float16, computing in float32: what that ecosystem does on every device."""
    return encoder.to(TEXT_STORED).float()


@contextmanager
def _config_folder(header: Header) -> Generator[str]:
    """A folder of diffusers configs that describe a single file."""
    with tempfile.TemporaryDirectory(prefix="alphalayer-config-") as name:
        for relative, content in fitted_configs(header.shapes).items():
            target = Path(name, relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
        yield name


def _scheduler_of(path: Path, header: Header) -> dict[str, Any]:
    """Prediction type and noise schedule of a single file: marker tensors, or a .yaml beside it."""
    yaml = path.with_suffix(".yaml")
    text = yaml.read_text(errors="replace") if yaml.is_file() else ""
    is_v = (
        "v_pred" in header.shapes
        or 'parameterization: "v"' in text
        or "parameterization: v" in text
    )
    return {
        "prediction_type": "v_prediction" if is_v or ".VScaling" in text else "epsilon",
        "rescale_betas_zero_snr": "ztsnr" in header.shapes,
    }


def _sigma_table(scheduler: dict[str, Any]) -> SigmaTable:
    return SigmaTable.from_betas(
        scheduler.get("beta_start", 0.00085),
        scheduler.get("beta_end", 0.012),
        scheduler.get("beta_schedule", "scaled_linear"),
        scheduler.get("num_train_timesteps", 1000),
        zero_snr=bool(scheduler.get("rescale_betas_zero_snr")),
    )
