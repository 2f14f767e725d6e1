"""Kills engine processes and whole services while clients ask for pictures, then counts: every accepted job has ended once, with
its files. `python -m tests.stress.kills --engine-kills 100 --service-kills 20`; Linux."""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from alphalayer import images
from tests import fake_service
from tests.serving import free_port, wait_until

STEP_S = 0.01
SIDE = 64
GIVEN_UP = "engine_failed"
"""How a job ends that took engine processes down as often as it may."""


class Storm:
    """A service under load from a few clients, and who kills it."""

    def __init__(self, folder: Path, clients: int = 4):
        self._folder, self._port = folder, free_port()
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=30, trust_env=False)
        self._service = fake_service.start(folder, self._port, STEP_S, 60)
        self._ready()
        self._accepted: dict[str, int] = {}
        self._calm = threading.Event()
        self._clients = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(clients)]
        for client in self._clients:
            client.start()

    def kill_engine(self) -> None:
        """kill -9 the engine process, as soon as there is one."""
        while not (found := _children(self._service.pid)):
            time.sleep(0.01)
        os.kill(found[0], signal.SIGKILL)

    def kill_service(self) -> None:
        """kill -9 the service and start it again."""
        self._service.kill()
        self._service.wait()
        self._service = fake_service.start(self._folder, self._port, STEP_S, 60)
        self._ready()

    def count(self, patience_s: float = 120.0) -> dict[str, Any]:
        """Let no more jobs in, wait until all are over, and say what became of them; `faults` is empty if all is well."""
        self._calm.set()
        for client in self._clients:
            client.join()
        wait_until(lambda: self._http.get("/ping").status_code == 200, 60)
        wait_until(lambda: not self._unfinished(), patience_s)
        known = self._all_jobs()
        faults = [f"{each} was accepted and is lost" for each in self._accepted if each not in known]
        faults += [f"{each} is there and nobody asked for it" for each in known if each not in self._accepted]
        files = {file.name for file in (self._folder / "outputs").iterdir()}
        wanted: list[str] = []
        for job_id, job in known.items():
            names = [each["filename"] for each in job["images"]]
            wanted += names
            if job["state"] == "done" and len(names) != self._accepted.get(job_id):
                faults.append(f"{job_id} has {len(names)} pictures and not {self._accepted.get(job_id)}")
            if job["state"] != "done" and (job["error"] or {}).get("code") != GIVEN_UP:
                faults.append(f"{job_id} is {job['state']}: {job['error']}")
            faults += [
                f"{each['filename']} cannot be read" for each in job["images"] if not self._is_whole(each["url"])
            ]
        faults += [f"{name} belongs to two jobs" for name, count in Counter(wanted).items() if count > 1]
        given_up = [job_id[:10] for job_id, job in known.items() if job["state"] == "failed"]
        stray = [name for name in files - set(wanted) if not any(job_id in name for job_id in given_up)]
        faults += [f"{name} belongs to no job" for name in stray]
        states = Counter(job["state"] for job in known.values())
        return {"accepted": len(self._accepted), **states, "pictures": len(wanted), "faults": faults}

    def stop(self) -> None:
        """End the service."""
        self._calm.set()
        self._service.kill()
        self._service.wait()
        self._http.close()

    def _ready(self) -> None:
        wait_until(self._answers, 60)

    def _answers(self) -> bool:
        try:
            return self._http.get("/livez").status_code == 200
        except httpx.TransportError:
            return False

    def _ask(self, number: int) -> None:
        """Ask for pictures again and again; an answer that was lost is asked for again with the same key."""
        rng = random.Random(number)
        with httpx.Client(base_url=self._http.base_url, timeout=30, trust_env=False) as http:
            while not self._calm.is_set():
                count = rng.randint(1, 2)
                body = {"prompt": "x", "width": SIDE, "height": SIDE, "steps": rng.randint(1, 12), "batch_size": count}
                key = {"Idempotency-Key": secrets.token_hex(8)}
                while True:
                    try:
                        answer = http.post("/alpha/v1/jobs", json=body, headers=key)
                    except httpx.TransportError:
                        time.sleep(0.05)
                        continue
                    break
                if answer.status_code == 202:
                    self._accepted[answer.json()["id"]] = count
                time.sleep(0.2 if answer.status_code == 429 else rng.uniform(0.02, 0.1))

    def _all_jobs(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        before: float | None = None
        while True:
            query = {"limit": 200, **({"before": before} if before else {})}
            page = self._http.get("/alpha/v1/jobs", params=query).json()
            found |= {each["id"]: each for each in page["jobs"]}
            before = page["next_before"]
            if before is None:
                return found

    def _unfinished(self) -> bool:
        return any(
            self._http.get("/alpha/v1/jobs", params={"state": state, "limit": 1}).json()["jobs"]
            for state in ("queued", "running")
        )

    def _is_whole(self, url: str) -> bool:
        answer = self._http.get(url)
        return answer.status_code == 200 and images.decode(answer.content)[0].shape == (SIDE, SIDE, 4)


def run(folder: Path, engine_kills: int, service_kills: int, seed: int = 0) -> dict[str, Any]:
    """Mix the kills at random moments; what `Storm.count` says."""
    rng = random.Random(seed)
    kills = ["kill_engine"] * engine_kills + ["kill_service"] * service_kills
    rng.shuffle(kills)
    storm = Storm(folder)
    try:
        for kill in kills:
            time.sleep(rng.uniform(0.2, 1.5))
            getattr(storm, kill)()
        return storm.count()
    finally:
        storm.stop()


def _children(pid: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(each) for each in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine-kills", type=int, default=100)
    parser.add_argument("--service-kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        result = run(Path(folder), options.engine_kills, options.service_kills, options.seed)
        print(json.dumps({**vars(options), "seconds": round(time.monotonic() - start), **result}, indent=1))
        sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
