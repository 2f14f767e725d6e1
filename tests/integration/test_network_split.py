"""A worker without a network to the database: packets are lost, no connection is closed."""

from __future__ import annotations

import os
import random
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

UNKNOWN_MAC = "02:00:00:00:00:99"


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def can_create_hosts() -> bool:
    """Return whether this process can create network namespaces."""
    if sys.platform != "linux" or os.getuid() != 0 or not shutil.which("ip"):
        return False
    name = f"probe{os.getpid()}"  # two test processes may check at the same moment
    result = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    return result.returncode == 0 and bool(ip("netns", "delete", name) or True)


def unused_network() -> int:
    """Return the number of a network 10.213.number.0/30 that this host does not have.

    A killed run leaves its network behind, and two runs may share one host: a fixed network
    would send this run's packets down their cables. Names by process id would collide, too.
    """
    while True:
        number = random.randrange(256)
        if f" 10.213.{number}." not in ip("-brief", "address"):
            return number


class FarHost:
    """A second host (a network namespace) with one cable to this one."""

    def __init__(self):
        number = unused_network()
        self.near_ip, self.far_ip = f"10.213.{number}.1", f"10.213.{number}.2"
        self.name, self._near = f"far-{number}", f"near-{number}"
        self.run = ("ip", "netns", "exec", self.name)
        ip("netns", "add", self.name)
        ip("link", "add", self._near, "type", "veth", "peer", "name", "cable", "netns", self.name)
        ip("address", "add", f"{self.near_ip}/30", "dev", self._near)
        ip("link", "set", self._near, "up")
        for command in (
            f"address add {self.far_ip}/30 dev cable",
            "link set cable up",
            "link set lo up",
        ):
            ip("-netns", self.name, *command.split())

    def cut(self) -> None:
        """Drop all packets in both directions."""
        ip(
            "neighbour",
            "replace",
            self.far_ip,
            "lladdr",
            UNKNOWN_MAC,
            "dev",
            self._near,
            "nud",
            "permanent",
        )
        ip(
            "-netns",
            self.name,
            "neighbour",
            "replace",
            self.near_ip,
            "lladdr",
            UNKNOWN_MAC,
            "dev",
            "cable",
            "nud",
            "permanent",
        )

    def heal(self) -> None:
        """Deliver packets again."""
        ip("neighbour", "delete", self.far_ip, "dev", self._near)
        ip("-netns", self.name, "neighbour", "delete", self.near_ip, "dev", "cable")

    def remove(self) -> None:
        ip("netns", "delete", self.name)


@pytest.fixture
def far_host() -> Iterator[FarHost]:
    host = FarHost()
    yield host
    host.remove()


@pytest.mark.skipif(
    not postgres_programs() or not can_create_hosts(),
    reason="needs PostgreSQL and network namespaces",
)
def test_partitioned_worker_job_is_reclaimed(tmp_path: Path, far_host: FarHost):
    postgres = Postgres(f"127.0.0.1,{far_host.near_ip}")
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    processes: list[subprocess.Popen[bytes]] = []

    def start(
        role: str, name: str, step_s: float, *, far: bool = False
    ) -> tuple[subprocess.Popen[bytes], str]:
        folder, port = tmp_path / name, free_port()
        folder.mkdir()
        (folder / "outputs").symlink_to(outputs)
        address = postgres.address("postgres", far_host.near_ip if far else "127.0.0.1")
        environment = {"ALPHALAYER_ROLE": role, "ALPHALAYER_DATABASE": address}
        process = fake_service.start(
            folder, port, step_s, 200, environment, far_host.run if far else ()
        )
        processes.append(process)
        event = "engine.ready" if role == "worker" else "service.started"
        wait_until(lambda: event in log_of(name), 60)
        return process, f"http://127.0.0.1:{port}"

    def log_of(name: str) -> str:
        return (tmp_path / name / "service.log").read_text()

    try:
        _, api = start("api", "api", 0)
        start("worker", "far", 0.3, far=True)
        with httpx.Client(base_url=api, trust_env=False, timeout=30) as client:
            wait_until(lambda: client.get("/ping").status_code == 200, 30)

            def submit(prompt: str) -> str:
                answer = client.post(
                    "/alpha/v1/jobs", json={"prompt": prompt, "width": 64, "height": 64}
                )
                assert answer.status_code == 202, answer.text
                return answer.json()["id"]

            def job(job_id: str) -> dict:
                return client.get(f"/alpha/v1/jobs/{job_id}").json()

            first = submit("rendered twice")
            wait_until(lambda: job(first)["state"] == "running", 30)
            far_host.cut()
            cut_at = time.monotonic()
            near, _ = start("worker", "near", 0.01)
            second = submit("submitted while the cable is cut")
            wait_until(lambda: job(second)["state"] == "done", 30)
            wait_until(lambda: job(first)["state"] == "done", 60)
            assert time.monotonic() - cut_at < 45
            reclaimed = job(first)
            image = client.get(reclaimed["images"][0]["url"]).content
            far_host.heal()

            wait_until(lambda: "job.stale_outcome_ignored" in log_of("far"), 90)
            assert job(first) == reclaimed
            assert client.get(reclaimed["images"][0]["url"]).content == image

            # the far worker claims jobs again, and receives cancellations
            near.terminate()
            near.wait(60)
            third, fourth = submit("after the cable was restored"), submit("to be cancelled")
            wait_until(lambda: job(third)["state"] == "done", 60)
            wait_until(lambda: job(fourth)["state"] == "running", 30)
            client.delete(f"/alpha/v1/jobs/{fourth}")
            wait_until(lambda: job(fourth)["state"] == "cancelled", 4)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        postgres.remove()
