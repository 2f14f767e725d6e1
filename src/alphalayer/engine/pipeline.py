"""The pipeline: requests become images. Read `LocalEngine._render` from top to bottom.

Stages: load, text, sample, decode. Each takes what the one before it returned. The memory mode
decides what stays on the device between them. It knows nothing of queues, files or HTTP.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, count, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphalayer import catalog
from alphalayer.catalog import ModelEntry
from alphalayer.core.errors import AlphalayerError, ModelNotFound, OutOfMemory
from alphalayer.core.modes import mode_for
from alphalayer.core.request import GenerationRequest, ResolvedRequest
from alphalayer.core.samplers import ADAPTIVE
from alphalayer.engine.acceleration import Acceleration, check_acceleration
from alphalayer.engine.base import (
    GeneratedImage,
    GenerationResult,
    Progress,
    RenderTask,
    RgbaImage,
)
from alphalayer.engine.canvas import SIZE_MULTIPLE
from alphalayer.engine.edits import (
    Edit,
    check_mode,
    encode_edit,
    inpaint_condition,
    read_encoder,
    start_latents,
)
from alphalayer.engine.families import sd15, sdxl
from alphalayer.engine.families.base import DiffusionModel, LatentSpec, Load, check_finite
from alphalayer.engine.hires import Enlarger, Resizing
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
    modes_down_from,
)
from alphalayer.engine.memory_count import Networks, count_memory
from alphalayer.engine.model_cache import ModelCache
from alphalayer.engine.networks.transparent import TransparentEncoder
from alphalayer.engine.networks.unet import UNet
from alphalayer.engine.passes import (
    Batch,
    Pass,
    PatchSchedule,
    is_encoded,
    patch_text,
    plan_passes,
    read_prompts,
)
from alphalayer.engine.progress import ProgressReporter, Stopwatch
from alphalayer.engine.sampling.brownian_tree import BrownianNoise
from alphalayer.engine.sampling.guidance import Denoiser, Guidance
from alphalayer.engine.sampling.masking import KeptLatents
from alphalayer.engine.sampling.noise import ImageGenerator, initial_noise
from alphalayer.engine.sampling.run import Noise, Run
from alphalayer.engine.sampling.samplers import SAMPLERS, brownian_intervals, sample
from alphalayer.engine.text.textual_inversion import EmbeddingFolder
from alphalayer.engine.transparency.attention_sharing import restore_attention
from alphalayer.engine.transparency.decode import to_opaque
from alphalayer.engine.transparency.modes import MODES, Decoding, Layer, Mode
from alphalayer.engine.transparency.patch import PatchFile, PatchSpec

logger = logging.getLogger(__name__)

FAMILIES: dict[str, Load] = {"sdxl": sdxl.load_model, "sd15": sd15.load_model}
"""How a model of each family is read, by the catalog's name of the family."""
PREVIEW_LATENT_SIDE = 32
T = TypeVar("T")


