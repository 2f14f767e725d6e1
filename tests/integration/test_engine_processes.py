"""Engine processes of the service: one for each GPU, warm, and with the next batch early."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from tests.support.serving import served, wait_until

from alphalayer.core.job import Job, JobSpec
from alphalayer.core.request import GenerationRequest
from alphalayer.engine.base import GenerationResult, RenderTask
from alphalayer.engine.fake import FakeEngine
from alphalayer.service.gpus import engine_environments
from alphalayer.storage.objects import ObjectStorage, open_storage
from alphalayer.worker import messages
from alphalayer.worker.engine_process import EngineProcess
from alphalayer.worker.messages import Cancel, Failed, Render, read_report, write_message


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install an `nvidia-smi` that lists two GPUs, one of them in two MIG slices."""
    lines = [
        "GPU 0: Some Card (UUID: GPU-1)",
        "  MIG 3g.20gb Device  0: (UUID: MIG-1)",
        "  MIG 3g.20gb Device  1: (UUID: MIG-2)",
    ]
    lines.append("GPU 1: Some Card (UUID: GPU-2)")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("visible", "device", "engines"),
    [
        (None, "auto", {"gpu0": "0", "gpu1": "1"}),
        ("1", "auto", {"gpu1": "1"}),
        ("3, GPU-2", "cuda", {"gpu3": "3", "gpuGPU-2": "GPU-2"}),
        ("", "auto", {"cpu": None}),
        ("-1", "auto", {"cpu": None}),
        ("1,-1,0", "auto", {"gpu1": "1"}),
        (None, "cpu", {"cpu": None}),
        (None, "cuda:1", {"cuda:1": None}),
    ],
)
def test_engine_environments_has_one_entry_for_each_gpu(
    two_gpus, monkeypatch, visible, device, engines
):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environments = engine_environments(device)
    assert {
        name: environment.get("CUDA_VISIBLE_DEVICES") for name, environment in environments.items()
    } == engines


def test_engine_environments_without_a_driver_uses_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engine_environments("auto") == {"cpu": {}}


def test_service_is_ready_after_the_warm_up(tmp_path: Path):
    mark, engine = tmp_path / "warm", "tests.support.engines:create_slow_to_warm"
    with served(
        tmp_path, engine=engine, engine_options={"mark": str(mark)}, wait_ready=False
    ) as client:
        wait_until(lambda: client.get("/ping").status_code == 200, 20)
        assert mark.exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_engine_log_has_the_format_of_the_service_log(tmp_path: Path, capfd, as_json: bool):
    engine = "tests.support.engines:create_logging"
    with served(tmp_path, engine=engine, log_json=as_json):
        pass
    (line,) = [
        line
        for line in capfd.readouterr().err.splitlines()
        if "a file is left out (broken)." in line
    ]
    if as_json:
        entry = json.loads(line)
        assert (entry["event"], entry["level"], entry["engine"]) == (
            "a file is left out (broken).",
            "warning",
            "cpu",
        )
    else:
        assert "warning" in line
        assert "engine=cpu" in line


def test_next_job_is_sent_before_the_last_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with served(tmp_path, engine_options={"step_s": 0.05}) as client:
        job_queue = client.app.state.parts.job_queue
        claim, complete = job_queue.claim, job_queue.complete
        calls: list[tuple[str, str]] = []

        async def claim_recorded(holding: str | None = None) -> Any:
            job = await claim(holding)
            calls.append(("claim", job.id))
            return job

        async def complete_recorded(job_id: str, outcome: Any) -> None:
            calls.append(("complete", job_id))
            await complete(job_id, outcome)

        monkeypatch.setattr(job_queue, "claim", claim_recorded)
        monkeypatch.setattr(job_queue, "complete", complete_recorded)
        body = {"prompt": "x", "steps": 5, "width": 512, "height": 512, "format": "webp"}
        ids = [
            client.post("/alpha/v1/jobs", json={**body, "seed": i}).json()["id"] for i in range(3)
        ]
        wait_until(lambda: calls.count(("complete", ids[2])), 30)
        assert calls.index(("claim", ids[1])) < calls.index(("complete", ids[0]))
        assert calls.index(("claim", ids[2])) < calls.index(("complete", ids[1]))


