"""Stress test that kills engine processes and services while they generate for many clients.

Then every accepted job must have ended once, with its files. Linux only:
`python -m tests.stress.kills --engine-kills 100 --service-kills 20`. `--output` writes a report.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tests.stress.crowd import Crowd
from tests.stress.report import write_report
from tests.support import fake_service
from tests.support.processes import children_of
from tests.support.serving import answers, free_port, wait_until

STEP_S = 0.02
CLIENTS = 8


class Storm:
    """A service under load, and the means to kill it."""

    def __init__(self, folder: Path):
        self._folder, self._port = folder, free_port()
        self._address = f"http://127.0.0.1:{self._port}"
        self._http = httpx.Client(base_url=self._address, trust_env=False, timeout=30)
        self._start()
        self._crowd = Crowd([self._address], CLIENTS)

    def wait_for_work(self) -> None:
        """Wait until a job runs in the current engine process.

        The job of a killed process is requeued soon.
        """
        wait_until(lambda: self._is_ready() and self._has_running_job(), 90)

    def kill_engine(self) -> None:
        """Kill the engine process while it generates."""
        self.wait_for_work()
        os.kill(children_of(self._service.pid)[0], signal.SIGKILL)

    def kill_service(self) -> None:
        """Kill the service while its engine generates, and start it again."""
        self.wait_for_work()
        self._service.kill()
        self._service.wait()
        self._start()

    def count(self) -> dict[str, Any]:
        """Return the counts of the crowd, and report files that belong to no job."""
        counts = self._crowd.count()
        # without files whose writing a kill interrupted: a later start removes them
        files = {file.name for file in (self._folder / "outputs").iterdir() if "#" not in file.name}
        given_up = [
            job_id[:10] for job_id, job in self._crowd.jobs.items() if job["state"] == "failed"
        ]
        stray = [
            name
            for name in files - self._crowd.images
            if not any(job_id in name for job_id in given_up)
        ]
        counts["errors"] += [f"{name} belongs to no job" for name in stray]
        return counts

    def stop(self) -> None:
        """Stop the clients and the service."""
        self._crowd.close()
        self._http.close()
        self._service.kill()
        self._service.wait()

    def _start(self) -> None:
        self._service = fake_service.start(self._folder, self._port, STEP_S, 20)
        wait_until(lambda: answers(self._address, "/livez"), 60)

    def _has_running_job(self) -> bool:
        query = {"state": "running", "limit": 1}
        jobs = self._http.get("/alpha/v1/jobs", params=query).json()["jobs"]
        return bool(jobs and jobs[0]["step"])

    def _is_ready(self) -> bool:
        return self._http.get("/ping").status_code == 200


def run(folder: Path, engine_kills: int, service_kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill in random order at random moments; return `Storm.count`."""
    rng = random.Random(seed)
    kills = ["kill_engine"] * engine_kills + ["kill_service"] * service_kills
    rng.shuffle(kills)
    storm = Storm(folder)
    try:
        for kill in kills:
            storm.wait_for_work()
            # a process that never ends a job is restarted more and more slowly
            time.sleep(rng.uniform(0.2, 1.0))
            getattr(storm, kill)()
        return storm.count()
    finally:
        storm.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine-kills", type=int, default=100)
    parser.add_argument("--service-kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        result = run(Path(folder), options.engine_kills, options.service_kills, options.seed)
        report = {
            "clients": CLIENTS,
            "seed": options.seed,
            "seconds": round(time.monotonic() - start),
            **result,
        }
        write_report("kills", report, options.output)
        sys.exit(bool(result["errors"]))


if __name__ == "__main__":
    main()
