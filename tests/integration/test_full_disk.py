"""A full disk and a read-only folder, on a small filesystem.

Skipped where no filesystem may be mounted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.support.serving import free_port, served, wait_until

from alphalayer.service import health

BODY = {"prompt": "x", "steps": 2, "width": 512, "height": 512}


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Mount a filesystem that is little larger than the space a ready service needs."""
    monkeypatch.setattr(health, "PROBE_EVERY_S", 0.1)
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("needs mount")
    if mounted.returncode:
        pytest.skip("needs the right to mount a filesystem")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Fill the disk, and return the file that does it."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        return filler


def remount(folder: Path, rights: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{rights}", folder], check=True)


def assert_storage_failed(answer: httpx.Response, reason: str) -> None:
    """Check for a storage error with the reason and a hint."""
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (507, "storage_failed"), answer.text
    assert "space" in problem["hint"]
    assert reason in problem["detail"].lower()


def test_full_outputs_folder_returns_storage_failed(tmp_path, small_disk):
    with served(tmp_path, outputs_dir=small_disk) as client:
        filler = fill(small_disk)
        assert_storage_failed(client.post("/alpha/v1/txt2img", json=BODY), "no space")
        assert client.get("/livez").status_code == 200
        assert [file.name for file in small_disk.iterdir()] == ["filler"]
        problem = "the disk of the images has 0.0 MB left."
        wait_until(lambda: client.get("/readyz").json().get("problem") == problem)
        assert client.get("/readyz").status_code == 503
        filler.unlink()
        wait_until(lambda: client.get("/readyz").status_code == 200)
        response = client.post("/alpha/v1/txt2img", json=BODY)
        assert client.get(response.json()["url"]).status_code == 200


def test_read_only_outputs_folder_returns_storage_failed(tmp_path, small_disk):
    with served(tmp_path, outputs_dir=small_disk) as client:
        remount(small_disk, "ro")
        assert_storage_failed(client.post("/alpha/v1/txt2img", json=BODY), "read-only")
        wait_until(lambda: client.get("/readyz").status_code == 503)
        remount(small_disk, "rw")
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/alpha/v1/txt2img", json=BODY).status_code == 200


def test_full_journal_refuses_jobs_and_keeps_accepted_ones(tmp_path, small_disk):
    """Complete accepted jobs once there is space, and refuse unwritable jobs."""
    with served(tmp_path, data_dir=small_disk, engine_options={"step_s": 0.2}) as client:
        accepted = client.post("/alpha/v1/jobs", json=BODY).json()["id"]
        waiting = client.post("/alpha/v1/jobs", json=BODY).json()["id"]
        filler = fill(small_disk)
        wait_until(lambda: client.post("/alpha/v1/jobs", json=BODY).status_code == 507)
        assert_storage_failed(client.post("/alpha/v1/txt2img", json=BODY), "full")
        assert client.get(f"/alpha/v1/jobs/{accepted}").json()["state"] in ("queued", "running")
        # a queued job cannot be cancelled, and stays in the queue
        assert_storage_failed(client.delete(f"/alpha/v1/jobs/{waiting}"), "full")
        assert "disk is full" in client.get("/readyz").json()["problem"]
        filler.unlink()
        wait_until(lambda: client.get("/readyz").status_code == 200)
        for job in (accepted, waiting):
            wait_until(
                lambda job=job: client.get(f"/alpha/v1/jobs/{job}").json()["state"] == "done", 20
            )
        assert client.post("/alpha/v1/txt2img", json=BODY).status_code == 200


def test_full_disk_at_the_start_exits_with_a_message(tmp_path, small_disk):
    """Start the service on a full disk: it reports the error and exits."""
    fill(small_disk)
    command = [sys.executable, "-m", "alphalayer", "serve", "--port", str(free_port())]
    environment = {**os.environ, "ALPHALAYER_DATA_DIR": str(small_disk / "data")}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert "cannot be opened" in result.stderr
    assert "space" in result.stderr
    assert "Traceback" not in result.stderr
