"""The supervisor of one engine process: takes jobs, sends them over, relays what comes back, and starts the process again when it dies.

Asynchronous and free of torch, so that the service stays up whatever the device does.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from structlog.contextvars import bind_contextvars

from alphalayer.core.errors import AlphalayerError, EngineFailed
from alphalayer.core.job import Job, JobProgress, JobResult
from alphalayer.jobs.base import JobConsumer, Outcome
from alphalayer.observability.logging import log
from alphalayer.observability.metrics import Metrics
from alphalayer.observability.tracing import JobTrace, Traces
from alphalayer.worker.batching import claim_batch
from alphalayer.worker.messages import MAX_LINE_BYTES, read_message, write_message

LAST_STAGES = ("decode", "store")
"""Once a batch is here with its last step the next one is sent: it waits in the process, so that the device need not wait for it."""
RESTART_PAUSE_S = (0.1, 1.0, 5.0, 15.0, 60.0)
"""How long to wait before the process is started again, by how often it died without finishing anything that it could draw."""


@dataclass(frozen=True)
class EngineSpec:
    """How an engine process is made: the engine as "module:function", its options, where pictures go, and its environment."""

    engine: str
    options: dict[str, Any]
    storage: str
    environment: dict[str, str] = field(default_factory=dict[str, str])
    silence_limit_s: float = 900.0
    """A process that starts or works and says nothing for so long is taken for hung and killed."""
    batch_wait_s: float = 0.0
    """How long a batch that is not full waits for more."""
    logs: dict[str, Any] = field(default_factory=lambda: {"level": "info", "as_json": False})
    """What it sets its logs up with, as `alphalayer.telemetry.configure_logging` wants it."""


@dataclass(eq=False)
class _Batch:
    """Jobs that are drawn together: how many are not over, and whether the next batch waits for them."""

    left: int
    holds_the_next: bool = True


@dataclass(eq=False)
class _Work:
    """A job that is in the process."""

    batch: _Batch
    cancelling: asyncio.Task[None]
    trace: JobTrace
    progress: JobProgress = JobProgress()


class Supervisor:
    """Keeps one engine process at work. `run` is one task of the service's event loop."""

    def __init__(
        self, name: str, spec: EngineSpec, job_queue: JobConsumer, metrics: Metrics, traces: Traces
    ):
        self.name = name
        self._metrics = metrics
        self._traces = traces
        self._spec = spec
        self._job_queue = job_queue
        self._jobs: dict[str, _Work] = {}
        self._room = asyncio.Semaphore(1)
        self._batch_pixels = 0
        self._holding: str | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._heard_at = 0.0
        self._hung = False
        self._fruitless = 0
        self._draining = False
        self.is_ready = False
        self.problem: AlphalayerError | None = None

    @property
    def process_id(self) -> int | None:
        """The engine process's id, None while there is none."""
        return self._process.pid if self._process else None

    async def run(self) -> None:
        """Start the process, feed it, and start it again, until cancelled. May be run again where it raised something."""
        # stands in every line that is written from here on, in those of the ends of jobs, too
        bind_contextvars(engine=self.name)
        while not self._draining:
            await self._give_back("its supervisor failed")
            known = self.problem
            try:
                reason = await self._live()
            except OSError as error:
                reason = f"it cannot be started: {error}"
            if self.problem in (known, None):  # else the process said by itself what is wrong
                self.problem = EngineFailed(f"{reason}.", hint="The service's log has the details.")
            await self._give_back(reason)
            if self._draining:
                return
            pause = RESTART_PAUSE_S[min(self._fruitless, len(RESTART_PAUSE_S) - 1)]
            self._fruitless += 1
            log.error("engine.stopped", reason=reason, restart_in_s=pause)
            await asyncio.sleep(pause)

    def stop_accepting(self) -> None:
        """Begin no more jobs."""
        self._draining = True

    def is_running(self, job_id: str) -> bool:
        """Whether a job is in the process."""
        return job_id in self._jobs

    async def drain(self) -> None:
        """Take no more jobs, and return when those at work are over."""
        self.stop_accepting()
        while self._jobs:
            await asyncio.sleep(0.05)

    async def requeue_running(self) -> None:
        """Queue again what is still at work, as if it had not been begun; once `run` is over."""
        await self._give_back("the service was stopped", is_counted=False)

    async def _give_back(self, reason: str, *, is_counted: bool = True) -> None:
        """Queue again what the process had that is gone."""
        for job_id in reversed(list(self._jobs)):
            await self._job_queue.requeue(job_id, reason, is_counted=is_counted)
            await self._forget(job_id, reason)
        self._room = asyncio.Semaphore(1)

    async def _live(self) -> str:
        """One life of the process; why it ended. Raises `OSError` if it cannot be started."""
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
        spec = self._spec
        feeding: list[asyncio.Task[None]] = []
        try:
            about = {"engine": spec.engine, "options": spec.options, "storage": spec.storage}
            await self._send("open", name=self.name, logs=spec.logs, **about)
            self._heard_at, self._hung = time.monotonic(), False
            feeding = [asyncio.create_task(self._kill_when_hung(process))]
            assert process.stdout is not None
            async for line in process.stdout:
                # until this is noted, which a database may keep us from, nothing more is heard, and that is not the process's fault
                self._heard_at = math.inf
                message = read_message(line)
                if message["kind"] == "ready":
                    log.info("engine.ready", pid=process.pid, device=message.get("device"))
                    self.is_ready, self.problem = True, None
                    self._batch_pixels = message.get("batch_pixels", 0)
                    self._metrics.engine_ready.labels(self.name).set(1)
                    feeding.append(asyncio.create_task(self._keep_feeding(process)))
                else:
                    await self._hear(message)
                self._heard_at = time.monotonic()
            code = await process.wait()
        except (ConnectionError, ValueError) as error:
            return f"its pipe broke: {error}"
        finally:
            self.is_ready = False
            self._metrics.engine_ready.labels(self.name).set(0)
            for task in feeding:
                task.cancel()
            await asyncio.gather(*feeding, return_exceptions=True)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            self._process = None
        silence = (
            f", as it had said nothing for {spec.silence_limit_s:g} s (silence_limit_s)"
            if self._hung
            else ""
        )
        return f"the engine process ended with {_exit_text(code)}{silence}"

    async def _keep_feeding(self, process: asyncio.subprocess.Process) -> None:
        """Feed the process; one that cannot be fed is ended, so that it is started again."""
        try:
            await self._feed()
        except Exception as error:
            log.error("task.failed", task="feed", exc_info=error)
            process.kill()

    async def _feed(self) -> None:
        """Send a batch whenever the process is about to be done with the one before."""
        while not self._draining:
            await self._room.acquire()
            if self._draining:
                return
            jobs = await claim_batch(
                self._job_queue, self._batch_pixels, self._spec.batch_wait_s, self._holding
            )
            if self._draining:
                for job in reversed(jobs):
                    await self._job_queue.requeue(job.id, "the supervisor stopped")
                return
            self._metrics.batch_jobs.observe(len(jobs))
            batch = _Batch(len(jobs))
            self._holding = jobs[0].spec.generation.model
            for job in jobs:
                self._jobs[job.id] = self._begin(job, batch)
            await self._send("run", jobs=[job.model_dump(mode="json") for job in jobs])

    def _begin(self, job: Job, batch: _Batch) -> _Work:
        named = {
            "job.id": job.id,
            "job.engine": self.name,
            "job.starts": job.starts + 1,
            "job.batch": batch.left,
        }
        trace = self._traces.follow(job.submission.traceparent, job.created_at, named)
        trace.stage("sent")
        return _Work(batch, asyncio.create_task(self._cancel_when_asked(job.id)), trace)

    async def _hear(self, message: dict[str, Any]) -> None:
        kind, job_id = message["kind"], message.get("id")
        if kind == "failed" and job_id is None:
            self.is_ready, self.problem = False, AlphalayerError.from_dict(message["error"])
            log.error("engine.not_ready", error=str(self.problem))
        if job_id not in self._jobs:
            return
        work = self._jobs[job_id]
        if kind == "started":
            work.trace.stage("start")
            await self._job_queue.mark_started(job_id)
        elif kind == "progress":
            work.progress = JobProgress.model_validate(message["progress"]).following(work.progress)
            work.trace.stage(work.progress.stage)
            if work.progress.stage in LAST_STAGES and work.progress.step == work.progress.steps:
                self._make_room(work.batch)
            await self._job_queue.report_progress(job_id, work.progress)
        elif kind == "done":
            self._metrics.engine_memory.labels(self.name).set(message.get("memory_bytes", 0))
            await self._end(job_id, JobResult.model_validate(message["result"]))
        elif kind == "failed":
            await self._end(job_id, AlphalayerError.from_dict(message["error"]))

    async def _end(self, job_id: str, outcome: Outcome) -> None:
        if not isinstance(outcome, EngineFailed):
            self._fruitless = 0
        # first this, then forget it: who ends waits for what is at work
        await self._job_queue.complete(job_id, outcome)
        batch = await self._forget(
            job_id, outcome.message if isinstance(outcome, AlphalayerError) else None
        )
        if batch.left == 0:
            self._make_room(batch)

    async def _forget(self, job_id: str, problem: str | None) -> _Batch:
        """Forget a job that is no longer in the process; the batch that it was in."""
        work = self._jobs.pop(job_id)
        work.trace.end(problem)
        work.batch.left -= 1
        work.cancelling.cancel()
        await asyncio.gather(work.cancelling, return_exceptions=True)
        return work.batch

    def _make_room(self, batch: _Batch) -> None:
        """Let the next batch be sent, once for each."""
        if batch.holds_the_next:
            batch.holds_the_next = False
            self._room.release()

    async def _cancel_when_asked(self, job_id: str) -> None:
        await self._job_queue.wait_for_cancel(job_id)
        await self._send("cancel", id=job_id)

    async def _kill_when_hung(self, process: asyncio.subprocess.Process) -> None:
        while True:
            await asyncio.sleep(1.0)
            silence = time.monotonic() - self._heard_at
            if self.is_ready and not self._jobs:
                self._heard_at = time.monotonic()
            elif silence > self._spec.silence_limit_s:
                log.error(
                    "engine.hung",
                    silence_s=round(silence),
                    silence_limit_s=self._spec.silence_limit_s,
                )
                self._hung = True
                process.kill()
                return

    async def _send(self, kind: str, **fields: Any) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        with contextlib.suppress(ConnectionError):
            process.stdin.write(write_message(kind, **fields))
            await process.stdin.drain()


def _exit_text(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
