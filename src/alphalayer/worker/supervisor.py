"""Supervisor of one engine process: claims jobs, sends them, and publishes what comes back.

It starts the process again when it ends.
Asynchronous and free of torch, so that the service stays up whatever the device does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from structlog.contextvars import bind_contextvars

from alphalayer.core.errors import AlphalayerError, EngineFailed
from alphalayer.core.job import Job, JobProgress
from alphalayer.jobs.base import JobConsumer, Outcome
from alphalayer.jobs.outcomes import describe_failure
from alphalayer.observability.logging import log
from alphalayer.observability.metrics import Metrics
from alphalayer.observability.tracing import JobTrace, Traces
from alphalayer.worker.batching import claim_batch
from alphalayer.worker.messages import (
    MAX_LINE_BYTES,
    Cancel,
    Command,
    Done,
    Failed,
    JobReport,
    Open,
    ProgressReport,
    Ready,
    Render,
    Started,
    Stopped,
    is_too_long,
    line_too_long,
    read_report,
    write_message,
)
from alphalayer.worker.pace import BatchPace, Pace

LAST_STAGES = ("decode", "store")
"""Stages in which the next batch is sent. It waits in the process, so that the device does not."""
RESTART_PAUSE_S = (0.1, 1.0, 5.0, 15.0, 60.0)
"""Pause before a restart, by the number of processes in a row that finished no job.

