"""The engine process: draws, encodes and stores what it is sent, and reports. Knows the engine and the storage, nothing of queues.

Drawing has the main thread; encoding and storing have another, so that the device does not wait for them. What nobody foresaw while it
draws ends the process: after some errors of a GPU every later call fails, too, and only a new process can draw again.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import IO, Any

from structlog.contextvars import bind_contextvars

from alphalayer.core.errors import AlphalayerError, Cancelled, EngineFailed, StorageFailed
from alphalayer.core.job import ImageRef, Job, JobResult
from alphalayer.core.request import ImageSeed
from alphalayer.engine.base import Engine, GenerationResult, Progress, RenderTask
from alphalayer.images import codecs, postprocess
from alphalayer.jobs.base import MAX_STARTS
from alphalayer.observability.logging import configure_logging
from alphalayer.storage import Storage
from alphalayer.storage.objects import open_storage
from alphalayer.worker.messages import read_message, write_message


class EngineProcess:
    """Serves one supervisor over two streams of lines."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]):
        self._reader = reader
        self._writer = writer
        self._write_lock = threading.Lock()
        self._jobs: queue.Queue[list[Job]] = queue.Queue()
        self._cancelled: set[str] = set()
        self._memory_bytes: Callable[[], int] = lambda: 0
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._storing: list[Future[None]] = []

    def serve(self) -> None:
        """Open the engine, then draw until the input ends; returns if it cannot be opened or go on, after it said why."""
        opening = read_message(self._reader.readline())
        configure_logging(**opening["logs"])
        # stands in every line, as in those of its supervisor
        bind_contextvars(engine=opening["name"])
        try:
            engine: Engine = load_attribute(opening["engine"])(opening["options"])
            self._memory_bytes = engine.memory_bytes
            storage = open_storage(opening["storage"])
            threading.Thread(target=self._read, name="read", daemon=True).start()
            engine.warm_up()
            self._send("ready", batch_pixels=engine.batch_pixels, device=engine.description)
            while True:
                self._run(engine, storage, self._jobs.get())
        except Exception as error:
            self._send("failed", id=None, error=to_public_error(error).to_dict())
            # what is drawn is not lost
            self._encoder.shutdown()

    def _read(self) -> None:
        for line in self._reader:
            message = read_message(line)
            if message["kind"] == "run":
                self._jobs.put([Job.model_validate(job) for job in message["jobs"]])
            elif message["kind"] == "cancel":
                self._cancelled.add(message["id"])
        # the supervisor is gone: nobody wants the picture, and the journal knows that the job is not over
        os._exit(0)

    def _run(self, engine: Engine, storage: Storage, jobs: list[Job]) -> None:
        for job in jobs:
            self._send("started", id=job.id)
        self._deliver(engine, storage, jobs)

    def _deliver(self, engine: Engine, storage: Storage, jobs: list[Job]) -> None:
        """Draw and store a batch; one that fails is drawn again job by job, so that each answers for itself.

        Raises what is no `AlphalayerError`. Who is to blame, the device or the job, is not known: jobs that have starts left go back
        to the queue with the process, and are drawn again, each alone. One that would be given up there is over, with this error.
        """
        try:
            drawn = self._render(engine, storage, jobs)
        except AlphalayerError as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
            else:
                for job in jobs:
                    self._deliver(engine, storage, [job])
            return
        except Exception as error:
            if len(jobs) == 1 and jobs[0].starts >= MAX_STARTS - 1:
                self._fail(jobs[0], error)
            raise
        # pictures that wait to be stored take memory: those of one batch may, while the next one is drawn
        wait(self._storing)
        self._storing = [
            self._encoder.submit(self._store, storage, job, results)
            for job, results in zip(jobs, drawn, strict=True)
        ]

    def _render(
        self, engine: Engine, storage: Storage, jobs: list[Job]
    ) -> list[list[GenerationResult]]:
        """The results of each job: one a round."""
        if len(jobs) > 1:
            return [
                [each]
                for each in engine.render(
                    [self._task(storage, job, job.spec.seeds) for job in jobs]
                )
            ]
        rounds = [(job, seeds, i) for job in jobs for i, seeds in enumerate(job.spec.batches())]
        return [[engine.render([self._task(storage, *each)])[0] for each in rounds]]

    def _task(
        self, storage: Storage, job: Job, seeds: tuple[ImageSeed, ...], iteration: int = 0
    ) -> RenderTask:
        def on_progress(of_one: Progress) -> None:
            progress = of_one.within(iteration, job.spec.iterations)
            key = None
            if progress.preview is not None:
                # without room for a preview the job goes on; it fails when there is none for the picture
                with contextlib.suppress(StorageFailed):
                    storage.put(
                        job.preview_name, codecs.encode_preview(progress.preview), replace=True
                    )
                    key = job.preview_name
            self._send("progress", id=job.id, progress=_progress_json(progress, key))

        return RenderTask(
            job.spec.generation,
            seeds,
            on_progress,
            lambda: job.id in self._cancelled,
            job.spec.previews,
        )

    def _store(self, storage: Storage, job: Job, results: list[GenerationResult]) -> None:
        """Encode and store the pictures of a job; only then is it done."""
        try:
            self._send("progress", id=job.id, progress={"stage": "store"})
            outcome = store_pictures(storage, job, results, lambda: job.id in self._cancelled)
            self._send(
                "done",
                id=job.id,
                result=outcome.model_dump(mode="json"),
                memory_bytes=self._memory_bytes(),
            )
        except Exception as error:
            self._fail(job, error)
        finally:
            self._cancelled.discard(job.id)

    def _fail(self, job: Job, error: Exception) -> None:
        self._cancelled.discard(job.id)
        self._send("failed", id=job.id, error=to_public_error(error).to_dict())

    def _send(self, kind: str, **fields: Any) -> None:
        with self._write_lock:
            self._writer.write(write_message(kind, **fields))
            self._writer.flush()