class LocalEngine:
    """Engine on one device with one active model. Implements `Engine`.

    Args:
        models_dir: The models folder.
        embeddings_dir: Folder of textual inversions.
        device: "auto", or a device of torch.
        dtype: "auto", "fp16", "bf16" or "fp32".
        memory: "auto", or the name of a memory mode.
        default_model: Model of requests that name none.
        batch_pixels: Most pixels that are generated together. None: what the GPU's memory holds.
        spare_model_bytes: Host memory for models that are not active.
        unload_after_s: Seconds without a job after which models are unloaded; 0: never.
        acceleration: "off", or how a CUDA GPU runs the denoiser; see `engine.acceleration`.
        compile_cache: Folder of what torch.compile generated, kept for the next start.
        warm_up_sizes: Sizes (width, height) of the images of the warm-up. Empty: one of the default
            size on a GPU, one of the smallest size on a CPU.
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
        unload_after_s: float = 0.0,
        acceleration: Acceleration = "off",
        compile_cache: str | None = None,
        warm_up_sizes: Sequence[tuple[int, int]] = (),
    ):
        self.device = choose_device(device)
        self.precision = choose_precision(self.device, dtype)
        self.memory = choose_memory_mode(self.device, memory)
        check_acceleration(acceleration, self.device)
        self._acceleration: Acceleration = acceleration
        if compile_cache:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", compile_cache)
        self._warm_up_sizes = warm_up_sizes
        self._models_dir = models_dir
        self._embeddings = EmbeddingFolder(embeddings_dir or models_dir.parent / "embeddings")
        self._default_model = default_model
        if batch_pixels is None:
            batch_pixels = choose_batch_pixels(self.device, self.memory)
        self._batch_pixels = batch_pixels
        self._models = ModelCache(self._load, spare_model_bytes)
        self.unload_after_s = unload_after_s
        self.description = describe(
            self.device, self.precision, self.memory, requested=(device, memory)
        )

    @property
    def batch_pixels(self) -> int:
        """Return how many pixels are generated together; 0: each request alone."""
        return self._batch_pixels

    @property
    def model(self) -> DiffusionModel:
        """Return the active model. Raises `ModelNotFound` before the first image."""
        if self._models.active is None:
            raise ModelNotFound("no model is loaded yet.")
        return self._models.active

    def warm_up(self) -> None:
        """Load the default model and generate an image of each size of the warm-up.

        Errors that users can fix are logged, because the next request reports them again. Other
        errors, such as those of a broken GPU, are raised.
        """
        side = None if self.device.type == "cuda" else SIZE_MULTIPLE
        try:
            for width, height in self._warm_up_sizes or [(side, side)]:
                self.generate(
                    GenerationRequest(prompt="warm up", steps=1, width=width, height=height)
                )
        except AlphalayerError as error:
            logger.warning("The warm-up image failed: %s", error)

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_progress: Callable[[Progress], None] = lambda _: None,
        is_cancelled: Callable[[], bool] = lambda: False,
        previews: bool = False,
    ) -> GenerationResult:
        """Generate the images of one request; see `render`."""
        return self.render([RenderTask(request, (), on_progress, is_cancelled, previews)])[0]

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        """Generate the images of one request, or of several together; see `Engine.render`.

        Out of memory: memory is released, and a single request is generated in the next smaller
        memory mode, down to the smallest.
        """
        modes = modes_down_from(self.memory) if len(tasks) == 1 else [self.memory]
        requests = [task.request for task in tasks]
        try:
            return self._with_less_memory(requests, modes, lambda mode: self._render(tasks, mode))
        except AlphalayerError as error:
            catalog.shorten_paths(error, self._models_dir)
            raise

    def _with_less_memory(
        self,
        requests: Sequence[GenerationRequest],
        modes: Sequence[MemoryMode],
        work: Callable[[MemoryMode], T],
    ) -> T:
        """Run `work` in the first memory mode that fits. Raises `OutOfMemory`."""
        for mode, smaller in zip(modes, [*modes[1:], None], strict=True):
            try:
                return work(mode)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            if self._models.active is None:
                break  # reading a model takes the same memory in every mode
            self._models.active.move("cpu")
            free_memory(self.device)
            if smaller:
                logger.warning(
                    'Out of memory in memory mode "%s"; trying "%s".', mode.name, smaller.name
                )
        raise self._out_of_memory(requests, modes)

    def unload(self) -> None:
        """Release the memory of all models. The next image reads its model again."""
        self._models.clear()
        free_memory(self.device)

    def memory_bytes(self) -> int:
        """Return the memory that torch holds on the GPU, in bytes; 0 on the CPU."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    @torch.inference_mode()
    def _render(self, tasks: Sequence[RenderTask], memory: MemoryMode) -> list[GenerationResult]:
        """Run all stages. What the requests share is read from the first of them."""
        reporter = ProgressReporter(tasks)
        stopwatch = Stopwatch(self.device)

        reporter.stage("load")
        with stopwatch.stage("load"):
            model = self._models.get(self._entry(tasks[0].request))
            model.text.set_embeddings(self._embeddings.read())
            requests = [_resolve(task, model) for task in tasks]
            shared = requests[0]
            mode = MODES[shared.mode]
            check_mode(shared, model)
            text_loras, loras = self._lora_patches(shared)
            patches = (*loras, *mode.patches(model, shared))
            # read here, so that missing or damaged files are reported before the work
            mode.decoders(model)
            encoder = read_encoder(shared, model, self.device)
            enlarger = self._enlarger(shared, mode, model, reporter)
        is_single = len(tasks) == 1 and len(shared.images) == mode.images
        if not is_single and any(one.sampler == ADAPTIVE for one in shared.passes):
            return self._render_alone(tasks, requests, memory)
        passes = plan_passes(requests, model)
        batch = Batch(
            tasks, passes, model, mode, Residency(self.device, memory), reporter, stopwatch
        )

        guidances = self._encode_prompts(batch, text_loras)
        edits, guidances = self._encode_images(batch, guidances, encoder)
        first_latents, kept = start_latents(edits, self.device)
        end_sigma = model.process.end_sigma(shared.layerdiffuse_stop_at)
        schedule = PatchSchedule(model, patches, loras, end_sigma)
        decoding = Decoding(model, shared, memory, stopwatch)
        latents = self._run_pass(batch, passes[0], guidances, schedule, first_latents, kept)
        for before, run in pairwise(passes):
            if enlarger:
                resizing = Resizing.of(shared, before.canvas, run.canvas)
                latents = self._enlarge(enlarger, decoding, latents, resizing, reporter)
            latents = self._run_pass(batch, run, guidances, schedule, latents)

        composed = self._compose(requests, mode, decoding, latents, reporter)
        notes = [model.patchers["denoiser"].notes, model.patchers["text"].notes]
        notes += [enlarger.warnings] if enlarger else []
        notes.append(mode.warnings(shared))
        warnings = tuple(dict.fromkeys(chain.from_iterable(notes)))
        layers = iter(composed)
        return [
            _result(batch, request, edit, list(islice(layers, len(request.images))), warnings)
            for request, edit in zip(requests, edits or [None] * len(requests), strict=True)
        ]

    def _render_alone(
        self,
        tasks: Sequence[RenderTask],
        requests: Sequence[ResolvedRequest],
        memory: MemoryMode,
    ) -> list[GenerationResult]:
        """Generate each image or set alone, because the sampler adapts its levels to it."""
        results: list[GenerationResult] = []
        for task, request in zip(tasks, requests, strict=True):
            size = MODES[request.mode].images
            firsts = range(0, len(request.images), size)
            parts = [
                self._render(
                    [
                        replace(
                            task,
                            images=request.images[first : first + size],
                            on_progress=partial(_report_part, task, number, len(firsts)),
                            is_cancelled=lambda: all(one.is_cancelled() for one in tasks),
                        )
                    ],
                    memory,
                )[0]
                for number, first in enumerate(firsts)
            ]
            images = [image for part in parts for image in part.images]
            seconds = {
                stage: sum(part.seconds.get(stage, 0.0) for part in parts)
                for stage in parts[0].seconds
            }
            results.append(replace(parts[0], request=request, images=images, seconds=seconds))
        return results

    def _encode_prompts(
        self, batch: Batch, loras: tuple[PatchSpec, ...]
    ) -> dict[int, list[Guidance]]:
        """Encode the prompts of all passes.

        Returns:
            Guidance of each request, by number of the pass.
        """
        model, memory = batch.model, batch.residency.mode
        requests = [request for run in batch.passes for request in run.requests]
        batch.reporter.stage("text")
        readers = [] if is_encoded(requests, loras, model) else [model.modules["text"]]
        encoding = batch.residency.of(*readers, keep=memory.keep_text)
        with batch.stopwatch.stage("text"), encoding:
            patch_text(loras, model)
            guidances = [
                read_prompts(request, model.text, batch.reporter.check) for request in requests
            ]
        remaining = iter(guidances)
        return {run.number: list(islice(remaining, len(run.requests))) for run in batch.passes}

    def _encode_images(
        self,
        batch: Batch,
        guidances: dict[int, list[Guidance]],
        encoder: TransparentEncoder | None,
    ) -> tuple[list[Edit], dict[int, list[Guidance]]]:
        """Encode the images to change, and the conditions at the size of each pass.

        Returns:
            The image of each request, if it changes one, and guidances with conditions.
        """
        model, first = batch.model, batch.passes[0]
        needs_vae = first.shared.uses_init or batch.mode.encodes_inputs
        if not needs_vae and model.inpaint_weight is None:
            return [], guidances
        vae = model.modules["vae"]
        encoding = batch.residency.of(vae, keep=batch.residency.mode.keep_unet)
        reporting = batch.reporter.within("inputs", [vae])
        edits: list[Edit] = []
        conditioned: dict[int, list[Guidance]] = {}
        with batch.stopwatch.stage("inputs"), encoding, reporting:
            for request, task in zip(first.requests, batch.tasks, strict=True):
                batch.reporter.check()  # fitting a large image takes a while
                if request.uses_init:
                    edits.append(encode_edit(model, encoder, request, task.inputs, first.canvas))
            for run in batch.passes:
                blank = None if edits else inpaint_condition(model, run.canvas)
                own = [edit.condition for edit in edits] or [blank] * len(run.requests)
                conditioned[run.number] = [
                    replace(
                        guidance,
                        condition=batch.mode.condition(model, request, task.inputs),
                        model_condition=condition,
                    )
                    for guidance, request, task, condition in zip(
                        guidances[run.number], run.requests, batch.tasks, own, strict=True
                    )
                ]
        return edits, conditioned

    def _enlarger(
        self,
        request: ResolvedRequest,
        mode: Mode,
        model: DiffusionModel,
        reporter: ProgressReporter,
    ) -> Enlarger | None:
        """Read the upscaler of a request, None without a second pass."""
        if not request.uses_hires:
            return None
        return Enlarger.load(
            request, mode, model, self._models_dir, self.device, partial(reporter.repeat, "upscale")
        )

    def _enlarge(
        self,
        enlarger: Enlarger,
        decoding: Decoding,
        latents: Tensor,
        resizing: Resizing,
        reporter: ProgressReporter,
    ) -> Tensor:
        """Return the latents of the first pass at the size of the second."""
        networks, memory = enlarger.networks(decoding.model), decoding.memory
        residency = Residency(self.device, memory).of(*networks, keep=memory.keep_unet)
        # the decode of the first pass counts as enlargement
        inner = replace(decoding, stopwatch=Stopwatch(self.device))
        stage = decoding.stopwatch.stage("upscale")
        with stage, residency, reporter.within("upscale", networks):
            return enlarger.enlarge(inner, latents, resizing)

    def _run_pass(
        self,
        batch: Batch,
        run: Pass,
        guidances: Mapping[int, Sequence[Guidance]],
        schedule: PatchSchedule,
        latents: Tensor | None = None,
        kept: KeptLatents | None = None,
    ) -> Tensor:
        """Denoise the latents of a pass (B, C, h, w).

        Args:
            batch: The batch.
            run: The pass.
            guidances: Guidance of each request, by number of the pass.
            schedule: Patches over the noise levels.
            latents: Clean latents that the pass changes. None: it starts from pure noise.
            kept: Part of the latents that stays as it is.
        """
        model, memory, canvas = batch.model, batch.residency.mode, run.canvas
        denoiser = Denoiser(
            model,
            guidances[run.number],
            canvas.full_width,
            canvas.full_height,
            memory,
            batch.reporter.check,
            (run.shared.options.crop_top, run.shared.options.crop_left),
            together=batch.mode.images,
            kept=kept,
        )
        # where attention is shared, requests of one batch have the same input images
        inputs = batch.tasks[0].inputs
        sharing = batch.mode.sharing(model, run.shared, inputs, schedule.loras)
        schedule = replace(schedule, sharing=sharing)
        start, noise = self._noise(run, model.latent, latents)
        batch.reporter.stage("sample")
        denoising = batch.residency.of(model.modules["denoiser"], keep=memory.keep_unet)
        with batch.stopwatch.stage("sample"), denoising, noise as source:
            return self._sample(batch, run, denoiser, schedule, start, source)

    def _compose(
        self,
        requests: Sequence[ResolvedRequest],
        mode: Mode,
        decoding: Decoding,
        latents: Tensor,
        reporter: ProgressReporter,
    ) -> list[list[Layer]]:
        """Return the layers of each latent (B, C, h, w).

        After an out-of-memory error, sampled latents and finished layers are kept.
        """
        composed: list[list[Layer]] = []
        decoders = mode.decoders(decoding.model)

        def compose(memory: MemoryMode) -> None:
            attempt = replace(decoding, memory=memory)
            with Residency(self.device, memory).of(*decoders, keep=memory.keep_unet):
                for latent in latents[len(composed) :]:
                    with reporter.within("decode", decoders):
                        composed.append(mode.compose(attempt, latent[None], len(composed)))

        self._with_less_memory(requests, modes_down_from(decoding.memory), compose)
        return composed

    def _entry(self, request: GenerationRequest) -> ModelEntry:
        entries = catalog.find_models(self._models_dir)
        name = request.model or self._default_model
        entry = catalog.resolve_model(name, entries, self._models_dir)
        if request.uses_layerdiffuse:
            catalog.check_layerdiffuse_mode(entry, request.mode)
        return entry

    def _load(self, entry: ModelEntry) -> DiffusionModel:
        model = FAMILIES[entry.family](entry, self.precision, self._models_dir)
        # recordings hold addresses: not for a denoiser that leaves the device after each image
        if self.memory.keep_unet:
            model.accelerate(self._acceleration)
        return model

    def _noise(
        self, run: Pass, spec: LatentSpec, latents: Tensor | None
    ) -> tuple[Tensor, AbstractContextManager[Noise]]:
        """Return the first latents of a pass and the sampler's source of noise.

        As in AUTOMATIC1111, each pass has the first numbers of the seeds. The noise seed delta
        changes fresh noise, but no Brownian path.

        Args:
            run: The pass.
            spec: Shape of the latents.
            latents: Clean latents that the pass changes. None: it starts from pure noise.
        """
        requests, shared, sampler = run.requests, run.shared, SAMPLERS[run.shared.sampler]
        shape = run.latent_shape(spec)
        seeds = [image.seed for request in requests for image in request.images]
        delta = shared.options.noise_seed_delta
        generators: list[ImageGenerator] = []
        start: list[Tensor] = []
        for request in requests:
            own, variations = (
                [ImageGenerator(seed, request.noise, self.device) for seed in seeds]
                for seeds in zip(*request.images, strict=True)
            )
            start.append(initial_noise(own, shape, variations, request.subseed_strength))
            generators += own
        first = sampler.add_noise(latents, torch.cat(start), run.levels)
        if delta:
            generators = [ImageGenerator(seed + delta, shared.noise, self.device) for seed in seeds]
        if sampler.noise == "brownian":
            eta = sampler.choose_eta(shared.options.eta)
            # on the CPU a thread beside the denoiser's costs more than it saves
            is_threaded = self.device.type != "cpu"
            ahead = (
                brownian_intervals(shared.sampler, run.levels.sigmas, eta) if is_threaded else ()
            )
            source = BrownianNoise(seeds, shape, run.levels.span, shared.noise, self.device, ahead)
            return first, source

        def fresh(_from: float, _to: float) -> Tensor:
            return torch.stack([generator.randn(shape) for generator in generators])

        return first, nullcontext(fresh)

    def _sample(
        self,
        batch: Batch,
        run: Pass,
        denoiser: Denoiser,
        schedule: PatchSchedule,
        x: Tensor,
        noise: Noise,
    ) -> Tensor:
        """Denoise the first latents `x` (B, C, h, w) of a pass to clean latents."""
        firsts = [0, *accumulate(guidance.images for guidance in denoiser.guidances)]

        calls, steps = count(), sum(one.steps for one in batch.passes)
        steps_before = sum(one.steps for one in batch.passes[: run.number])
        sampler = SAMPLERS[run.shared.sampler]

        def denoise(x: Tensor, sigma: float) -> Tensor:
            # schedules of prompts count calls
            return denoiser(x, sigma, next(calls), patched=schedule.apply(sigma))

        def on_step(step: int, _x: Tensor, clean: Tensor) -> None:
            for task, first in zip(batch.tasks, firsts, strict=False):
                preview = (
                    self._preview(denoiser.model, clean[first : first + 1])
                    if task.previews
                    else None
                )
                task.on_progress(Progress("sample", steps_before + step, steps, preview))

        eta = sampler.choose_eta(run.shared.options.eta)
        sampling = Run(denoise, noise, on_step, denoiser.unconditional, eta)
        latents = sample(run.shared.sampler, sampling, x, run.levels.sigmas)
        if denoiser.kept:
            latents = denoiser.kept.restore(latents)
        return check_finite(latents, "the denoiser")

    def _preview(self, model: DiffusionModel, clean: Tensor) -> NDArray[np.uint8]:
        """Decode a latent (1, C, h, w), averaged to 32 cells a side, to small RGB."""
        shrink = max(1, max(clean.shape[-2:]) // PREVIEW_LATENT_SIDE)
        small = torch.nn.functional.avg_pool2d(clean, shrink)
        with Residency(self.device, self.memory).of(model.modules["vae"], keep=True):
            return to_opaque(model.decode(small))[..., :3]

    def _lora_patches(self, request: GenerationRequest) -> list[tuple[PatchSpec, ...]]:
        """Return the LoRAs of a request for the text encoders, and for the denoiser.

        Raises:
            InvalidRequest: A LoRA is missing.
        """
        files = [
            PatchFile.at(catalog.find_lora(self._models_dir, lora.name)) for lora in request.loras
        ]
        weights = [lora.weights for lora in request.loras]
        return [
            tuple((file, pair[part]) for file, pair in zip(files, weights, strict=True))
            for part in range(2)
        ]

    def _out_of_memory(
        self, requests: Sequence[GenerationRequest], tried: Sequence[MemoryMode]
    ) -> OutOfMemory:
        """Return an error with the memory that was needed and available, and what to do."""
        model = self._models.active
        if model is None:
            return _no_memory_for_model()
        mode = mode_for(model.entry.family, requests[0].mode)
        first = requests[0].resolve(model.defaults)
        images = sum(request.batch_size for request in requests)
        smallest = tried[-1]
        # what replaces them is for another number of images
        restore_attention(cast(UNet, model.modules["denoiser"]))
        try:
            networks = Networks.of(model, mode.has_alpha)
            width, height = first.largest_size
            together = len(mode.layers)
            needed = count_memory(networks, width, height, images, smallest, self.device, together)
        except Exception as error:  # the decoder is read on first use
            if not is_out_of_memory(error):
                raise
            return _no_memory_for_model()
        peak = max(stage.total for stage in needed.values()) / GIB
        available = ""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            available = f" and the GPU has {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        attempts = "; larger modes were tried, too" if len(tried) > 1 else ""
        return OutOfMemory(
            f"{width}x{height}, batch of {images}, needs about {peak:.1f} GiB in "
            f'memory mode "{smallest.name}"{available}{attempts}.',
            hint="Request a smaller image or batch, or close other programs on the GPU"
            + (", or start with --memory low." if smallest.name != "low" else "."),
        )


def create_engine(options: dict[str, Any]) -> LocalEngine:
    """Build the engine from plain options: keywords of `LocalEngine`, paths as text."""
    values: dict[str, Any] = {**options, "models_dir": Path(options["models_dir"])}
    if values.get("embeddings_dir"):
        values["embeddings_dir"] = Path(values["embeddings_dir"])
    return LocalEngine(**values)


def _report_part(task: RenderTask, number: int, count: int, progress: Progress) -> None:
    """Report the progress of one image of a task as part of the whole task."""
    task.on_progress(progress.within(number, count))


def _resolve(task: RenderTask, model: DiffusionModel) -> ResolvedRequest:
    """Return a request with the model's defaults and its family's mode."""
    request = task.request.resolve(model.defaults, task.images)
    mode = mode_for(model.entry.family, request.mode)
    return request.model_copy(update={"mode": mode.name})


def _no_memory_for_model() -> OutOfMemory:
    return OutOfMemory(
        "there is not enough memory to read the model.",
        hint="Close other programs, set spare_model_gb to 0 if it is not, or use a model "
        "file of 16 bit.",
    )


def _result(
    batch: Batch,
    request: ResolvedRequest,
    edit: Edit | None,
    composed: Sequence[Sequence[Layer]],
    warnings: tuple[str, ...],
) -> GenerationResult:
    """Return the result of a request, from the layers of each of its images."""
    model, canvas = batch.model, batch.passes[-1].canvas

    def finish(layer: Layer) -> RgbaImage:
        batch.reporter.check()
        rgba = canvas.crop(layer.rgba)
        return edit.finish(rgba, layer) if edit else rgba

    images = [
        GeneratedImage(finish(layer), *seeds, layer.role)
        for layers, seeds in zip(composed, request.images, strict=True)
        for layer in layers
    ]
    seconds = batch.stopwatch.seconds
    return GenerationResult(request, model.entry.name, model.short_hash, images, seconds, warnings)