Not a retry of `stamina`: a finished job resets the count while its process still runs.
"""
TICK_S = 1.0
"""Unit in which silence is measured."""


@dataclass(frozen=True)
class EngineSpec:
    """Engine of a process as "module:function", its options, its storage and its environment."""

    engine: str
    options: dict[str, Any]
    storage: str
    environment: dict[str, str] = field(default_factory=dict[str, str])
    silence_limit_s: float = 900.0
    """A process that starts or renders and sends nothing for this long is killed.

    Steps have shorter limits, see `alphalayer.worker.pace`.
    """
    batch_wait_s: float = 0.0
    """Seconds that a batch which is not full waits for more jobs."""
    logs: dict[str, Any] = field(default_factory=lambda: {"level": "info", "as_json": False})
    """Arguments of `alphalayer.observability.logging.configure_logging`."""


@dataclass(eq=False)
class _Batch:
    """Jobs that are generated together."""

    unfinished: int
    pace: BatchPace
    is_alone: bool
    """Whether no other batch may be in the process, so that its end has one cause."""
    blocks_next: bool = True
    is_started: bool = False

    @classmethod
    def of(cls, jobs: Sequence[Job], pace: Pace) -> _Batch:
        """Return the batch of jobs that are sent together."""
        specs = [job.spec for job in jobs]
        return cls(
            unfinished=len(jobs),
            pace=BatchPace(pace, sum(spec.cost / spec.iterations for spec in specs)),
            is_alone=any(job.starts for job in jobs),
        )


@dataclass(eq=False)
class _AssignedJob:
    """A job that was sent to the process."""

    batch: _Batch
    cancelling: asyncio.Task[None]
    trace: JobTrace
    progress: JobProgress = JobProgress()


class Supervisor:
    """Supervisor of one engine process. `run` is a task of the service's event loop."""

    def __init__(
        self, name: str, spec: EngineSpec, job_queue: JobConsumer, metrics: Metrics, traces: Traces
    ):
        self.name = name
        self._metrics = metrics
        self._traces = traces
        self._spec = spec
        self._job_queue = job_queue
        self._jobs: dict[str, _AssignedJob] = {}
        self._next_batch = asyncio.Semaphore(1)
        self._batch_pixels = 0
        self._loaded_model: str | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._pace = Pace()
        self._job_left = asyncio.Event()
        self._silence_s = 0.0
        self._is_handling = False
        self._hang = ""
        self._fruitless_starts = 0
        self._draining = False
        self.is_ready = False
        self.problem: AlphalayerError | None = None

    @property
    def process_id(self) -> int | None:
        """Return the id of the engine process, or None if there is none."""
        return self._process.pid if self._process else None

    async def run(self) -> None:
        """Start the process, send it jobs, and restart it, until cancelled.

        It may be called again after an error.
        """
        # part of every log line from here on, also of those about finished jobs
        bind_contextvars(engine=self.name)
        while not self._draining:
            await self._requeue_jobs("its supervisor failed")
            problem_before = self.problem
            try:
                reason = await self._run_process()
            except OSError as error:
                reason = f"it cannot be started: {error}"
            if self.problem in (problem_before, None):  # else the process reported its problem
                self.problem = EngineFailed(f"{reason}.", hint="The service's log has the details.")
            await self._requeue_jobs(reason)
            if self._draining:
                return
            pause = RESTART_PAUSE_S[min(self._fruitless_starts, len(RESTART_PAUSE_S) - 1)]
            self._fruitless_starts += 1
            log.error("engine.stopped", reason=reason, restart_in_s=pause)
            await asyncio.sleep(pause)

    def stop_accepting(self) -> None:
        """Start no more jobs."""
        self._draining = True

    def is_running(self, job_id: str) -> bool:
        """Return whether a job is in the process."""
        return job_id in self._jobs

    async def drain(self) -> None:
        """Start no more jobs, and return when all running jobs are finished."""
        self.stop_accepting()
        while self._jobs:
            await asyncio.sleep(0.05)

    async def requeue_running(self) -> None:
        """Requeue all running jobs without counting their start.

        Call it after `run` has ended.
        """
        await self._requeue_jobs("the service was stopped", is_counted=False)

    async def _requeue_jobs(self, reason: str, *, is_counted: bool = True) -> None:
        for job_id in reversed(list(self._jobs)):
            await self._job_queue.requeue(job_id, reason, is_counted=is_counted)
            await self._forget(job_id, reason)
        self._next_batch = asyncio.Semaphore(1)

    async def _run_process(self) -> str:
        """Run one engine process to its end, and return why it ended.

        Raises:
            OSError: It cannot be started.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "alphalayer.worker.engine_process"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self._spec.environment},
            limit=MAX_LINE_BYTES,
            start_new_session=os.name != "nt",
        )
        self._process = process
        self._metrics.engine_starts.labels(self.name).inc()
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._open()
            tasks.append(asyncio.create_task(self._kill_when_hung(process)))
            await self._follow(process, tasks)
            code = await process.wait()
        except (ConnectionError, ValueError) as error:
            return f"its pipe broke: {error}"
        finally:
            self.is_ready = False
            self._metrics.engine_ready.labels(self.name).set(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            self._process = None
        return f"the engine process ended with {_exit_text(code)}{self._hang}"

    async def _open(self) -> None:
        spec = self._spec
        await self._send(
            Open(
                name=self.name,
                engine=spec.engine,
                options=spec.options,
                storage=spec.storage,
                logs=spec.logs,
            )
        )
        self._pace = Pace()
        self._silence_s, self._is_handling, self._hang = 0.0, False, ""

    async def _follow(
        self, process: asyncio.subprocess.Process, tasks: list[asyncio.Task[None]]
    ) -> None:
        """Handle the messages of the process until its output ends."""
        assert process.stdout is not None
        async for line in process.stdout:
            # a slow database stops the reading, and that is no silence of the process
            self._is_handling = True
            match read_report(line):
                case Ready() as ready:
                    log.info("engine.ready", pid=process.pid, device=ready.device)
                    self.is_ready, self.problem = True, None
                    self._batch_pixels = ready.batch_pixels
                    self._metrics.engine_ready.labels(self.name).set(1)
                    tasks.append(asyncio.create_task(self._keep_feeding(process)))
                case Stopped(error=error):
                    self.is_ready, self.problem = False, error
                    log.error("engine.not_ready", error=str(error))
                case report:
                    if report.id in self._jobs:  # else it was requeued
                        await self._handle(report)
            self._silence_s, self._is_handling = 0.0, False

    async def _keep_feeding(self, process: asyncio.subprocess.Process) -> None:
        """Send batches to the process. On an error, end it, so that it is started again."""
        try:
            await self._feed()
        except Exception as error:
            log.error("task.failed", task="feed", exc_info=error)
            process.kill()

    async def _feed(self) -> None:
        """Send a batch whenever the process has nearly finished the one before."""
        while not self._draining:
            await self._next_batch.acquire()
            if self._draining:
                return
            jobs = await claim_batch(
                self._job_queue, self._batch_pixels, self._spec.batch_wait_s, self._loaded_model
            )
            batch = _Batch.of(jobs, self._pace)
            if self._draining or (batch.is_alone and self._jobs):
                for job in reversed(jobs):
                    await self._job_queue.requeue(job.id, "the engine is not free")
                await self._wait_until_idle()
                self._next_batch.release()
                continue
            self._metrics.batch_jobs.observe(len(jobs))
            self._loaded_model = jobs[0].spec.generation.model
            for job in jobs:
                self._jobs[job.id] = self._assign(job, batch)
            await self._send_batch(jobs)

    async def _wait_until_idle(self) -> None:
        """Wait until no job is in the process."""
        while self._jobs:
            self._job_left.clear()
            await self._job_left.wait()

    async def _send_batch(self, jobs: Sequence[Job]) -> None:
        """Send jobs as one message. If it is too long, send each, and fail those too long."""
        # the queue has validated the jobs
        line = write_message(Render.model_construct(jobs=tuple(jobs)))
        if not is_too_long(line):
            await self._write(line)
        elif len(jobs) > 1:
            for job in jobs:
                await self._send_batch([job])
        else:
            await self._complete(jobs[0].id, line_too_long(line))

    def _assign(self, job: Job, batch: _Batch) -> _AssignedJob:
        attributes = {
            "job.id": job.id,
            "job.engine": self.name,
            "job.starts": job.starts + 1,
            "job.batch": batch.unfinished,
        }
        trace = self._traces.follow(job.submission.traceparent, job.created_at, attributes)
        trace.stage("sent")
        return _AssignedJob(batch, asyncio.create_task(self._forward_cancel(job.id)), trace)

    async def _handle(self, report: JobReport) -> None:
        job = self._jobs[report.id]
        match report:
            case Started():
                job.batch.is_started = True
                job.trace.stage("start")
                await self._job_queue.mark_started(report.id)
            case ProgressReport():
                job.batch.pace.report(report.progress)
                before, job.progress = job.progress, report.progress.following(job.progress)
                job.trace.stage(job.progress.stage)
                is_last_step = job.progress.step == job.progress.steps
                if job.progress.stage in LAST_STAGES and is_last_step and not job.batch.is_alone:
                    self._allow_next(job.batch)
                if job.progress != before:  # else it only shows that the engine works
                    await self._job_queue.report_progress(report.id, job.progress)
            case Done():
                self._metrics.engine_memory.labels(self.name).set(report.memory_bytes)
                await self._complete(report.id, report.result)
            case Failed():
                await self._complete(report.id, report.error)

    async def _complete(self, job_id: str, outcome: Outcome) -> None:
        if not isinstance(outcome, EngineFailed):
            self._fruitless_starts = 0
        # in this order: a shutdown waits for the jobs in `_jobs`
        await self._job_queue.complete(job_id, outcome)
        batch = await self._forget(job_id, describe_failure(outcome))
        if batch.unfinished == 0:
            self._allow_next(batch)

    async def _forget(self, job_id: str, problem: str | None) -> _Batch:
        """Remove a job that has left the process, and return its batch."""
        job = self._jobs.pop(job_id)
        self._job_left.set()
        job.trace.end(problem)
        job.batch.unfinished -= 1
        job.cancelling.cancel()
        await asyncio.gather(job.cancelling, return_exceptions=True)
        return job.batch

    def _allow_next(self, batch: _Batch) -> None:
        """Let the next batch be sent, once for each batch."""
        if batch.blocks_next:
            batch.blocks_next = False
            self._next_batch.release()

    async def _forward_cancel(self, job_id: str) -> None:
        await self._job_queue.wait_for_cancel(job_id)
        await self._send(Cancel(id=job_id))

    def _silence_limit_s(self) -> float:
        """Return how long the process may be silent with the jobs that it has."""
        limit_s = self._spec.silence_limit_s
        started = {id(job.batch): job.batch for job in self._jobs.values() if job.batch.is_started}
        return max((batch.pace.limit_s(limit_s) for batch in started.values()), default=limit_s)

    async def _kill_when_hung(self, process: asyncio.subprocess.Process) -> None:
        """Kill the process when it is silent for too long.

        The silence is counted in ticks. None pass while the service itself is stopped.
        """
        while True:
            await asyncio.sleep(TICK_S)
            is_idle = self.is_ready and not self._jobs
            self._silence_s = 0.0 if is_idle or self._is_handling else self._silence_s + TICK_S
            limit_s = self._silence_limit_s()
            if self._silence_s > limit_s:
                log.error("engine.hung", silence_s=round(self._silence_s), silence_limit_s=limit_s)
                is_longest = limit_s == self._spec.silence_limit_s
                source = "silence_limit_s" if is_longest else "its usual pace is known"
                self._hang = f" after a silence of {limit_s:g} s ({source})"
                process.kill()
                return

    async def _send(self, message: Open | Command) -> None:
        await self._write(write_message(message))

    async def _write(self, line: bytes) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        with contextlib.suppress(ConnectionError):
            process.stdin.write(line)
            await process.stdin.drain()


def _exit_text(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