def store_pictures(
    storage: Storage,
    job: Job,
    results: list[GenerationResult],
    is_cancelled: Callable[[], bool] = lambda: False,
) -> JobResult:
    """Finish, encode and store every picture of a job's results.

    Raises:
        Cancelled: nobody wants them any more.
        StorageFailed: see `alphalayer.storage`.
    """
    output = job.spec.output
    references: list[ImageRef] = []
    first = results[0]
    for image in (image for result in results for image in result.images):
        if is_cancelled():
            raise Cancelled("cancelled.")
        rgba = postprocess.finish(image.rgba, output)
        data = codecs.encode(rgba, output.format, first.infotext(image))
        key = job.file_name(len(references))
        storage.put(key, data)
        height, width = rgba.shape[:2]
        references.append(
            ImageRef(
                key=key,
                seed=image.seed,
                subseed=image.subseed,
                width=width,
                height=height,
                size_bytes=len(data),
                role=image.role,
            )
        )
    seconds: dict[str, float] = {}
    for result in results:
        for stage, spent in result.seconds.items():
            seconds[stage] = round(seconds.get(stage, 0.0) + spent, 4)
    return JobResult(
        images=tuple(references),
        settings=first.request.settings,
        model_name=first.model_name,
        model_hash=first.model_hash,
        seconds=seconds,
    )


def load_attribute(path: str) -> Any:
    """The object that "package.module:name" names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def to_public_error(error: Exception) -> AlphalayerError:
    """The error itself if it is meant for users, else one that says where to look; what was not foreseen is printed whole."""
    if isinstance(error, AlphalayerError):
        return error
    traceback.print_exception(error)
    return EngineFailed(
        f"{type(error).__name__}: {str(error)[:300]}",
        hint="The service's log has the details; please report it.",
    )


def _progress_json(progress: Progress, preview: str | None) -> dict[str, Any]:
    return {
        "stage": progress.stage,
        "step": progress.step,
        "steps": progress.steps,
        "preview": preview,
    }


def main() -> None:
    """Entry of `python -m alphalayer.worker.engine_process`; standard output belongs to the protocol, prints go to standard error."""
    writer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    EngineProcess(sys.stdin.buffer, writer).serve()
    # not by sys.exit: the thread that reads holds standard input, and Python aborts when it cannot take it back
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
