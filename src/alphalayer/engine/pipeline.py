"""The recipe: requests become transparent pictures. Read `LocalEngine._render` from top to bottom.

Stages: load → text → sample → decode. Each takes what the one before it returned; what stays on the device between them is the
memory mode's business. Knows nothing of queues, files or HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphalayer import catalog
from alphalayer.catalog import ModelEntry
from alphalayer.core.errors import AlphalayerError, EngineFailed, ModelNotFound, OutOfMemory
from alphalayer.core.request import GenerationRequest, ResolvedRequest
from alphalayer.engine.base import GeneratedImage, GenerationResult, Progress, RenderTask, RgbaImage
from alphalayer.engine.canvas import SIZE_MULTIPLE, Canvas
from alphalayer.engine.families.sdxl import LoadedModel, load_model
from alphalayer.engine.memory import (
    GIB,
    MemoryMode,
    Residency,
    choose_batch_pixels,
    choose_device,
    choose_memory_mode,
    choose_precision,
    describe,
    free_memory,
    is_out_of_memory,
    memory_needed,
    modes_down_from,
)
from alphalayer.engine.model_cache import LoadedPipeline, ModelCache
from alphalayer.engine.progress import ProgressReporter, Stopwatch
from alphalayer.engine.sampling.brownian_tree import BrownianNoise
from alphalayer.engine.sampling.guidance import Denoiser, Guidance
from alphalayer.engine.sampling.noise import ImageGenerator, Shape, initial_noise
from alphalayer.engine.sampling.samplers import SAMPLERS, Noise, brownian_intervals, sample
from alphalayer.engine.sampling.schedules import sigmas_for
from alphalayer.engine.text.encoders import TextEncoders, is_cached, plan_negative, plan_prompt
from alphalayer.engine.text.textual_inversion import EmbeddingFolder
from alphalayer.engine.transparency.decode import (
    decode_transparent,
    decoder_inputs,
    opaque,
    to_uint8,
)
from alphalayer.engine.transparency.patch import PatchFile, PatchSpec

logger = logging.getLogger(__name__)

PREVIEW_LATENT_SIDE = 32
T = TypeVar("T")


class LocalEngine:
    """Draws on one device with one model at a time; implements `alphalayer.engine.Engine`.

    `batch_pixels` bounds what is drawn together, None: what the GPU's memory has room for. `spare_model_bytes` is host memory for
    models that are not in use.
    """

    def __init__(
        self,
        models_dir: Path,
        *,
        embeddings_dir: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        memory: str = "auto",
        default_model: str | None = None,
        batch_pixels: int | None = None,
        spare_model_bytes: int = 0,
    ):
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.mode = choose_memory_mode(self.device, memory)
        self._models_dir = models_dir
        self._embeddings = EmbeddingFolder(embeddings_dir or models_dir.parent / "embeddings")
        self._default_model = default_model
        self._batch_pixels = (
            choose_batch_pixels(self.device, self.mode) if batch_pixels is None else batch_pixels
        )
        self._shelf = ModelCache(self._read, spare_model_bytes)
        self.description = describe(
            self.device, self.precision, self.mode, requested=(device, memory)
        )

    @property
    def batch_pixels(self) -> int:
        """How many pixels are drawn together; 0: each request alone."""
        return self._batch_pixels

    def warm_up(self) -> None:
        """Load the default model and draw once: full size on a GPU, as small as can be on a CPU. What users can mend is logged: a
        request will say it again. Raises what nobody foresaw, as a GPU that is broken."""
        side = None if self.device.type == "cuda" else SIZE_MULTIPLE
        try:
            self.generate(GenerationRequest(prompt="warm up", steps=1, width=side, height=side))
        except AlphalayerError as error:
            logger.warning("Nothing could be drawn at the start: %s", error)

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_progress: Callable[[Progress], None] = lambda _: None,
        is_cancelled: Callable[[], bool] = lambda: False,
        previews: bool = False,
    ) -> GenerationResult:
        """Draw the pictures of one request; see `draw`."""
        return self.render([RenderTask(request, (), on_progress, is_cancelled, previews)])[0]

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        """Draw the pictures of one request, or of several together; see `alphalayer.engine.Engine.render`.

        Out of memory: what was taken is given back and a single request is drawn in the next smaller memory mode, down to the smallest.
        """
        modes = modes_down_from(self.mode) if len(tasks) == 1 else [self.mode]
        return self._in_less_and_less(
            [task.request for task in tasks], modes, lambda mode: self._render(tasks, mode)
        )

    def _in_less_and_less(
        self,
        requests: Sequence[GenerationRequest],
        modes: Sequence[MemoryMode],
        work: Callable[[MemoryMode], T],
    ) -> T:
        """What comes of some work in the first of the memory modes that has room for it. Raises `OutOfMemory`."""
        for mode, smaller in zip(modes, [*modes[1:], None], strict=True):
            try:
                return work(mode)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            if self._shelf.held is None:
                break  # a model is read in every mode alike
            self._shelf.held.leave_device()
            free_memory(self.device)
            if smaller:
                logger.warning(
                    'Out of memory in memory mode "%s"; trying "%s".', mode.name, smaller.name
                )
        raise self._out_of_memory(requests, modes)

    def memory_bytes(self) -> int:
        """Memory that torch holds on the GPU, in bytes; 0 on the CPU."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    @property
    def held(self) -> LoadedPipeline:
        """The model in memory. Raises `ModelNotFound` before the first picture."""
        if self._shelf.held is None:
            raise ModelNotFound("no model is loaded yet.")
        return self._shelf.held

    @torch.inference_mode()
    def _render(self, tasks: Sequence[RenderTask], mode: MemoryMode) -> list[GenerationResult]:
        """The recipe. What the requests share is read from the first of them."""
        watchers = ProgressReporter(tasks)
        stopwatch = Stopwatch(self.device)
        residency = Residency(self.device, mode)

        watchers.stage("load")
        with stopwatch.stage("load"):
            ready = self._shelf.get(self._entry(tasks[0].request))
            ready.encoders.set_embeddings(self._embeddings.read())
            model = ready.model
            requests = [task.request.resolve(model.defaults, task.images) for task in tasks]
            shared = requests[0]
            merges = self._patch_specs(shared, model)
            # read here, so that a decoder that is missing or damaged is told before the work
            decoders = [model.vae, model.decoder] if shared.is_transparent else [model.vae]
        canvas = Canvas.of(shared.width, shared.height)
        sampler = SAMPLERS[shared.sampler]
        sigmas = sigmas_for(
            shared.scheduler, shared.steps, model.sigma_table, skip_lowest=sampler.skips_lowest
        )
        shape = (
            model.latent_channels,
            canvas.drawn_height // model.scale_factor,
            canvas.drawn_width // model.scale_factor,
        )
        start, noise = self._noise(requests, shape, sigmas)

        watchers.stage("text")
        readers = (
            []
            if _is_read(requests, merges.loras, ready)
            else [model.text_encoder, model.text_encoder_2]
        )
        with stopwatch.stage("text"), residency.of(*readers, keep=mode.keep_text):
            _patch_text(merges.loras, ready)
            guidances = [_guidance(each, ready.encoders, watchers.check) for each in requests]

        denoiser = Denoiser(
            model, guidances, canvas.drawn_width, canvas.drawn_height, mode, watchers.check
        )
        watchers.stage("sample")
        with (
            stopwatch.stage("sample"),
            residency.of(model.unet, keep=mode.keep_unet),
            noise as drawn,
        ):
            latents = self._sample(tasks, shared, denoiser, merges, start, sigmas, drawn)

        # what was sampled is kept, and so is each picture that came out
        pictures: list[RgbaImage] = []

        def decode(mode: MemoryMode) -> None:
            with Residency(self.device, mode).of(*decoders, keep=mode.keep_unet):
                for latent in latents[len(pictures) :]:
                    pictures.append(
                        self._decode(shared, model, latent[None], mode, watchers, stopwatch)
                    )

        self._in_less_and_less(requests, modes_down_from(mode), decode)

        cropped = iter([canvas.crop(each) for each in pictures])
        return [
            _result(each, model, list(islice(cropped, len(each.images))), stopwatch)
            for each in requests
        ]

    def _entry(self, request: GenerationRequest) -> ModelEntry:
        entries = catalog.find_models(self._models_dir)
        entry = catalog.resolve_model(
            request.model or self._default_model, entries, self._models_dir
        )
        if request.is_transparent:
            catalog.check_layerdiffuse_method(entry, request.mode)
        return entry

    def _read(self, entry: ModelEntry) -> LoadedPipeline:
        model = load_model(entry, self.precision, self._models_dir)
        encoders = (model.tokenizer, model.tokenizer_2, model.text_encoder, model.text_encoder_2)
        return LoadedPipeline(model, TextEncoders(*encoders))

    def _noise(
        self, requests: Sequence[ResolvedRequest], shape: Shape, sigmas: Tensor
    ) -> tuple[Tensor, AbstractContextManager[Noise]]:
        """The starting noise (B, *shape) of all images, and where the sampler's noise comes from while it samples."""
        generators: list[ImageGenerator] = []
        start: list[Tensor] = []
        for request in requests:
            own, variations = (
                [ImageGenerator(seed, request.noise, self.device) for seed in seeds]
                for seeds in zip(*request.images, strict=True)
            )
            start.append(initial_noise(own, shape, variations, request.subseed_strength))
            generators += own
        shared, seeds = (
            requests[0],
            [image.seed for request in requests for image in request.images],
        )
        if SAMPLERS[shared.sampler].noise == "brownian":
            # on the CPU a thread beside the UNet's costs more than it saves
            ahead = brownian_intervals(shared.sampler, sigmas) if self.device.type != "cpu" else ()
            return torch.cat(start), BrownianNoise(
                seeds, shape, sigmas, shared.noise, self.device, ahead
            )
        return torch.cat(start), nullcontext(
            lambda _from, _to: torch.stack([each.randn(shape) for each in generators])
        )

    def _sample(
        self,
        tasks: Sequence[RenderTask],
        shared: ResolvedRequest,
        denoiser: Denoiser,
        merges: _PatchSpecs,
        start: Tensor,
        sigmas: Tensor,
        noise: Noise,
    ) -> Tensor:
        """Denoise `start` (B, C, h, w; unit variance) along `sigmas`; the scaled clean latents, float32."""
        model = denoiser.model
        last_patched_sigma = _last_patched_sigma(shared.layerdiffuse_stop_at, model)
        firsts = [0, *accumulate(each.images for each in denoiser.guidances)]

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            model.patchers[0].ensure(
                merges.with_transparency if sigma >= last_patched_sigma else merges.loras
            )
            return denoiser(x, sigma, step)

        def on_step(step: int, _x: Tensor, clean: Tensor) -> None:
            for task, first in zip(tasks, firsts, strict=False):
                preview = self._preview(model, clean[first : first + 1]) if task.previews else None
                task.on_progress(Progress("sample", step, len(sigmas) - 1, preview))

        latents = sample(shared.sampler, denoise, start * float(sigmas[0]), sigmas, noise, on_step)
        return _finite(latents, "the UNet")

    def _decode(
        self,
        request: ResolvedRequest,
        model: LoadedModel,
        latent: Tensor,
        mode: MemoryMode,
        watchers: ProgressReporter,
        stopwatch: Stopwatch,
    ) -> RgbaImage:
        """One scaled latent (1, C, h, w) → RGBA; opaque if LayerDiffuse is off."""
        watchers.stage("decode")  # said of each image: silence is taken for a process that hangs
        with stopwatch.stage("vae"):
            rgb = _finite(model.decode_latent(latent), "the VAE")
        if not request.is_transparent:
            return opaque(rgb)
        with stopwatch.stage("decode"):
            pixel, decoder_latent = decoder_inputs(
                rgb, latent, model.scaling_factor, request.decode, model.shift_factor
            )
            decoded = decode_transparent(model.decoder, pixel, decoder_latent, mode.passes_at_once)
            return to_uint8(_finite(decoded, "the transparent decoder"))

    def _preview(self, model: LoadedModel, x0: Tensor) -> NDArray[np.uint8]:
        """An image's predicted latent (1, C, h, w), averaged down to 32 cells a side, through the VAE: small RGB."""
        shrink = max(1, max(x0.shape[-2:]) // PREVIEW_LATENT_SIDE)
        small = torch.nn.functional.avg_pool2d(x0, shrink)
        with Residency(self.device, self.mode).of(model.vae, keep=True):
            return opaque(model.decode_latent(small))[..., :3]

    def _patch_specs(self, request: ResolvedRequest, model: LoadedModel) -> _PatchSpecs:
        """Raises `InvalidRequest` for a LoRA that is not there, `LayerDiffuseMissing`."""
        loras = tuple(
            (PatchFile.at(catalog.find_lora(self._models_dir, lora.name)), lora.weight)
            for lora in request.loras
        )
        if not request.is_transparent:
            return _PatchSpecs(loras, loras)
        return _PatchSpecs(
            loras,
            (
                *loras,
                (PatchFile.at(model.layerdiffuse.patch(request.mode)), request.layerdiffuse_weight),
            ),
        )

    def _out_of_memory(
        self, requests: Sequence[GenerationRequest], tried: Sequence[MemoryMode]
    ) -> OutOfMemory:
        """What was needed in the last mode that was tried and what was there, with what to do."""
        held = self._shelf.held
        if held is None:
            return OutOfMemory(
                "there is not enough memory to read the model.",
                hint="Close other programs, set spare_model_gb to 0 if it is not, or use a model file of 16 bit.",
            )
        unet_bytes = sum(each.nbytes for each in held.model.unet.parameters())
        size = requests[0].resolve(held.model.defaults)
        width, height, images = size.width, size.height, sum(each.batch_size for each in requests)
        needed = memory_needed(unet_bytes, width, height, tried[-1], images) / GIB
        there = ""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            there = f" and the GPU has {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        return OutOfMemory(
            f'{width}x{height}, batch of {images}, needs about {needed:.1f} GiB in memory mode "{tried[-1].name}"'
            f"{there}{'; larger modes were tried, too' if len(tried) > 1 else ''}.",
            hint="Ask for a smaller picture or batch, or close other programs on the GPU"
            + (", or start with --memory low." if tried[-1].name != "low" else "."),
        )