def test_hanging_storage_stops_rendering_after_one_batch(tmp_path: Path):
    """Render one batch ahead of a hanging bucket, and no more."""
    rendered: list[str] = []
    can_store = threading.Event()

    class RecordingEngine(FakeEngine):
        def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
            rendered.append(tasks[0].request.prompt)
            return super().render(tasks)

    class HangingStorage(ObjectStorage):
        def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
            can_store.wait(10)
            super().put(key, data, replace=replace)

    storage = HangingStorage(open_storage(str(tmp_path))._store, str(tmp_path))
    process = EngineProcess(io.BytesIO(), io.BytesIO())
    renderer = process.create_renderer(RecordingEngine(), storage)
    jobs = [
        Job.new(JobSpec(generation=GenerationRequest(prompt=name, width=64, height=64, steps=1)))
        for name in "abcd"
    ]
    thread = threading.Thread(target=lambda: [process.run(renderer, (job,)) for job in jobs])
    thread.start()
    wait_until(lambda: rendered == ["a", "b"])
    thread.join(0.3)
    assert rendered == ["a", "b"]
    can_store.set()
    thread.join(10)
    wait_until(lambda: len(list(tmp_path.iterdir())) == len(jobs))


def test_cancelled_waiting_job_is_reported_at_once():
    written = io.BytesIO()
    process = EngineProcess(io.BytesIO(), written)
    jobs = [Job.new(JobSpec(generation=GenerationRequest(prompt=name))) for name in "abc"]
    process.receive(Render(jobs=(jobs[0],)))
    process.receive(Render(jobs=(jobs[1], jobs[2])))
    assert process.next_batch() == (jobs[0],)
    # the first is being rendered now
    process.receive(Cancel(id=jobs[0].id))
    assert written.getvalue() == b""
    process.receive(Cancel(id=jobs[1].id))
    report = read_report(written.getvalue())
    assert isinstance(report, Failed)
    assert (report.id, report.error.code) == (jobs[1].id, "cancelled")
    assert process.next_batch() == (jobs[2],)


def test_models_are_unloaded_after_a_time_without_jobs(tmp_path: Path):
    class IdleEngine(FakeEngine):
        unloads = 0

        def unload(self) -> None:
            self.unloads += 1

    process, engine = EngineProcess(io.BytesIO(), io.BytesIO()), IdleEngine()
    engine.unload_after_s = 0.01
    renderer = process.create_renderer(engine, open_storage(str(tmp_path)))
    process.run_next(renderer)
    assert engine.unloads == 1
    request = GenerationRequest(prompt="a", width=64, height=64, steps=1)
    process.receive(Render(jobs=(Job.new(JobSpec(generation=request)),)))
    process.run_next(renderer)
    wait(process._storing)
    assert engine.unloads == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_unreadable_command_fails_its_jobs_only(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(os, "_exit", lambda _code: None)
    job = Job.new(JobSpec(generation=GenerationRequest(prompt="a")))
    line = write_message(Render(jobs=(job,)))
    damaged = line.replace(b'"prompt":"a"', b'"prompt":""')
    cut_off = line[: len(line) // 2]
    written = io.BytesIO()
    process = EngineProcess(io.BytesIO(damaged + b"[]\n" + line + cut_off), written)
    process._read()
    report = read_report(written.getvalue())
    assert isinstance(report, Failed)
    assert (report.id, report.error.code) == (job.id, "engine_failed")
    assert "prompt" in report.error.message
    assert process.next_batch() == (job,)


def test_job_whose_report_is_too_long_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages, "MAX_LINE_BYTES", 700)
    written = io.BytesIO()
    process = EngineProcess(io.BytesIO(), written)
    renderer = process.create_renderer(FakeEngine(), open_storage(str(tmp_path)))
    request = GenerationRequest(prompt="x", width=64, height=64, steps=1, batch_size=8)
    job = Job.new(JobSpec(generation=request))
    process.run(renderer, (job,))
    wait(process._storing)
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 700
    report = read_report(lines[-1])
    assert isinstance(report, Failed)
    assert "at most 700" in report.error.message
