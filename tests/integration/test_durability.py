"""Durability of accepted jobs: engine processes and services are killed with SIGKILL."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs
from tests.support import fake_service
from tests.support.serving import answers, free_port, put_model, served, wait_until

from alphalayer.core.errors import StorageFailed
from alphalayer.core.job import Job, JobSpec, JobState
from alphalayer.core.request import GenerationRequest
from alphalayer.jobs import sqlite
from alphalayer.jobs.base import MAX_STARTS
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.jobs.table import Journal
from alphalayer.observability import background
from alphalayer.worker.messages import Open, Stopped, read_report, write_message

pytestmark = pytest.mark.skipif(os.name == "nt", reason="uses signal 9")
BODY = {"prompt": "an apple", "steps": 10, "width": 64, "height": 64}


def engine_pid(client) -> int | None:
    return client.app.state.parts.pool.supervisors[0].process_id


def running_starts(client) -> int:
    """Return the starts of the running job, or 0."""
    jobs = [record.job for record in list(client.app.state.parts.job_queue._open_jobs.values())]
    return next((job.starts for job in jobs if job.state is JobState.RUNNING), 0)


def limit_silence(client, silence_limit_s: float) -> None:
    """Set the limit after the start of the process, which takes long under load."""
    supervisor = client.app.state.parts.pool.supervisors[0]
    supervisor._spec = dataclasses.replace(supervisor._spec, silence_limit_s=silence_limit_s)


def kill_engine(client) -> None:
    wait_until(lambda: engine_pid(client) is not None)
    os.kill(engine_pid(client), signal.SIGKILL)


def test_chain_of_a_killed_engine_process_is_stored_once(tmp_path):
    with served(put_model(tmp_path), engine_options={"step_s": 0.05}) as client:
        body = {"prompt": "an apple", "width": 64, "height": 64, "steps": 10}
        url = client.post("/alpha/v1/jobs/layers", json=body).json()["url"]
        # in the middle of the second stage
        wait_until(lambda: client.get(url).json()["step"] > 12)
        kill_engine(client)
        wait_until(lambda: client.get(url).json()["state"] == "done", 60)
        images = client.get(url).json()["images"]
        assert [image["role"] for image in images] == [
            "background",
            "foreground",
            "blended",
            "composite",
        ]
        stored = {path.name for path in (tmp_path / "outputs").iterdir()}
        assert stored == {image["filename"] for image in images}


def test_job_survives_a_killed_engine_process(tmp_path):
    with (
        served(tmp_path, engine_options={"step_s": 0.1}) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        waiting = [
            pool.submit(client.post, "/alpha/v1/txt2img", json={**BODY, "seed": i})
            for i in range(4)
        ]
        time.sleep(0.5)
        first = engine_pid(client)
        kill_engine(client)
        answers = [response.result(60) for response in waiting]
        assert [answer.status_code for answer in answers] == [200] * 4
        names = {answer.json()["filename"] for answer in answers}
        assert {path.name for path in (tmp_path / "outputs").iterdir()} == names
        assert engine_pid(client) != first
        assert client.get("/ping").status_code == 200


def test_job_that_kills_its_engine_fails_and_next_completes(tmp_path):
    with (
        served(tmp_path, engine_options={"step_s": 0.2}) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        crashing = pool.submit(client.post, "/alpha/v1/txt2img", json={**BODY, "steps": 150})
        for start in range(1, MAX_STARTS + 1):
            wait_until(lambda start=start: running_starts(client) == start, 20)
            kill_engine(client)
        answer = crashing.result(20)
        assert answer.status_code == 500
        problem = answer.json()
        assert problem["code"] == "engine_failed"
        assert f"{MAX_STARTS} times" in problem["detail"]
        assert client.post("/alpha/v1/txt2img", json={**BODY, "steps": 1}).status_code == 200
        metrics = client.get("/metrics").text
        assert 'alphalayer_jobs_total{outcome="engine_failed"} 1.0' in metrics
        assert 'alphalayer_jobs_total{outcome="done"} 1.0' in metrics


def test_broken_engine_fails_only_the_job_that_broke_it(tmp_path):
    large = {**BODY, "width": 1024, "height": 1024, "format": "webp"}
    bodies = [large, BODY, {**BODY, "prompt": "boom"}, BODY, BODY]
    with served(tmp_path, engine="tests.support.engines:create_breaking") as client:
        jobs = [client.post("/alpha/v1/jobs", json=body).json()["url"] for body in bodies]
        wait_until(lambda: all(client.get(job).json()["finished_at"] for job in jobs), 30)
        finished_jobs = [client.get(job).json() for job in jobs]
        assert [job["state"] for job in finished_jobs] == ["done", "done", "failed", "done", "done"]
        assert finished_jobs[2]["error"]["code"] == "engine_failed"
        assert "illegal memory access" in finished_jobs[2]["error"]["detail"]
        metrics = client.get("/metrics").text
        assert f'alphalayer_engine_starts_total{{engine="cpu"}} {MAX_STARTS + 1}.0' in metrics
        wait_until(lambda: client.get("/ping").status_code == 200)
    with closing(sqlite3.connect(tmp_path / "data" / "jobs.sqlite")) as journal:
        starts = [row[0] for row in journal.execute("SELECT starts FROM jobs ORDER BY created_at")]
    # the large one was still being stored when the GPU broke
    assert (starts[0], starts[2]) == (1, MAX_STARTS)


def test_job_with_a_lost_start_survives_one_engine_error(tmp_path):
    """Start a job on a queue that closes, then run it on a GPU that fails once."""

    async def start_and_close() -> str:
        job_queue = await SqliteJobQueue.open(tmp_path / "data" / "jobs.sqlite", 10)
        request = GenerationRequest(prompt="x", steps=1, width=64, height=64)
        job = await job_queue.submit(JobSpec(generation=request))
        await job_queue.mark_started((await job_queue.claim()).id)
        await job_queue.close()
        return job.id

    job_id = asyncio.run(start_and_close())
    options = {"mark": str(tmp_path / "broken")}
    with served(
        tmp_path,
        engine="tests.support.engines:create_broken_once",
        engine_options=options,
    ) as client:
        wait_until(lambda: client.get(f"/alpha/v1/jobs/{job_id}").json()["finished_at"], 30)
        assert client.get(f"/alpha/v1/jobs/{job_id}").json()["state"] == "done"


@pytest.mark.parametrize("name", ["create_unwarmable", "create_nothing"])
def test_unopenable_engine_reports_the_error_and_exits(tmp_path, name: str):
    opening = Open(
        name="cpu",
        engine=f"tests.support.engines:{name}",
        options={},
        storage=str(tmp_path),
        logs={"level": "info", "as_json": False},
    )
    with subprocess.Popen(
        [sys.executable, "-m", "alphalayer.worker.engine_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdin.write(write_message(opening))
        process.stdin.flush()
        message = read_report(process.stdout.readline())
        assert isinstance(message, Stopped)
        assert message.error.code == "engine_failed"
        expected = "IndexError" if name == "create_unwarmable" else "AttributeError"
        assert expected in message.error.message
        # its input is still open
        assert process.wait(20) == 1
        assert expected in process.stderr.read().decode()


def test_hanging_engine_is_killed(tmp_path):
    with served(tmp_path, engine_options={"step_s": 30}) as client:
        limit_silence(client, 1.0)
        first = engine_pid(client)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            hanging = pool.submit(client.post, "/alpha/v1/txt2img", json=BODY, timeout=5)
            wait_until(lambda: engine_pid(client) not in (None, first), 20)
            with pytest.raises(httpx.ReadTimeout):
                hanging.result()


def test_database_delay_is_not_taken_for_a_hanging_engine(tmp_path, monkeypatch):
    with served(tmp_path) as client:
        limit_silence(client, 0.5)
        first, job_queue = engine_pid(client), client.app.state.parts.job_queue
        mark_started = job_queue.mark_started

        async def mark_started_late(job_id: str) -> None:
            await asyncio.sleep(2.5)
            await mark_started(job_id)

        monkeypatch.setattr(job_queue, "mark_started", mark_started_late)
        assert client.post("/alpha/v1/txt2img", json=BODY).status_code == 200
        assert engine_pid(client) == first


def test_engine_hanging_at_start_is_killed(tmp_path):
    engine = "tests.support.engines:create_hanging"
    with served(tmp_path, engine=engine, wait_ready=False, silence_limit_s=0.5) as client:
        wait_until(lambda: "signal 9" in client.get("/readyz").text, 20)
        assert "silence_limit_s" in client.get("/readyz").text


def test_failed_engine_start_is_retried(tmp_path, monkeypatch):
    with served(tmp_path) as client:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
        kill_engine(client)
        wait_until(lambda: "cannot be started" in client.get("/readyz").text)
        monkeypatch.undo()
        assert client.post("/alpha/v1/txt2img", json=BODY).status_code == 200


def test_failed_supervisor_is_restarted_with_its_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "PAUSE_S", 0.1)
    with served(tmp_path, engine_options={"step_s": 0.05}) as client:
        job_queue = client.app.state.parts.job_queue
        report_progress, errors = job_queue.report_progress, [RuntimeError("unexpected")]

        async def fail(job_id, progress):
            if errors:
                raise errors.pop()
            await report_progress(job_id, progress)

        monkeypatch.setattr(job_queue, "report_progress", fail)
        assert client.post("/alpha/v1/txt2img", json=BODY).status_code == 200
        assert errors == []


def test_killed_service_completes_its_jobs_after_a_restart(tmp_path):
    """Kill a service with six jobs: the next start completes each job once."""
    port = free_port()
    service = fake_service.start(tmp_path, port, 0.05)
    url = f"http://127.0.0.1:{port}"
    with (
        httpx.Client(base_url=url, trust_env=False, timeout=20) as client,
        concurrent.futures.ThreadPoolExecutor(6) as pool,
    ):
        wait_until(lambda: answers(url), 30)
        requests = [
            pool.submit(client.post, "/alpha/v1/txt2img", json={**BODY, "seed": i})
            for i in range(6)
        ]
        query = {"state": "running"}
        wait_until(lambda: len(client.get("/alpha/v1/jobs").json()["jobs"]) == 6)
        wait_until(lambda: client.get("/alpha/v1/jobs", params=query).json()["jobs"])
        service.send_signal(signal.SIGKILL)
        service.wait()
        failed = [request for request in requests if request.exception() is not None]
        assert failed
        service = fake_service.start(tmp_path, port, 0.0)
        try:
            wait_until(lambda: answers(url), 30)
            wait_until(lambda: len(list((tmp_path / "outputs").glob("*.png"))) == 6, 20)
        finally:
            service.terminate()
            service.wait(20)
    jobs = asyncio.run(_all_jobs(tmp_path))
    assert [job.state for job in jobs] == [JobState.DONE] * 6
    stored = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert {image.key for job in jobs if job.result for image in job.result.images} == stored


def test_restart_keeps_order_and_fails_jobs_past_max_starts(tmp_path):
    async def scenario() -> None:
        spec = JobSpec(generation=GenerationRequest(prompt="x"))
        job_queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10)
        ids = [(await job_queue.submit(spec)).id for _ in range(4)]
        assert (await job_queue.claim()).id == ids[0]
        for _ in range(MAX_STARTS):
            await job_queue.mark_started(ids[0])
        await job_queue.claim()
        await job_queue.mark_started(ids[1])
        await job_queue.close()

        reopened = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10)
        failed = await reopened.view(ids[0])
        assert failed is not None
        assert failed.job.state is JobState.FAILED
        assert [view.job.id for view in await reopened.list(state=JobState.QUEUED)] == ids[:0:-1]
        assert [(await reopened.claim()).id for _ in range(3)] == ids[1:]
        await reopened.close()

    asyncio.run(scenario())


def test_queue_opens_while_outcomes_cannot_be_written(tmp_path, monkeypatch):
    async def scenario() -> None:
        spec = JobSpec(generation=GenerationRequest(prompt="x"))
        job_queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10)
        stopped, waiting = [(await job_queue.submit(spec)).id for _ in range(2)]
        await job_queue.mark_started((await job_queue.claim()).id)
        await job_queue.cancel(stopped)
        await job_queue.close()

        monkeypatch.setattr(sqlite, "STARTUP_S", 0.1)
        with monkeypatch.context() as full_disk, capture_logs() as logs:
            full_disk.setattr(Journal, "save", fail_to_save)
            reopened = await asyncio.wait_for(SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10), 5)
            assert (await reopened.claim()).id == waiting
        assert ("job.outcome_write_failed", stopped) in [
            (line["event"], line.get("job")) for line in logs
        ]
        assert (await asyncio.wait_for(reopened.wait(stopped), 5)).state is JobState.CANCELLED
        await reopened.close()

    async def fail_to_save(_journal: Journal, _job: Job) -> bool:
        raise StorageFailed("the disk is full.")

    asyncio.run(scenario())


async def _all_jobs(folder: Path):
    job_queue = await SqliteJobQueue.open(folder / "data" / "jobs.sqlite", 10)
    try:
        return [view.job for view in await job_queue.list()]
    finally:
        await job_queue.close()
