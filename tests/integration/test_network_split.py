"""A worker without a network to the database: packets are lost, no connection is closed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.support import fake_service
from tests.support.servers import Postgres, postgres_programs
from tests.support.serving import free_port, wait_until

HERE, THERE = "10.213.77.1", "10.213.77.2"
NOBODY = "02:00:00:00:00:99"


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def can_make_hosts() -> bool:
    """Whether this machine lets us make network namespaces."""
    if sys.platform != "linux" or os.getuid() != 0 or not shutil.which("ip"):
        return False
    name = f"probe{os.getpid()}"  # two test processes ask at the same moment
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    return made.returncode == 0 and bool(ip("netns", "delete", name) or True)


class FarHost:
    """A second host (a network namespace) with one cable to this one."""

    def __init__(self):
        self.name = f"far{os.getpid()}"
        self._near = f"near{os.getpid()}"[:15]
        self.run = ("ip", "netns", "exec", self.name)
        ip("netns", "add", self.name)
        ip("link", "add", self._near, "type", "veth", "peer", "name", "cable", "netns", self.name)
        ip("address", "add", f"{HERE}/30", "dev", self._near)
        ip("link", "set", self._near, "up")
        for command in (f"address add {THERE}/30 dev cable", "link set cable up", "link set lo up"):
            ip("-netns", self.name, *command.split())

    def cut(self) -> None:
        """From now on what is sent reaches nobody, in both directions."""
        ip("neighbour", "replace", THERE, "lladdr", NOBODY, "dev", self._near, "nud", "permanent")
        ip(
            "-netns",
            self.name,
            "neighbour",
            "replace",
            HERE,
            "lladdr",
            NOBODY,
            "dev",
            "cable",
            "nud",
            "permanent",
        )

    def heal(self) -> None:
        """As before."""
        ip("neighbour", "delete", THERE, "dev", self._near)
        ip("-netns", self.name, "neighbour", "delete", HERE, "dev", "cable")

    def remove(self) -> None:
        ip("netns", "delete", self.name)


@pytest.fixture
def far_host() -> Iterator[FarHost]:
    host = FarHost()
    yield host
    host.remove()


@pytest.mark.skipif(
    not postgres_programs() or not can_make_hosts(),
    reason="needs PostgreSQL and network namespaces",
)
def test_the_job_of_a_worker_that_is_cut_off_is_taken_over_and_its_late_result_changes_nothing(
    tmp_path: Path, far_host: FarHost
):
    postgres = Postgres(f"127.0.0.1,{HERE}")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    started: list[subprocess.Popen[bytes]] = []

    def start(
        role: str, name: str, step_s: float, *, far: bool = False
    ) -> tuple[subprocess.Popen[bytes], str]:
        folder, port = tmp_path / name, free_port()
        folder.mkdir()
        (folder / "outputs").symlink_to(pictures)
        address = postgres.address("postgres", HERE if far else "127.0.0.1")
        environment = {"ALPHALAYER_ROLE": role, "ALPHALAYER_DATABASE": address}
        process = fake_service.start(
            folder, port, step_s, 200, environment, far_host.run if far else ()
        )
        started.append(process)
        said = "engine.ready" if role == "worker" else "service.started"
        wait_until(lambda: said in log_of(name), 60)
        return process, f"http://127.0.0.1:{port}"

    def log_of(name: str) -> str:
        return (tmp_path / name / "service.log").read_text()

    try:
        _, api = start("api", "api", 0)
        start("worker", "far", 0.3, far=True)
        with httpx.Client(base_url=api, trust_env=False, timeout=30) as client:
            wait_until(lambda: client.get("/ping").status_code == 200, 30)

            def ask(prompt: str) -> str:
                answer = client.post(
                    "/alpha/v1/jobs", json={"prompt": prompt, "width": 64, "height": 64}
                )
                assert answer.status_code == 202, answer.text
                return answer.json()["id"]

            def job(job_id: str) -> dict:
                return client.get(f"/alpha/v1/jobs/{job_id}").json()

            first = ask("drawn twice")
            wait_until(lambda: job(first)["state"] == "running", 30)
            far_host.cut()
            cut_at = time.monotonic()
            near, _ = start("worker", "near", 0.01)
            second = ask("asked for while the cable is cut")
            wait_until(lambda: job(second)["state"] == "done", 30)
            wait_until(lambda: job(first)["state"] == "done", 60)
            assert time.monotonic() - cut_at < 45
            taken_over = job(first)
            picture = client.get(taken_over["images"][0]["url"]).content
            far_host.heal()

            wait_until(lambda: "job.stale_outcome_ignored" in log_of("far"), 90)
            assert job(first) == taken_over
            assert client.get(taken_over["images"][0]["url"]).content == picture

            # and the far worker is of use again, and hears what is asked of it
            near.terminate()
            near.wait(60)
            third, fourth = ask("after the cable was mended"), ask("no longer wanted")
            wait_until(lambda: job(third)["state"] == "done", 60)
            wait_until(lambda: job(fourth)["state"] == "running", 30)
            client.delete(f"/alpha/v1/jobs/{fourth}")
            wait_until(lambda: job(fourth)["state"] == "cancelled", 4)
    finally:
        for process in started:
            process.kill()
            process.wait()
        postgres.remove()