@dataclass(frozen=True)
class _PatchSpecs:
    """What is merged into the weights: the user's LoRAs, and what there is while the LayerDiffuse patch, above them, is on."""

    loras: tuple[PatchSpec, ...]
    with_transparency: tuple[PatchSpec, ...]


def create_engine(options: dict[str, Any]) -> LocalEngine:
    """Build the engine from plain options, as they come over a pipe: the keywords of `LocalEngine`, paths as text."""
    values: dict[str, Any] = {**options, "models_dir": Path(options["models_dir"])}
    if values.get("embeddings_dir"):
        values["embeddings_dir"] = Path(values["embeddings_dir"])
    return LocalEngine(**values)


def _is_read(
    requests: Sequence[ResolvedRequest], loras: tuple[PatchSpec, ...], ready: LoadedPipeline
) -> bool:
    """Whether all that requests say was encoded before, with the same LoRAs."""
    return loras == ready.model.patchers[1].applied and all(
        is_cached(ready.encoders, each.prompt, each.negative_prompt, each.steps, each.clip_skip)
        for each in requests
    )


def _patch_text(loras: tuple[PatchSpec, ...], ready: LoadedPipeline) -> None:
    """PatchSpec what LoRAs change in the text encoders; what was encoded before is forgotten if that is something else."""
    patcher = ready.model.patchers[1]
    if loras != patcher.applied:
        ready.encoders.forget()
        patcher.ensure(loras)


