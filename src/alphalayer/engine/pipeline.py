"""The recipe: a request becomes transparent pictures. Read `LocalEngine._draw` from top to bottom.

Stages: load → text → sample → decode. Each takes what the one before it returned; what stays on the device between them is the
memory mode's business. Knows nothing of queues, files or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphalayer import catalog, infotext
from alphalayer.engine import GeneratedImage, GenerationResult, Progress, RgbaImage
from alphalayer.engine.brownian import BrownianNoise
from alphalayer.engine.devices import (
    GIB,
    MemoryMode,
    Residency,
    choose_device,
    choose_memory_mode,
    choose_precision,
    free_memory,
    memory_needed,
    smaller_mode,
)
from alphalayer.engine.embeddings import read_embeddings
from alphalayer.engine.guidance import Denoiser, Guidance
from alphalayer.engine.loading import LoadedModel, load_model
from alphalayer.engine.noise import ImageGenerator, Shape, initial_noise
from alphalayer.engine.samplers import SAMPLERS, Noise, brownian_intervals, sample
from alphalayer.engine.schedules import sigmas_for
from alphalayer.engine.text import PromptPlan, TextEncoders, plan_negative, plan_prompt
from alphalayer.engine.transparency import decode_transparent, decoder_inputs, to_uint8
from alphalayer.errors import Cancelled, ModelNotFound, OutOfMemory
from alphalayer.request import GenerationRequest

SIZE_MULTIPLE = 64
"""Pictures are drawn at multiples of this and cropped: the transparent decoder halves the side six times."""
PREVIEW_LATENT_SIDE = 32


@dataclass(frozen=True)
class Canvas:
    """The size that is drawn (multiples of 64) and the window in its middle that was asked for, in pixels."""

    width: int
    height: int
    drawn_width: int
    drawn_height: int

    @classmethod
    def of(cls, width: int, height: int) -> Canvas:
        """The smallest canvas that holds width x height."""
        drawn = [-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (width, height)]
        return cls(width, height, *drawn)

    def crop(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut the window out of a drawn picture (drawn_height, drawn_width, channels)."""
        top, left = (self.drawn_height - self.height) // 2, (self.drawn_width - self.width) // 2
        return np.ascontiguousarray(picture[top : top + self.height, left : left + self.width])


@dataclass(frozen=True)
class Watcher:
    """Tells a caller how far a request is, and stops it when the caller wants that."""

    on_progress: Callable[[Progress], None]
    is_cancelled: Callable[[], bool]
    previews: bool

    def check(self) -> None:
        """Raise `Cancelled` if the caller no longer wants the pictures."""
        if self.is_cancelled():
            raise Cancelled("cancelled.")

    def stage(self, name: str) -> None:
        """A stage begins."""
        self.check()
        self.on_progress(Progress(name))


