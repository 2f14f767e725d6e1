"""Two services in one folder share images if each has a queue; two with one queue are refused.

Before, users started one service for each GPU.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
from tests.support.serving import FAKE, free_port, wait_until

PROGRAM = f"""
import sys

sys.modules["fastmcp"] = None  # no test here calls it, and its import takes a second
from alphalayer.cli.app import main
from alphalayer.service import app

app.create_app.__kwdefaults__["engine"] = "{FAKE}"
main()
"""
BODY = {"prompt": "an apple", "width": 64, "height": 64, "steps": 2}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the `alphalayer` command with the fake engine."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("ALPHALAYER_")
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def serving(
    folder: Path, command: str, port: int
) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    process = start(
        folder, command, "--port", str(port), *(["--always-cpu"] if "before" in command else [])
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
        try:
            wait_until(lambda: _answers(client, process), 30)
            yield client, process
        finally:
            process.kill()
            process.communicate()


def _answers(client: httpx.Client, process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None, process.communicate()[1]
    try:
        return client.get("/ping").status_code == 200
    except httpx.TransportError:
        return False


def test_two_services_with_own_queues_share_images(tmp_path: Path):
    ports = free_port(), free_port()
    with (
        serving(tmp_path, "serve-as-before", ports[0]) as (one, _),
        serving(tmp_path, "serve-as-before", ports[1]) as (other, _),
    ):
        for generating, reading in ((one, other), (other, one)):
            name = generating.post("/alpha/v1/txt2img", json=BODY).json()["filename"]
            assert reading.get(f"/alpha/v1/file/{name}").status_code == 200
        assert [len(client.get("/alpha/v1/jobs").json()["jobs"]) for client in (one, other)] == [
            1,
            1,
        ]
    assert {file.parent.name for file in tmp_path.rglob("jobs.sqlite")} == {
        str(port) for port in ports
    }


def test_second_service_on_one_queue_is_refused(tmp_path: Path):
    with serving(tmp_path, "serve", free_port()) as (_, first):
        second = start(tmp_path, "serve", "--port", str(free_port()))
        stderr = second.communicate(timeout=30)[1]
        assert second.returncode == 1
        assert f"another service uses the folder {tmp_path / 'data'}" in stderr
        assert "data_dir" in stderr
        assert "Traceback" not in stderr
        first.kill()
        first.wait()
        with serving(tmp_path, "serve", free_port()) as (client, _):
            assert client.post("/alpha/v1/txt2img", json=BODY).status_code == 200
