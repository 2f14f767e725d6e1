"""SIGTERM: running jobs complete, no job starts, waiting clients get an answer, no job is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from tests.support import fake_service
from tests.support.serving import FAKE, free_port, served, wait_until

from alphalayer.config import Settings
from alphalayer.service.app import create_app

pytestmark = pytest.mark.skipif(os.name == "nt", reason="uses signals")
BODY = {"prompt": "an apple", "steps": 10, "width": 64, "height": 64}


@contextmanager
def service(
    folder: Path, step_s: float, drain_s: int
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """Start a service that runs one job at a time, each of ten steps."""
    port = free_port()
    process = fake_service.start(
        folder, port, step_s, environment={"ALPHALAYER_DRAIN_S": str(drain_s)}
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        try:
            wait_until(lambda: _answers(client), 60)
            yield process, client
        finally:
            process.kill()
            process.wait()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ping").status_code == 200
    except httpx.TransportError:
        return False


def render(client: httpx.Client, seed: int) -> httpx.Response:
    return httpx.post(
        f"{client.base_url}/alpha/v1/txt2img",
        json={**BODY, "seed": seed},
        timeout=60,
        trust_env=False,
    )


def submit(client: httpx.Client, seed: int) -> dict[str, Any]:
    return client.post("/alpha/v1/jobs", json={**BODY, "seed": seed}).json()


def stop(process: subprocess.Popen[bytes]) -> float:
    """Send SIGTERM, and return the seconds until the process ended."""
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    return time.monotonic() - start


def states(client: httpx.Client) -> dict[int, str]:
    """Return the states of the jobs, oldest first."""
    jobs = client.get("/alpha/v1/jobs").json()["jobs"]
    return {number: job["state"] for number, job in enumerate(reversed(jobs))}


def test_shutdown_starts_no_job_and_answers_waiting_clients(tmp_path):
    with (
        service(tmp_path, step_s=0.1, drain_s=30) as (process, client),
        ThreadPoolExecutor(2) as pool,
    ):
        running: Future[httpx.Response] = pool.submit(render, client, 0)
        wait_until(lambda: "running" in states(client).values())
        jobs = [submit(client, seed) for seed in range(1, 7)]
        waiting: Future[httpx.Response] = pool.submit(render, client, 7)
        wait_until(lambda: len(states(client)) == 8)
        events: list[str] = []
        with httpx.stream("GET", jobs[-1]["events_url"], timeout=60, trust_env=False) as stream:
            listener = threading.Thread(target=lambda: events.extend(stream.iter_lines()))
            listener.start()
            wait_until(lambda: bool(events))
            seconds = stop(process)
            listener.join(5)
        assert running.result().status_code == 200
        response = waiting.result()
        assert (response.status_code, response.json()["code"]) == (503, "stopping")
        assert int(response.headers["retry-after"]) > 0
        assert not any(line.startswith("event: done") for line in events)
        # the running job, and one more that was already sent to the engine
        assert seconds < 4
    with service(tmp_path, step_s=0.0, drain_s=5) as (_, client):
        wait_until(lambda: set(states(client).values()) == {"done"})
        assert len(states(client)) == 8


def test_shutdown_past_drain_s_requeues_the_running_job(tmp_path):
    with (
        service(tmp_path, step_s=3.0, drain_s=1) as (process, client),
        ThreadPoolExecutor(1) as pool,
    ):
        running: Future[httpx.Response] = pool.submit(render, client, 0)
        wait_until(lambda: "running" in states(client).values())
        assert stop(process) < 3
        assert (running.result().status_code, running.result().json()["code"]) == (503, "stopping")
    # it is requeued without counting the start, because the job did not fail
    assert journal(tmp_path) == [("queued", 0)]
    with service(tmp_path, step_s=0.0, drain_s=5) as (_, client):
        wait_until(lambda: states(client) == {0: "done"})


def test_shutdown_waits_until_the_last_outcome_is_stored(tmp_path, monkeypatch):
    with served(tmp_path) as client:
        job_queue, is_completing = client.app.state.parts.job_queue, threading.Event()
        complete = job_queue.complete

        async def complete_late(job_id: str, outcome: Any) -> None:
            is_completing.set()
            await asyncio.sleep(0.5)
            await complete(job_id, outcome)

        monkeypatch.setattr(job_queue, "complete", complete_late)
        submit(client, 0)
        assert is_completing.wait(10)
    assert journal(tmp_path) == [("done", 1)]


def journal(folder: Path) -> list[tuple[str, int]]:
    """Return state and starts of each job."""
    with closing(sqlite3.connect(folder / "data" / "jobs.sqlite")) as file:
        return file.execute("SELECT state, starts FROM jobs").fetchall()


def test_stopping_service_is_not_ready_and_refuses_jobs(tmp_path):
    folders = {f"{name}_dir": tmp_path / name for name in ("models", "outputs", "data")}
    app = create_app(Settings(**folders, device="cpu", drain_s=1), engine=FAKE)
    with TestClient(app, "http://localhost") as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, 30)
        client.portal.call(app.state.shutdown.begin)
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["problem"]) == (
            503,
            "the service is being stopped.",
        )
        answer = client.post("/alpha/v1/txt2img", json=BODY)
        assert (answer.status_code, answer.json()["code"]) == (503, "stopping")
        assert client.get("/alpha/v1/jobs").json()["jobs"] == []