class Stopwatch:
    """Seconds of each stage; waits for the device, so that a stage is charged with its own work."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Time a block and add it to the stage's account."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class LocalEngine:
    """Draws on one device with one model at a time; implements `alphalayer.engine.Engine`."""

    def __init__(
        self,
        models_dir: Path,
        *,
        embeddings_dir: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        memory: str = "auto",
        default_model: str | None = None,
        compile_unet: bool = False,
    ):
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.mode = choose_memory_mode(self.device, memory)
        self._models_dir = models_dir
        self._embeddings_dir = embeddings_dir or models_dir.parent / "embeddings"
        self._default_model = default_model
        self._compile_unet = compile_unet
        self._model: LoadedModel | None = None
        self._encoders: TextEncoders | None = None

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_progress: Callable[[Progress], None] = lambda _: None,
        is_cancelled: Callable[[], bool] = lambda: False,
        previews: bool = False,
    ) -> GenerationResult:
        """Draw the pictures of one request; see `alphalayer.engine.Engine.generate`.

        Out of memory: what was taken is given back and the request is drawn once more in the next smaller memory mode.
        """
        watcher = Watcher(on_progress, is_cancelled, previews)
        try:
            return self._draw(request, self.mode, watcher)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        free_memory(self.device)
        mode = smaller_mode(self.mode) or self.mode
        try:
            return self._draw(request, mode, watcher)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        free_memory(self.device)
        raise self._out_of_memory(request, mode)

    def memory_bytes(self) -> int:
        """Memory that torch holds on the GPU, in bytes; 0 on the CPU."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    @property
    def held_model(self) -> LoadedModel:
        """The model in memory. Raises `ModelNotFound` before the first picture."""
        if self._model is None:
            raise ModelNotFound("no model is loaded yet.")
        return self._model

    @torch.inference_mode()
    def _draw(self, request: GenerationRequest, mode: MemoryMode, watcher: Watcher) -> GenerationResult:
        stopwatch = Stopwatch(self.device)
        residency = Residency(self.device, mode)

        watcher.stage("load")
        with stopwatch.stage("load"):
            model, encoders = self._load(request.model)
        request = request.resolved(model.defaults)
        canvas = Canvas.of(request.width or 0, request.height or 0)
        sigmas = sigmas_for(request.scheduler or "", request.steps or 0, model.sigma_table)
        seeds, subseeds = _seeds(request)
        shape = (
            model.latent_channels,
            canvas.drawn_height // model.scale_factor,
            canvas.drawn_width // model.scale_factor,
        )
        generators = [ImageGenerator(seed, request.noise, self.device) for seed in seeds]
        variations = [ImageGenerator(seed, request.noise, self.device) for seed in subseeds]
        start = initial_noise(generators, shape, variations, request.subseed_strength)
        noise = _noise(request, generators, shape, sigmas, self.device)

        watcher.stage("text")
        with stopwatch.stage("text"), residency.of(model.text_encoder, model.text_encoder_2, keep=mode.keep_text):
            positive, negative = self._plans(request, encoders)

        guidance = Guidance(positive, negative, request.cfg_scale or 1.0, canvas.drawn_width, canvas.drawn_height)
        watcher.stage("sample")
        with stopwatch.stage("sample"), residency.of(model.unet, keep=mode.keep_unet):
            latents = self._sample(request, model, Denoiser(model, guidance, mode), start, sigmas, noise, watcher)

        watcher.stage("decode")
        decoders = [model.vae, model.decoder] if request.layerdiffuse.enabled else [model.vae]
        with residency.of(*decoders, keep=mode.keep_unet):
            pictures = [self._decode(request, model, latent[None], mode, watcher, stopwatch) for latent in latents]

        return self._result(request, model, [canvas.crop(each) for each in pictures], seeds, subseeds, stopwatch)

    def _load(self, name: str | None) -> tuple[LoadedModel, TextEncoders]:
        """The asked-for model, from memory if it is the one held, else from disk; one is held at a time."""
        entry = catalog.resolve_model(name or self._default_model, catalog.find_models(self._models_dir))
        if self._model is None or self._encoders is None or self._model.entry.path != entry.path:
            self._model = self._encoders = None
            free_memory(self.device)
            self._model = load_model(entry, self.precision, self._models_dir)
            if self._compile_unet:
                self._model.unet.compile()
            self._encoders = TextEncoders(
                self._model.tokenizer,
                self._model.tokenizer_2,
                self._model.text_encoder,
                self._model.text_encoder_2,
                read_embeddings(self._embeddings_dir),
            )
        return self._model, self._encoders

    def _plans(self, request: GenerationRequest, encoders: TextEncoders) -> tuple[PromptPlan, PromptPlan]:
        steps = request.steps or 0
        positive = plan_prompt(encoders, request.prompt, steps, request.clip_skip)
        return positive, plan_negative(encoders, request.negative_prompt, steps, request.clip_skip)

    def _sample(
        self,
        request: GenerationRequest,
        model: LoadedModel,
        denoiser: Denoiser,
        start: Tensor,
        sigmas: Tensor,
        noise: Noise,
        watcher: Watcher,
    ) -> Tensor:
        """Denoise `start` (B, C, h, w; unit variance) along `sigmas`; the scaled clean latents, float32."""
        last_patched_sigma = _last_patched_sigma(request.layerdiffuse.stop_at, model)

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            watcher.check()
            self._patch(request, model, with_transparency=request.layerdiffuse.enabled and sigma >= last_patched_sigma)
            return denoiser(x, sigma, step)

        def on_step(done: int, _x: Tensor, x0: Tensor) -> None:
            preview = self._preview(model, x0) if watcher.previews else None
            watcher.on_progress(Progress("sample", done, len(sigmas) - 1, preview))

        return sample(request.sampler or "", denoise, start * float(sigmas[0]), sigmas, noise, on_step)

    def _patch(self, request: GenerationRequest, model: LoadedModel, *, with_transparency: bool) -> None:
        """Merge the user's LoRAs and, above them, the LayerDiffuse patch; nothing is done if that is how it stands."""
        wanted = [(self._lora_path(lora.name), lora.weight) for lora in request.loras]
        if with_transparency:
            wanted.append((model.layerdiffuse.patch(request.layerdiffuse.method), request.layerdiffuse.weight))
        model.patcher.ensure(wanted)

    def _decode(
        self,
        request: GenerationRequest,
        model: LoadedModel,
        latent: Tensor,
        mode: MemoryMode,
        watcher: Watcher,
        stopwatch: Stopwatch,
    ) -> RgbaImage:
        """One scaled latent (1, C, h, w) → RGBA; opaque if LayerDiffuse is off."""
        watcher.check()
        with stopwatch.stage("vae"):
            rgb = model.decode_latent(latent)
        if not request.layerdiffuse.enabled:
            return _opaque(rgb)
        with stopwatch.stage("decode"):
            pixel, decoder_latent = decoder_inputs(
                rgb, latent, model.scaling_factor, request.decode, model.shift_factor
            )
            return to_uint8(decode_transparent(model.decoder, pixel, decoder_latent, mode.passes_at_once))

    def _preview(self, model: LoadedModel, x0: Tensor) -> NDArray[np.uint8]:
        """The first image's predicted latent, averaged down to 32 cells a side, through the VAE: small RGB."""
        shrink = max(1, max(x0.shape[-2:]) // PREVIEW_LATENT_SIDE)
        small = torch.nn.functional.avg_pool2d(x0[:1], shrink)
        with Residency(self.device, self.mode).of(model.vae, keep=True):
            return _opaque(model.decode_latent(small))[..., :3]

    def _result(
        self,
        request: GenerationRequest,
        model: LoadedModel,
        pictures: list[RgbaImage],
        seeds: list[int],
        subseeds: list[int],
        stopwatch: Stopwatch,
    ) -> GenerationResult:
        name, short_hash = model.entry.name, model.short_hash
        images = [
            GeneratedImage(picture, seed, subseed, infotext.write_parameters(request, name, short_hash, seed, subseed))
            for picture, seed, subseed in zip(pictures, seeds, subseeds, strict=True)
        ]
        return GenerationResult(request, name, short_hash, images, stopwatch.seconds)

    def _lora_path(self, name: str) -> Path:
        return catalog.find_lora(self._models_dir, name)

    def _out_of_memory(self, request: GenerationRequest, mode: MemoryMode) -> OutOfMemory:
        """What was needed and what was there, with what to do."""
        model = self._model
        unet_bytes = sum(each.nbytes for each in model.unet.parameters()) if model else 0
        size = request.resolved(model.defaults) if model else request
        width, height = size.width or 0, size.height or 0
        needed = memory_needed(unet_bytes, width, height, mode, request.batch_size) / GIB
        there = ""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            there = f" and the GPU has {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        return OutOfMemory(
            f'{width}x{height}, batch of {request.batch_size}, needs about {needed:.1f} GiB in memory mode "{mode.name}"'
            f"{there}; it was tried in two modes.",
            hint="Ask for a smaller picture or batch, close other programs on the GPU, or start with --memory low.",
        )


