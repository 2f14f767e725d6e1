"""The supervisor with a scripted engine process: starts that count, and limits of silence."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from alphalayer.core.errors import Cancelled
from alphalayer.core.job import Job, JobProgress, JobResult, JobSpec, JobState
from alphalayer.core.request import GenerationRequest, ModelDefaults
from alphalayer.jobs.base import MAX_STARTS
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.observability.metrics import Metrics
from alphalayer.observability.tracing import Traces
from alphalayer.worker import messages, pace, supervisor
from alphalayer.worker.messages import (
    Cancel,
    Done,
    Failed,
    ProgressReport,
    Ready,
    Render,
    Report,
    Started,
    read_command,
    write_message,
)
from alphalayer.worker.pace import BatchPace, Pace
from alphalayer.worker.supervisor import EngineSpec, Supervisor

Script = Callable[["Process", Render | Cancel], None]
RESULT = JobResult(images=(), settings=ModelDefaults(), model_name="m", model_hash="h")


class Process:
    """Stand-in for an engine process. It runs a script at each command."""

    pid = 1

    def __init__(self, script: Script, batch_pixels: int):
        self._script = script
        self._batch_pixels = batch_pixels
        self._ended = asyncio.Event()
        self.is_doomed = False
        self.stdin = self
        self.stdout = asyncio.StreamReader(limit=messages.MAX_LINE_BYTES)

    def write(self, line: bytes) -> None:
        if b'"kind":"open"' in line:
            self.report(Ready(batch_pixels=self._batch_pixels, device="a script"))
        else:
            self._script(self, read_command(line))  # type: ignore[arg-type]

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def report(self, *reports: Report) -> None:
        if not self._ended.is_set():
            self.stdout.feed_data(b"".join(map(write_message, reports)))

    def kill(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self.stdout.feed_eof()

    async def wait(self) -> int:
        await self._ended.wait()
        return -9


class Bench:
    """A queue, and a supervisor that runs a script instead of processes."""

    def __init__(self, queue: SqliteJobQueue, monkeypatch: pytest.MonkeyPatch):
        self.queue = queue
        self._monkeypatch = monkeypatch
        self.processes: list[Process] = []

    @contextlib.asynccontextmanager
    async def running(self, script: Script, batch_pixels: int = 0, **spec: Any):
        """Run the supervisor."""

        async def start(*_args: object, **_options: object) -> Process:
            self.processes.append(Process(script, batch_pixels))
            return self.processes[-1]

        self._monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
        engine = EngineSpec("no:engine", {}, "out", **spec)
        self.supervisor = Supervisor("cpu", engine, self.queue, Metrics(), Traces())
        task = asyncio.create_task(self.supervisor.run())
        yield
        assert not task.done() or not task.exception()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def submit(self, *prompts: str) -> list[Job]:
        """Submit jobs of these prompts."""
        fields = {"width": 64, "height": 64, "steps": 2}
        return [
            await self.queue.submit(JobSpec(generation=GenerationRequest(prompt=prompt, **fields)))
            for prompt in prompts
        ]

    async def outcomes(self, jobs: list[Job]) -> list[tuple[str, int]]:
        """Wait for jobs, and return their states and starts."""
        waiting = asyncio.gather(*(self.queue.wait(job.id) for job in jobs))
        return [(job.state.value, job.starts) for job in await asyncio.wait_for(waiting, 10)]


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(supervisor, "RESTART_PAUSE_S", (0.0,))
    queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 100)
    yield Bench(queue, monkeypatch)
    await queue.close()


def progress(job: Job, stage: str, step: int = 0, steps: int = 0) -> ProgressReport:
    return ProgressReport(id=job.id, progress=JobProgress(stage=stage, step=step, steps=steps))


def done(job: Job) -> Done:
    return Done(id=job.id, result=RESULT, memory_bytes=0)


def render_all(process: Process, command: Render | Cancel) -> None:
    """Render each job at once."""
    for job in command.jobs if isinstance(command, Render) else ():
        process.report(Started(id=job.id), done(job))


@pytest.mark.parametrize("is_started", [True, False])
async def test_job_sent_ahead_is_not_blamed_for_another(bench: Bench, is_started: bool):
    """Die while "boom" is stored and the next job was sent or is rendered."""

    def script(process: Process, command: Render | Cancel) -> None:
        assert isinstance(command, Render)
        (job,) = command.jobs
        if job.spec.generation.prompt == "boom":
            process.report(Started(id=job.id), progress(job, "decode"))
            process.is_doomed = True
            asyncio.get_running_loop().call_later(0.1, process.kill)
        elif not process.is_doomed:
            render_all(process, command)
        elif is_started:
            process.report(Started(id=job.id))

    jobs = await bench.submit("boom", "innocent", "next")
    async with bench.running(script):
        outcomes = await bench.outcomes(jobs)
    assert outcomes[0] == ("failed", MAX_STARTS)
    assert outcomes[1] == ("done", 2 if is_started else 1)
    assert outcomes[2] == ("done", 1)
    assert len(bench.processes) == MAX_STARTS + 1


async def test_jobs_return_to_the_queue_in_order(bench: Bench):
    rendered: list[str] = []

    def script(process: Process, command: Render | Cancel) -> None:
        assert isinstance(command, Render)
        (job,) = command.jobs
        if len(bench.processes) == 1:
            process.report(progress(job, "decode"))
            if job.spec.generation.prompt == "b":
                process.kill()
        else:
            rendered.append(job.spec.generation.prompt)
            render_all(process, command)

    jobs = await bench.submit("a", "b", "c")
    async with bench.running(script):
        assert await bench.outcomes(jobs) == [("done", 1)] * 3
    assert rendered == ["a", "b", "c"]


async def test_too_long_message_fails_its_job_only(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "MAX_LINE_BYTES", 2000)
    jobs = await bench.submit("a", "b" * 2000, "c")
    async with bench.running(render_all, batch_pixels=3 * 64 * 64):
        assert [state for state, _ in await bench.outcomes(jobs)] == ["done", "failed", "done"]
    failed = await bench.queue.view(jobs[1].id)
    assert failed
    assert failed.job.error
    assert "at most 2,000" in failed.job.error["message"]
    assert len(bench.processes) == 1


async def test_cancel_of_a_job_sent_ahead_reaches_the_process(bench: Bench):
    commands: list[Render | Cancel] = []

    def script(process: Process, command: Render | Cancel) -> None:
        commands.append(command)
        if isinstance(command, Cancel):
            process.report(Failed(id=command.id, error=Cancelled("cancelled.")))
        elif len(commands) == 1:
            process.report(Started(id=command.jobs[0].id), progress(command.jobs[0], "decode"))

    first, second, third = await bench.submit("a", "b", "c")
    async with bench.running(script):
        await _until(lambda: len(commands) == 2)
        assert await bench.queue.cancel(second.id)
        view = await bench.queue.view(second.id)
        assert view
        assert view.job.state is JobState.CANCELLED
        # its place is free for the next job, although the first still runs
        await _until(lambda: len(commands) == 4)
        assert commands[2] == Cancel(id=second.id)
        assert isinstance(commands[3], Render)
        assert commands[3].jobs[0].id == third.id
        assert bench.supervisor.is_running(first.id)


async def test_stopped_service_is_not_taken_for_a_hung_engine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor, "TICK_S", 0.01)
    clock, stopped_s = time.monotonic, 0.0

    def script(process: Process, command: Render | Cancel) -> None:
        assert isinstance(command, Render)
        process.report(Started(id=command.jobs[0].id))

    monkeypatch.setattr(time, "monotonic", lambda: clock() + stopped_s)
    (job,) = await bench.submit("a")
    async with bench.running(script):
        await _until(lambda: bench.queue._open_jobs[job.id].job.state is JobState.RUNNING)
        await asyncio.sleep(0.05)
        stopped_s = 3600.0  # SIGSTOP for an hour
        await asyncio.sleep(0.1)
        bench.processes[0].report(done(job))
        assert await bench.outcomes([job]) == [("done", 1)]
    assert len(bench.processes) == 1


@pytest.mark.parametrize(
    ("stage", "steps", "is_killed"),
    [("sample", 2, True), ("decode", 0, True), ("load", 0, False), ("store", 0, False)],
)
async def test_hung_step_is_killed_by_its_own_pace(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, stage: str, steps: int, is_killed: bool
):
    monkeypatch.setattr(supervisor, "TICK_S", 0.01)
    monkeypatch.setattr(pace, "SHORTEST_LIMIT_S", 0.1)

    def script(process: Process, command: Render | Cancel) -> None:
        assert isinstance(command, Render)
        (job,) = command.jobs
        reports = [progress(job, stage, step, steps) for step in (1, 2) if steps]
        process.report(Started(id=job.id), *(reports or [progress(job, stage)] * 2))
        if job.id == usual.id or len(bench.processes) > 1:
            process.report(progress(job, "store"), done(job))

    usual, hanging = await bench.submit("a", "b")
    with capture_logs() as logs:
        async with bench.running(script):
            await bench.outcomes([usual])
            if is_killed:
                assert await bench.outcomes([hanging]) == [("done", 2)]
            else:
                await asyncio.sleep(0.3)
    assert [line["event"] for line in logs].count("engine.hung") == is_killed
    assert len(bench.processes) == 1 + is_killed


def test_pace_of_a_batch(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    engine = Pace()

    def limits(cost: float, *reports: tuple[float, str, int]) -> list[float]:
        """Return the limit after each report: seconds since the last one, stage and step."""
        nonlocal now
        batch, result = BatchPace(engine, cost), []
        for seconds, stage, step in reports:
            now += seconds
            batch.report(JobProgress(stage=stage, step=step, steps=9 if step else 0))
            result.append(batch.limit_s(900.0))
        return result

    sampling = [(0, "start", 0), (5, "load", 0), (1, "sample", 0), (10, "sample", 1)]
    # the gap of the first step is known, and later ones are shorter
    assert limits(5.0, *sampling, (2, "sample", 2)) == [900, 900, 900, 200, 200]
    # neither the load nor the steps of other batches count
    assert limits(6.0, *sampling[:3], (0.1, "sample", 1)) == [900, 900, 900, 60]
    # a step that takes longer than a twentieth of the limit
    assert limits(7.0, *sampling[:3], (100, "sample", 1)) == [900] * 4
    # a decode has long layers behind short ones, so only a whole one counts
    decoding = [(0, "decode", 0), (1, "decode", 0), (30, "decode", 0)]
    assert limits(5.0, *decoding, (1, "store", 0)) == [900] * 4
    assert limits(5.0, *decoding) == [600] * 3
    assert limits(9.0, *decoding) == [900] * 3


async def _until(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), 10)
