"""The one way that jobs become stored images.

The engine process, the Runpod worker and the command `generate` use it.
The engine is passed in, so that nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from alphalayer.core.errors import (
    AlphalayerError,
    Cancelled,
    EngineFailed,
    FileMissing,
    OutOfMemory,
    StorageFailed,
)
from alphalayer.core.job import ImageRef, Job, JobProgress, JobResult
from alphalayer.core.modes import MODES, InputRole
from alphalayer.core.request import GenerationRequest, ImageInput, ImageSeed
from alphalayer.engine.base import (
    Engine,
    GenerationResult,
    Progress,
    RenderTask,
    RgbaImage,
)
from alphalayer.engine.threads import configure_threads
from alphalayer.images import codecs, postprocess
from alphalayer.observability.logging import describe_error
from alphalayer.storage import StoredFile
from alphalayer.worker.layers import Described, stack_layers

logger = logging.getLogger(__name__)

ENGINE = "alphalayer.engine.pipeline:create_engine"
Inputs = dict[InputRole, RgbaImage]


class ImageFiles(Protocol):
    """The part of a `Storage` that rendering needs."""

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
        """Write a file. See `alphalayer.storage.Storage`."""
        ...

    async def open(self, key: str) -> StoredFile:
        """Open a file. See `alphalayer.storage.Storage`."""
        ...


@dataclass(frozen=True)
class Generated:
    """What was generated for a job, and the input images that it was generated from."""

    results: Sequence[GenerationResult]
    """Results of its iterations, and of the stages of each."""
    inputs: Inputs


@dataclass(frozen=True)
class Renderer:
    """An engine, the storage of its images, and the receiver of its progress."""

    engine: Engine
    files: ImageFiles
    on_progress: Callable[[Job, JobProgress], None] = lambda _job, _progress: None
    is_cancelled: Callable[[Job], bool] = lambda _job: False

    def run(self, job: Job) -> JobResult:
        """Generate the images of one job and store them.

        Raises:
            AlphalayerError: See `generate` and `store`.
        """
        return self.store(job, self.generate([job])[0])

    def generate(self, jobs: Sequence[Job]) -> list[Generated]:
        """Generate the images of one job, or of several compatible jobs together.

        Args:
            jobs: Jobs with seeds. Several jobs need the same `batch_key`.

        Returns:
            What was generated for each job.

        Raises:
            FileMissing: An input image is not in the storage.
            StorageFailed: An input image cannot be read.
            Cancelled: The job was cancelled.
            AlphalayerError: See `Engine.render`.
        """
        if len(jobs) == 1:
            return [self._run_stages(jobs[0])]
        inputs = [self._load_inputs(job) for job in jobs]
        tasks = [
            self._task(
                job, job.spec.generation, job.spec.seeds, own, partial(self._report, job, 0, 1)
            )
            for job, own in zip(jobs, inputs, strict=True)
        ]
        results = self.engine.render(tasks)
        return [Generated([result], own) for result, own in zip(results, inputs, strict=True)]

    def _run_stages(self, job: Job) -> Generated:
        """Generate all iterations of a job. Layers become input images of later stages."""
        spec, inputs, results = job.spec, self._load_inputs(job), list[GenerationResult]()
        parts = spec.iterations * len(spec.requests)
        for iteration, seeds in enumerate(spec.batches()):
            sets = [Inputs(inputs) for _ in range(spec.sets)]
            for stage, request in enumerate(spec.requests):
                if self.is_cancelled(job):
                    raise Cancelled("cancelled.")
                part = iteration * len(spec.requests) + stage
                report = partial(self._report, job, part, parts)
                if stage == 0:
                    tasks = [self._task(job, request, seeds, inputs, report)]
                else:
                    firsts = seeds[:: len(seeds) // spec.sets]
                    # the first task reports the progress of all
                    reports = [report, *[None] * (spec.sets - 1)]
                    tasks = [
                        self._task(job, request, (seed,), layers, one)
                        for seed, layers, one in zip(firsts, sets, reports, strict=True)
                    ]
                results += (made := self._render(tasks))
                images = iter([image.rgba for result in made for image in result.images])
                for layers in sets:
                    layers |= {role: next(images) for role in MODES[request.mode].layer_roles}
        return Generated(results, inputs)

    def _render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        """Generate tasks together, or one by one if the memory is too small for that.

        The engine uses a smaller memory mode only for one task.
        """
        try:
            return self.engine.render(tasks)
        except OutOfMemory:
            if len(tasks) == 1:
                raise
        return [result for task in tasks for result in self.engine.render([task])]

    def store(self, job: Job, generated: Generated) -> JobResult:
        """Finish, encode and store the images of a job.

        Raises:
            Cancelled: The job was cancelled.
            StorageFailed: An image cannot be written.
        """
        self.on_progress(job, JobProgress(stage="store"))
        start = time.perf_counter()
        results = generated.results
        first = results[0]
        if job.spec.stores_layers:
            images = stack_layers(job.spec, results, generated.inputs)
        else:
            images = [(one, result.infotext(one)) for result in results for one in result.images]
        stored = tuple(
            self._store_image(job, job.file_name(index), image)
            for index, image in enumerate(images)
        )
        return JobResult(
            images=stored,
            settings=first.request.settings,
            model_name=first.model_name,
            model_hash=first.model_hash,
            seconds={**_sum_stages(results), "store": round(time.perf_counter() - start, 4)},
            warnings=tuple(
                dict.fromkeys(
                    warning
                    for result in results
                    for warning in (*result.request.warnings, *result.warnings)
                )
            ),
        )

    def _store_image(self, job: Job, key: str, described: Described) -> ImageRef:
        image, infotext = described
        if self.is_cancelled(job):
            raise Cancelled("cancelled.")
        rgba = postprocess.finish(image.rgba, job.spec.output)
        data = codecs.encode(rgba, job.spec.output.format, infotext)
        self.files.put(key, data)
        height, width = rgba.shape[:2]
        return ImageRef(
            key=key,
            seed=image.seed,
            subseed=image.subseed,
            width=width,
            height=height,
            size_bytes=len(data),
            role=image.role,
            is_opaque=bool(rgba[..., 3].min() == codecs.OPAQUE_ALPHA)
            if job.spec.stores_layers
            else None,
        )

    def _load_inputs(self, job: Job) -> Inputs:
        return {
            image.role: _decode_input(image, self.files) for image in job.spec.generation.inputs
        }

    def _task(
        self,
        job: Job,
        request: GenerationRequest,
        seeds: Sequence[ImageSeed],
        inputs: Inputs,
        report: Callable[[Progress], None] | None,
    ) -> RenderTask:
        """Return a task of a job. Without `report` another task reports for both."""
        return RenderTask(
            request,
            tuple(seeds),
            report or (lambda _: None),
            partial(self.is_cancelled, job),
            job.spec.previews and report is not None,
            {image.role: inputs[image.role] for image in request.inputs},
        )

    def _report(self, job: Job, part: int, parts: int, progress: Progress) -> None:
        progress = progress.within(part, parts)
        preview = None
        if progress.preview is not None:
            # a full disk ends a job at its image, not at a preview
            with contextlib.suppress(StorageFailed):
                data = codecs.encode_preview(progress.preview)
                self.files.put(job.preview_name, data, replace=True)
                preview = job.preview_name
        self.on_progress(
            job,
            JobProgress(
                stage=progress.stage, step=progress.step, steps=progress.steps, preview=preview
            ),
        )


def load_engine(path: str, options: dict[str, Any]) -> Engine:
    """Create the engine that "package.module:function" names.

    Processes import torch by this function alone, after their threads are configured.
    """
    configure_threads()
    module, _, name = path.partition(":")
    # collections would search the many objects of torch for garbage, and there is none
    gc.disable()
    try:
        create_engine = getattr(importlib.import_module(module), name)
    finally:
        gc.enable()
    return create_engine(options)


def to_public_error(error: Exception) -> AlphalayerError:
    """Return an error for clients. Log the traceback of an unexpected one."""
    if isinstance(error, AlphalayerError):
        return error
    logger.error("The engine failed.", exc_info=error)
    # the text of an OSError holds paths of this machine
    reason = error.strerror or "" if isinstance(error, OSError) else describe_error(error)
    return EngineFailed(
        f"{type(error).__name__}: {reason[:300]}".removesuffix(": "),
        hint="The service's log has the details; please report it.",
    )


def _decode_input(image: ImageInput, files: ImageFiles) -> RgbaImage:
    async def read() -> bytes:
        stored = await files.open(image.file_name)
        return b"".join([chunk async for chunk in stored.chunks])

    try:
        return codecs.decode(asyncio.run(read()))[0]
    except FileMissing:
        raise FileMissing(
            f'there is no input image "{image.file_name}".',
            hint="Upload it again.",
            field=image.role,
        ) from None


def _sum_stages(results: Sequence[GenerationResult]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for result in results:
        for stage, duration in result.seconds.items():
            seconds[stage] = round(seconds.get(stage, 0.0) + duration, 4)
    return seconds
