"""Engine process: renders the jobs that its supervisor sends, and reports.

It knows the engine and the storage, but no queue.
The main thread generates. A second thread encodes and stores, so that the device does not wait.
An unexpected error ends the process. After some GPU errors every later call fails as well, and
only a new process can continue.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import IO

from structlog.contextvars import bind_contextvars

from alphalayer.core.errors import AlphalayerError, Cancelled, EngineFailed
from alphalayer.core.job import Job, JobProgress
from alphalayer.engine.base import Engine
from alphalayer.jobs.base import MAX_STARTS
from alphalayer.observability.logging import configure_logging
from alphalayer.storage.objects import open_storage
from alphalayer.worker.messages import (
    Cancel,
    Command,
    Done,
    Failed,
    ProgressReport,
    Ready,
    Render,
    Report,
    Started,
    Stopped,
    read_command,
    read_job_ids,
    read_open,
    write_report,
)
from alphalayer.worker.render import (
    Generated,
    ImageFiles,
    Renderer,
    load_engine,
    to_public_error,
)


class EngineProcess:
    """Server of one supervisor over two streams of lines."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]):
        self._reader = reader
        self._writer = writer
        self._write_lock = threading.Lock()
        self._batches: queue.Queue[tuple[Job, ...]] = queue.Queue()
        self._waiting: set[str] = set()
        """Jobs of `_batches` that are neither started nor cancelled."""
        self._waiting_lock = threading.Lock()
        self._cancelled: set[str] = set()
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._storing: list[Future[None]] = []

    def serve(self) -> None:
        """Open the engine and render until the input ends.

        If the engine cannot be opened or cannot continue, report why and return.
        """
        settings = read_open(self._reader.readline())
        configure_logging(**settings.logs)
        # part of every log line, like in the supervisor
        bind_contextvars(engine=settings.name)
        try:
            engine = load_engine(settings.engine, settings.options)
            renderer = self.create_renderer(engine, open_storage(settings.storage))
            threading.Thread(target=self._read, name="read", daemon=True).start()
            engine.warm_up()
            self._send(Ready(batch_pixels=engine.batch_pixels, device=engine.description))
            while True:
                self.run_next(renderer)
        except Exception as error:
            self._send(Stopped(error=to_public_error(error)))
            # finished images are still stored
            self._encoder.shutdown()

    def create_renderer(self, engine: Engine, files: ImageFiles) -> Renderer:
        """Return a renderer whose progress is sent to the supervisor."""
        return Renderer(engine, files, self._report, lambda job: job.id in self._cancelled)

    def run_next(self, renderer: Renderer) -> None:
        """Render the next batch. If none comes in time, unload the models of the engine."""
        engine = renderer.engine
        try:
            jobs = self.next_batch(engine.unload_after_s or None)
        except queue.Empty:
            engine.unload()
            return
        if jobs:
            self.run(renderer, jobs)

    def run(self, renderer: Renderer, jobs: tuple[Job, ...]) -> None:
        """Render a batch. Its images are stored while the next batch is generated."""
        for job in jobs:
            self._send(Started(id=job.id))
        self._render(renderer, jobs)

    def receive(self, command: Command) -> None:
        """Take a command. A job that has not started is cancelled at once."""
        match command:
            case Render(jobs=jobs):
                with self._waiting_lock:
                    self._waiting.update(job.id for job in jobs)
                self._batches.put(jobs)
            case Cancel(id=job_id):
                if self._leave_queue(job_id):
                    self._send(Failed(id=job_id, error=Cancelled("cancelled.")))
                else:
                    self._cancelled.add(job_id)

    def _refuse(self, line: bytes, error: ValueError) -> None:
        """Report the jobs of a line that cannot be read as failed."""
        problem = EngineFailed(f"the engine process cannot read the job: {error}.")
        for job_id in read_job_ids(line):
            self._send(Failed(id=job_id, error=problem))

    def next_batch(self, timeout_s: float | None = None) -> tuple[Job, ...]:
        """Wait for the next batch, and return its jobs that were not cancelled.

        Raises:
            queue.Empty: None came in `timeout_s` seconds.
        """
        batch = self._batches.get(timeout=timeout_s)
        return tuple(job for job in batch if self._leave_queue(job.id))

    def _leave_queue(self, job_id: str) -> bool:
        """Remove a job that waits. Return whether it was waiting."""
        with self._waiting_lock:
            is_waiting = job_id in self._waiting
            self._waiting.discard(job_id)
            return is_waiting

    def _read(self) -> None:
        for line in self._reader:
            try:
                self.receive(read_command(line))
            except ValueError as error:
                # the last line may be cut off, and a job may be of a later version
                self._refuse(line, error)
        # without the supervisor the result has no receiver, and the journal keeps the job
        os._exit(0)

    def _render(self, renderer: Renderer, jobs: tuple[Job, ...]) -> None:
        """Render a batch. If it fails, render its jobs one by one.

        An unexpected error is raised: the device or a job may be its cause. Jobs with starts left
        return to the queue with the process, and are rendered alone. A job without starts left
        fails with this error.
        """
        try:
            generated = renderer.generate(jobs)
        except AlphalayerError as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
            else:
                for job in jobs:
                    self._render(renderer, (job,))
            return
        except Exception as error:
            if len(jobs) == 1 and jobs[0].starts >= MAX_STARTS - 1:
                self._fail(jobs[0], error)
            raise
        # images in memory: those of one batch at most, beside the batch that is generated
        wait(self._storing)
        self._storing = [
            self._encoder.submit(self._store, renderer, job, images)
            for job, images in zip(jobs, generated, strict=True)
        ]

    def _store(self, renderer: Renderer, job: Job, images: Generated) -> None:
        try:
            result = renderer.store(job, images)
            memory_bytes = renderer.engine.memory_bytes()
            self._send(Done(id=job.id, result=result, memory_bytes=memory_bytes))
        except Exception as error:
            self._fail(job, error)
        finally:
            self._cancelled.discard(job.id)

    def _fail(self, job: Job, error: Exception) -> None:
        self._cancelled.discard(job.id)
        self._send(Failed(id=job.id, error=to_public_error(error)))

    def _report(self, job: Job, progress: JobProgress) -> None:
        self._send(ProgressReport(id=job.id, progress=progress))

    def _send(self, message: Report) -> None:
        with self._write_lock:
            self._writer.write(write_report(message))
            self._writer.flush()


def main() -> None:
    """Run `python -m alphalayer.worker.engine_process`.

    Standard output belongs to the messages. Prints go to standard error.
    """
    writer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    EngineProcess(sys.stdin.buffer, writer).serve()
    # not by sys.exit: the reading thread holds standard input, and Python would abort
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