def _guidance(
    request: ResolvedRequest, encoders: TextEncoders, check: Callable[[], None]
) -> Guidance:
    """What a request says, encoded."""
    steps = request.steps
    positive = plan_prompt(encoders, request.prompt, steps, request.clip_skip, check)
    negative = plan_negative(encoders, request.negative_prompt, steps, request.clip_skip, check)
    return Guidance(positive, negative, request.cfg_scale, len(request.images))


def _result(
    request: ResolvedRequest, model: LoadedModel, pictures: list[RgbaImage], stopwatch: Stopwatch
) -> GenerationResult:
    name, short_hash = model.entry.name, model.short_hash
    images = [
        GeneratedImage(rgba, *seeds) for rgba, seeds in zip(pictures, request.images, strict=True)
    ]
    return GenerationResult(request, name, short_hash, images, stopwatch.seconds)


def _last_patched_sigma(stop_at: float, model: LoadedModel) -> float:
    """Noise level below which the LayerDiffuse patch is off; `stop_at` is the fraction of training time it is on."""
    if stop_at <= 0:
        return float("inf")
    return 0.0 if stop_at >= 1 else model.sigma_table.sigma((1 - stop_at) * 999)


def _finite(values: Tensor, what: str) -> Tensor:
    """The same numbers. Raises `EngineFailed` where one is none: the picture would be black or empty."""
    if not torch.isfinite(values).all():
        raise EngineFailed(
            f"{what} gave numbers that are not finite: they became too large for its number format, or its weights are damaged.",
            hint="Start with --dtype bf16 or fp32, take off LoRAs or lower their weights, or run: alphalayer models verify",
        )
    return values
