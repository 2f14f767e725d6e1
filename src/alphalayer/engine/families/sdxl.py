"""The SDXL family: single files and diffusers folders, read offline.

diffusers converts single files. The configs that it needs ship with the package and are fitted to
the tensor shapes of the file.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionXLPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from alphalayer import catalog
from alphalayer.catalog import ModelEntry
from alphalayer.catalog.headers import Header, read_header
from alphalayer.core.errors import CorruptFile, ModelUnusable
from alphalayer.engine.families.base import LatentSpec, LayerDiffuseFiles, NoiseProcess, Part
from alphalayer.engine.families.configs import fitted_configs
from alphalayer.engine.memory import Precision, is_out_of_memory
from alphalayer.engine.networks.unet import Prepared, UNet, UNetConfig
from alphalayer.engine.networks.weights import NamedWeights
from alphalayer.engine.parameter_names import ldm_to_diffusers
from alphalayer.engine.sampling.schedules import SigmaTable
from alphalayer.engine.text.encoders import Conditioning, TextEncoders
from alphalayer.engine.transparency.decode import TransparentDecoder, load_decoder
from alphalayer.engine.transparency.patch import WeightPatcher, patchers

logger = logging.getLogger(__name__)

# both libraries warn when a whole module is cast, which is intended here
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


TEXT_STORED = torch.float16


class SdxlModel:
    """SDXL in memory: its networks, and the numbers that sampling needs.

    Implements `alphalayer.engine.families.base.DiffusionModel`.
    """

    def __init__(
        self,
        entry: ModelEntry,
        parts: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        precision: Precision,
        models_dir: Path,
    ):
        self.entry = entry
        self.unet: UNet = parts["unet"]
        self.vae: Any = parts["vae"]
        self.text_encoder: nn.Module = parts["text_encoder"]
        self.text_encoder_2: nn.Module = parts["text_encoder_2"]
        self.process = NoiseProcess(
            _sigma_table(scheduler),
            "v" if scheduler["prediction_type"] == "v_prediction" else "epsilon",
        )
        self.defaults = catalog.model_defaults(entry.path)
        self.layerdiffuse = LayerDiffuseFiles(entry, catalog.layer_config(entry.path), models_dir)
        self.text = TextEncoders(
            parts["tokenizer"], parts["tokenizer_2"], self.text_encoder, self.text_encoder_2
        )
        self.modules: Mapping[Part, nn.Module] = {
            "denoiser": self.unet,
            "vae": self.vae,
            "text": nn.ModuleList([self.text_encoder, self.text_encoder_2]),
        }
        self.latent = _latent_spec(self.vae)
        self._precision = precision
        self._patchers: Mapping[Part, WeightPatcher] | None = None
        self._decoder: TransparentDecoder | None = None
        # hashing takes seconds, so it runs while the first image is generated
        self.hashing = _in_thread(catalog.hash_model, entry, models_dir)

    @property
    def patchers(self) -> Mapping[Part, WeightPatcher]:
        """Return what merges patches into "denoiser" and "text"."""
        if self._patchers is None:
            encoders = (self.text_encoder, self.text_encoder_2)
            denoiser, text = patchers(self.unet, encoders, TEXT_STORED)
            self._patchers = {"denoiser": denoiser, "text": text}
        return self._patchers

    @property
    def decoder(self) -> TransparentDecoder:
        """Return the transparent decoder, read on first use. Raises `LayerDiffuseMissing`."""
        if self._decoder is None:
            config = self.layerdiffuse.config.get("decoder_config")
            path = self.layerdiffuse.decoder()
            self._decoder = load_decoder(path, config, self._precision.decoder)
        return self._decoder

    @property
    def short_hash(self) -> str:
        """Return the first ten digits of the model's SHA-256, or "" if it is unreadable."""
        try:
            return self.hashing.result()[: catalog.SHORT_HASH_DIGITS]
        except CorruptFile as error:
            logger.warning("No hash is written into images of this model: %s", error)
            return ""

    def prepare(self, conditioning: Conditioning, width: int, height: int) -> Prepared:
        """Compute what the UNet derives from text and sizes; see `DiffusionModel`.

        SDXL is conditioned on the size of the original image, the crop and the target size.
        """
        weight = self.unet.conv_in.weight
        return self.unet.prepare(
            conditioning.context.to(weight.device, weight.dtype),
            conditioning.pooled.to(weight.device, weight.dtype),
            (height, width, 0, 0, height, width),
        )

    def denoise(
        self, x: Tensor, sigma: float, prepared: Prepared, condition: Tensor | None = None
    ) -> Tensor:
        """Return the raw output of the UNet for scaled latents, float32."""
        timestep = torch.full((1,), self.process.table.timestep(sigma), device=x.device)
        dtype = self.unet.conv_in.weight.dtype
        return self.unet(x.to(dtype), timestep, prepared, condition).float()

    def encode_image(self, rgb: Tensor) -> Tensor:
        """Encode RGB (B, 3, H, W) in [-1, 1] to sampler latents (B, C, h, w), float32."""
        weight = next(self.vae.parameters())
        encoded = self.vae.encode(rgb.to(weight.device, weight.dtype), return_dict=False)[0]
        mean = encoded if isinstance(encoded, Tensor) else encoded.mode()
        return self.latent.from_vae(mean.float())

    def decode(self, latent: Tensor) -> Tensor:
        """Decode sampler latents (B, C, h, w) to RGB (B, 3, H, W), about [-1, 1], float32."""
        weight = next(self.vae.parameters())
        own = self.latent.to_vae(latent.to(weight.device))
        return self.vae.decode(own.to(weight.dtype), return_dict=False)[0].float()

    def memory_bytes(self) -> int:
        """Return the memory of all weights in bytes."""
        return sum(weight.nbytes for module in self._loaded() for weight in module.parameters())

    def move(self, device: str) -> None:
        """Move all networks that are loaded to a device."""
        for module in self._loaded():
            module.to(device)

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
        parts, scheduler = read(entry, precision)
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ModelUnusable(
            f"{entry.path} cannot be loaded: {reason}.",
            hint="Check that it is a complete SDXL model; download it again if in doubt.",
        ) from error
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        parts[part].eval().requires_grad_(False)
    return SdxlModel(entry, parts, scheduler, precision, models_dir)


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
        "unet": _read_unet(
            {
                name: tensor
                for file in catalog.weight_files(folder / "unet")
                for name, tensor in load_file(file).items()
            },
            catalog.read_json(folder / "unet" / "config.json"),
            precision.unet,
        ),
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
        prefix = "model.diffusion_model."
        unet = _read_unet(
            {
                ldm_to_diffusers(name.removeprefix(prefix)): tensor
                for name, tensor in load_file(path).items()
                if name.startswith(prefix)
            },
            catalog.read_json(Path(folder, "unet", "config.json")),
            precision.unet,
        )
        vae = diffusers.AutoencoderKL.from_single_file(
            path, subfolder="vae", torch_dtype=precision.vae, **local
        )
        pipeline: Any = StableDiffusionXLPipeline.from_single_file(
            path, unet=None, vae=vae, torch_dtype=torch.float16, **local
        )
    parts = {name: getattr(pipeline, name) for name in ("vae", "tokenizer", "tokenizer_2")}
    parts["unet"] = unet
    parts["text_encoder"], parts["text_encoder_2"] = (
        _text(pipeline.text_encoder),
        _text(pipeline.text_encoder_2),
    )
    return parts, scheduler


