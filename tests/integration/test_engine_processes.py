"""Engine processes as the service keeps them: one a GPU, warm before they are ready, and never without the next batch."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Sequence
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
from alphalayer.worker.engine_process import EngineProcess


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose `nvidia-smi` lists two cards, one of them cut in two."""
    listed = [
        "GPU 0: Some Card (UUID: GPU-1)",
        "  MIG 3g.20gb Device  0: (UUID: MIG-1)",
        "  MIG 3g.20gb Device  1: (UUID: MIG-2)",
    ]
    listed.append("GPU 1: Some Card (UUID: GPU-2)")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in listed))
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
def test_one_process_a_gpu(two_gpus, monkeypatch, visible, device, engines):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = engine_environments(device)
    assert {name: each.get("CUDA_VISIBLE_DEVICES") for name, each in found.items()} == engines


def test_without_a_driver_one_process_draws_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engine_environments("auto") == {"cpu": {}}


def test_it_is_warm_before_it_is_ready(tmp_path: Path):
    mark, engine = tmp_path / "warm", "tests.support.engines:create_slow_to_warm"
    with served(
        tmp_path, engine=engine, engine_options={"mark": str(mark)}, wait_ready=False
    ) as client:
        wait_until(lambda: client.get("/ping").status_code == 200, 20)
        assert mark.exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_what_the_engine_logs_looks_as_the_log_of_its_service(tmp_path: Path, capfd, as_json: bool):
    engine = "tests.support.engines:create_logging"
    with served(tmp_path, engine=engine, log_json=as_json):
        pass
    (line,) = [
        line
        for line in capfd.readouterr().err.splitlines()
        if "a file is left out (broken)." in line
    ]
    if as_json:
        said = json.loads(line)
        assert (said["event"], said["level"], said["engine"]) == (
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
        seen: list[tuple[str, str]] = []

        async def taken(holding: str | None = None) -> Any:
            job = await claim(holding)
            seen.append(("taken", job.id))
            return job

        async def ended(job_id: str, outcome: Any) -> None:
            seen.append(("over", job_id))
            await complete(job_id, outcome)

        monkeypatch.setattr(job_queue, "claim", taken)
        monkeypatch.setattr(job_queue, "complete", ended)
        body = {"prompt": "x", "steps": 5, "width": 512, "height": 512, "format": "webp"}
        ids = [
            client.post("/alpha/v1/jobs", json={**body, "seed": i}).json()["id"] for i in range(3)
        ]
        wait_until(lambda: seen.count(("over", ids[2])), 30)
        assert seen.index(("taken", ids[1])) < seen.index(("over", ids[0]))
        assert seen.index(("taken", ids[2])) < seen.index(("over", ids[1]))


def test_what_waits_to_be_stored_stops_the_drawing(tmp_path: Path):
    """A bucket that hangs: one batch waits to be stored, the next one is drawn, and no more."""
    drawn: list[str] = []
    may_store = threading.Event()

    class Counting(FakeEngine):
        def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
            drawn.append(tasks[0].request.prompt)
            return super().render(tasks)

    class Hanging(ObjectStorage):
        def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
            may_store.wait(10)
            super().put(key, data, replace=replace)

    storage = Hanging(open_storage(str(tmp_path))._store, str(tmp_path))
    process = EngineProcess(io.BytesIO(), io.BytesIO())
    renderer = process.create_renderer(Counting(), storage)
    jobs = [
        Job.new(JobSpec(generation=GenerationRequest(prompt=name, width=64, height=64, steps=1)))
        for name in "abcd"
    ]
    drawing = threading.Thread(target=lambda: [process.run(renderer, (job,)) for job in jobs])
    drawing.start()
    wait_until(lambda: drawn == ["a", "b"])
    drawing.join(0.3)
    assert drawn == ["a", "b"]
    may_store.set()
    drawing.join(10)
    wait_until(lambda: len(list(tmp_path.iterdir())) == len(jobs))
