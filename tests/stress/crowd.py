"""Clients that request images while processes are killed, and the count of what became of them.

Every accepted job must end once, with its images.
"""

from __future__ import annotations

import itertools
import random
import secrets
import threading
import time
from collections import Counter
from datetime import datetime
from typing import Any

import httpx

from alphalayer.images import codecs
from tests.support.serving import answers, wait_until

SIDE = 64
SHORT = 10
"""The number of characters of a job's id in the names of its images."""
LAST_S = 60.0
"""How long clients repeat unanswered requests once they send no new ones, in seconds."""
GIVEN_UP = "engine_failed"
"""The error of a job that ended as many engine processes as it may."""


class Crowd:
    """Clients of one service, which may have several addresses.

    `waiting` of the clients wait for their image, and the others submit jobs. Images are read
    from each address of `seen_from`, or else from `addresses`.
    """

    def __init__(
        self,
        addresses: list[str],
        clients: int = 4,
        *,
        waiting: int = 0,
        seen_from: list[str] | None = None,
    ):
        self._addresses = addresses
        self._https = [
            httpx.Client(base_url=address, timeout=30, trust_env=False)
            for address in seen_from or addresses
        ]
        self._is_calm, self._is_over = threading.Event(), threading.Event()
        self._unanswered: list[str] = []
        self._answers = [0] * clients
        self.accepted: dict[str, int] = {}
        """The number of images of each job, by the part of its id that names its images."""
        self.failures: list[str] = []
        """The errors of requests that were repeated, each with its time."""
        self._clients = [
            threading.Thread(target=self._send_requests, args=(i, i < waiting), daemon=True)
            for i in range(clients)
        ]
        for client in self._clients:
            client.start()

    def wait_for_open_requests(self) -> None:
        """Wait until each client has the answer of the request that it has sent."""
        before = list(self._answers)
        wait_until(
            lambda: all(now > old for now, old in zip(self._answers, before, strict=True)), 60
        )

    def count(self, patience_s: float = 120.0) -> dict[str, Any]:
        """Send no new requests, wait for all jobs, and count the outcomes.

        `errors` is empty if every accepted job has its images.
        """
        self.calm()
        wait_until(lambda: all(answers(str(http.base_url).rstrip("/")) for http in self._https), 60)
        wait_until(lambda: not self._unfinished(), patience_s)
        known = self._all_jobs()
        names_known = set(map(_short, known))
        errors = [
            f"{job_name} was accepted and is lost"
            for job_name in self.accepted
            if job_name not in names_known
        ]
        errors += [
            f"{job_name} was not requested" for job_name in names_known - self.accepted.keys()
        ]
        image_names: list[str] = []
        for job_id, job in known.items():
            names = [image["filename"] for image in job["images"]]
            image_names += names
            expected = self.accepted.get(_short(job_id))
            if job["state"] == "done" and len(names) != expected:
                errors.append(f"{job_id} has {len(names)} images and not {expected}")
            if job["state"] != "done" and (job["error"] or {}).get("code") != GIVEN_UP:
                errors.append(f"{job_id} is {job['state']}: {job['error']}")
            errors += [
                f"{name} cannot be read from {http.base_url}"
                for name, http in itertools.product(names, self._https)
                if not _is_whole(http, name)
            ]
        errors += [
            f"{name} belongs to two jobs"
            for name, count in Counter(image_names).items()
            if count > 1
        ]
        errors += [f"never answered: {failure}" for failure in self._unanswered]
        states = Counter(job["state"] for job in known.values())
        self.jobs, self.images = known, set(image_names)
        return {
            "accepted": len(self.accepted),
            **states,
            "images": len(image_names),
            "errors": errors,
        }

    def calm(self) -> None:
        """Send no new requests, and wait `LAST_S` seconds for open ones."""
        self._is_calm.set()
        end = time.monotonic() + LAST_S
        for client in self._clients:
            client.join(max(0.0, end - time.monotonic()))
        self._is_over.set()
        for client in self._clients:
            client.join()

    def close(self) -> None:
        """Stop the clients and close the connections."""
        self.calm()
        for http in self._https:
            http.close()

    def _send_requests(self, number: int, waits: bool) -> None:
        """Send requests to the addresses in turn; repeat a lost one with its key."""
        path, good = ("/alpha/v1/txt2img", 200) if waits else ("/alpha/v1/jobs", 202)
        rng = random.Random(number)
        order = itertools.cycle(rng.sample(self._addresses, len(self._addresses)))
        with httpx.Client(timeout=120 if waits else 30, trust_env=False) as http:
            while not self._is_calm.is_set():
                count = rng.randint(1, 2)
                body = {
                    "prompt": "x",
                    "width": SIDE,
                    "height": SIDE,
                    "steps": rng.randint(1, 12),
                    "batch_size": count,
                }
                key = {"Idempotency-Key": secrets.token_hex(8)}
                while True:
                    try:
                        answer = http.post(f"{next(order)}{path}", json=body, headers=key)
                    except httpx.TransportError as error:
                        failure = repr(error)
                    else:
                        if answer.status_code in (good, 429):
                            break
                        failure = f"{answer.status_code} {answer.text[:300]}"
                    self.failures.append(f"{datetime.now():%H:%M:%S.%f} POST {path}: {failure}")
                    if self._is_over.is_set():
                        self._unanswered.append(self.failures[-1])
                        return
                    time.sleep(0.05)
                self._answers[number] += 1
                if answer.status_code == good:
                    job = answer.json()
                    self.accepted[
                        job["filename"].split("_")[2][:SHORT] if waits else _short(job["id"])
                    ] = count
                time.sleep(0.2 if answer.status_code == 429 else rng.uniform(0.02, 0.1))

    def _all_jobs(self) -> dict[str, dict[str, Any]]:
        jobs: dict[str, dict[str, Any]] = {}
        before: float | None = None
        while True:
            query = {"limit": 200, **({"before": before} if before else {})}
            page = self._https[0].get("/alpha/v1/jobs", params=query).json()
            jobs |= {job["id"]: job for job in page["jobs"]}
            before = page["next_before"]
            if before is None:
                return jobs

    def _unfinished(self) -> bool:
        return any(
            self._https[0].get("/alpha/v1/jobs", params={"state": state, "limit": 1}).json()["jobs"]
            for state in ("queued", "running")
        )


def _short(job_id: str) -> str:
    return job_id[:SHORT]


def _is_whole(http: httpx.Client, name: str) -> bool:
    answer = http.get(f"/alpha/v1/file/{name}")
    return answer.status_code == 200 and codecs.decode(answer.content)[0].shape == (SIDE, SIDE, 4)