def create_engine(options: dict[str, Any]) -> LocalEngine:
    """Build the engine from plain options, as they come over a pipe: the keywords of `LocalEngine`, paths as text."""
    values: dict[str, Any] = {**options, "models_dir": Path(options["models_dir"])}
    if values.get("embeddings_dir"):
        values["embeddings_dir"] = Path(values["embeddings_dir"])
    return LocalEngine(**values)


def _noise(
    request: GenerationRequest,
    generators: list[ImageGenerator],
    shape: Shape,
    sigmas: Tensor,
    device: torch.device,
) -> Noise:
    """Where the sampler's noise comes from; Brownian noise begins to be drawn at once, in a thread."""
    sampler = request.sampler or ""
    if SAMPLERS[sampler].noise == "brownian":
        ahead = brownian_intervals(sampler, sigmas)
        return BrownianNoise(_seeds(request)[0], shape, sigmas, request.noise, device, ahead)
    return lambda _from, _to: torch.stack([generator.randn(shape) for generator in generators])


def _seeds(request: GenerationRequest) -> tuple[list[int], list[int]]:
    """Seed and variation seed of each image of a batch: with a variation strength the variation seed counts up."""
    images = range(request.batch_size)
    if request.subseed_strength:
        return [request.seed for _ in images], [request.subseed + i for i in images]
    return [request.seed + i for i in images], [request.subseed + i for i in images]


def _last_patched_sigma(stop_at: float, model: LoadedModel) -> float:
    """Noise level below which the LayerDiffuse patch is off; `stop_at` is the fraction of training time it is on."""
    if stop_at <= 0:
        return float("inf")
    return 0.0 if stop_at >= 1 else model.sigma_table.sigma((1 - stop_at) * 999)


def _opaque(rgb: Tensor) -> RgbaImage:
    """VAE picture (1, 3, H, W) in [-1, 1] → RGBA without transparency; 8 bit by truncation."""
    picture = ((rgb[0].float() + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return np.concatenate([picture, np.full_like(picture[..., :1], 255)], axis=-1)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