def _read_unet(tensors: Mapping[str, Tensor], config: dict[str, Any], dtype: torch.dtype) -> UNet:
    with torch.device("meta"):
        unet = UNet(UNetConfig.of(config))
    NamedWeights(unet).assign(tensors, dtype)
    return unet


def _text(encoder: Any) -> nn.Module:
    """Round weights to float16 and compute in float32, as AUTOMATIC1111 does."""
    return encoder.to(TEXT_STORED).float()


@contextmanager
def _config_folder(header: Header) -> Generator[str]:
    """Write diffusers configs that describe a single file into a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="alphalayer-config-") as name:
        for relative, content in fitted_configs(header.shapes).items():
            target = Path(name, relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
        yield name


def _scheduler_of(path: Path, header: Header) -> dict[str, Any]:
    """Return the prediction type and noise schedule of a single file.

    They come from marker tensors or from a .yaml file beside it.
    """
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


def _latent_spec(vae: Any) -> LatentSpec:
    config = vae.config
    cell = getattr(vae, "spatial_compression_ratio", None)
    if not cell:
        blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
        cell = 2 ** (len(blocks) - 1)
    return LatentSpec(
        channels=int(config.latent_channels),
        cell=int(cell),
        scaling_factor=float(config.scaling_factor),
        shift_factor=float(config.get("shift_factor") or 0.0),
    )


def _sigma_table(scheduler: Mapping[str, Any]) -> SigmaTable:
    return SigmaTable.from_betas(
        scheduler.get("beta_start", 0.00085),
        scheduler.get("beta_end", 0.012),
        scheduler.get("beta_schedule", "scaled_linear"),
        scheduler.get("num_train_timesteps", 1000),
        zero_snr=bool(scheduler.get("rescale_betas_zero_snr")),
    )
