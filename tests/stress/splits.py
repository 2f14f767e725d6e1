"""Stress test of what many clients observe while pods are killed, paused and cut off.

Pods and workers share PostgreSQL, one folder of images, and nothing else. Each reaches the
database through a cable of its own, which can be cut: no packet comes through, and no
connection is closed. Then the history of all requests is checked. Linux only:
`python -m tests.stress.splits --minutes 10 --write benchmarks/results/splits.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.stress.history import FINAL, History, Operation, find_contradictions, find_overtaken, now
from tests.stress.pods import Node
from tests.stress.report import write_report
from tests.support.servers import Postgres
from tests.support.serving import free_port, wait_until

STEP_S = 0.02
CALM_S = 20.0
"""Seconds without disruptions at the end, in which the order of the jobs is checked."""
BATCH = 8
"""Jobs of one batch, at most: the fake engine renders 8 images of 64x64 together."""


class Cable:
    """A forwarder of TCP connections to one server, which can be cut and healed."""

    def __init__(self, target: str):
        self.port = free_port()
        self._host, self._target_port = target.split(":")
        self._loop = asyncio.new_event_loop()
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        self._tasks: set[asyncio.Task[None]] = set()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connect, "127.0.0.1", self.port), self._loop
        ).result(10)

    def cut(self) -> None:
        """Forward nothing. Connections stay open, and new ones get no answer."""
        self._loop.call_soon_threadsafe(self._is_whole.clear)

    def heal(self) -> None:
        """Forward everything, also what was sent meanwhile."""
        self._loop.call_soon_threadsafe(self._is_whole.set)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await self._is_whole.wait()
            far_reader, far_writer = await asyncio.open_connection(self._host, self._target_port)
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._is_whole.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


class Clients:
    """Threads that send random requests to random pods and record the answers."""

    def __init__(self, pods: list[str], history: History, webhook_url: str, count: int):
        self._pods, self._history, self._webhook_url = pods, history, webhook_url
        self._jobs: list[str] = []
        self._is_over = threading.Event()
        self.failures: Counter[str] = Counter()
        """Requests without a usable answer, by kind and status."""
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the running requests."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def view_all(self) -> None:
        """View each job on each pod, and read its images there."""
        with httpx.Client(timeout=30, trust_env=False) as http:
            for pod in self._pods:
                for job_id in self._jobs:
                    for name in self._view(http, pod, job_id):
                        self._read(http, pod, name)

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        kinds = {self._submit: 8, self._view_any: 12, self._list: 1, self._cancel: 2}
        with httpx.Client(timeout=10, trust_env=False) as http:
            while not self._is_over.is_set():
                action = rng.choices(list(kinds), list(kinds.values()))[0]
                action(http, rng)
                time.sleep(rng.uniform(0.02, 0.2))

    def _request(self, http: httpx.Client, method: str, url: str, **options: Any) -> Any:
        """Return the answer, or None if none came or the service could not do it now."""
        try:
            answer = http.request(method, url, **options)
        except httpx.TransportError as error:
            self.failures[f"{method} {type(error).__name__}"] += 1
            return None
        if answer.status_code in (200, 202, 404):
            return answer
        self.failures[f"{method} {answer.status_code}"] += 1
        return None

    def _submit(self, http: httpx.Client, rng: random.Random) -> None:
        """Submit a job, and repeat it on any pod until it is answered."""
        key = secrets.token_hex(8)
        body = {
            "prompt": key,
            "width": 64,
            "height": 64,
            "steps": rng.randint(1, 10),
            "webhook_url": self._webhook_url,
        }
        for _ in range(rng.choice([1, 5, 20])):
            sent_at, pod = now(), rng.choice(self._pods)
            answer = self._request(
                http, "POST", f"{pod}/alpha/v1/jobs", json=body, headers={"Idempotency-Key": key}
            )
            if answer is not None:
                self._record(Operation("submit", sent_at, now(), key), answer)
                self._jobs.append(answer.json()["id"])
                return
            time.sleep(rng.uniform(0.05, 0.5))

    def _view_any(self, http: httpx.Client, rng: random.Random) -> None:
        if self._jobs:
            # mostly recent jobs, which change
            job_id = rng.choice(self._jobs[-20:] if rng.random() < 0.8 else self._jobs)
            for name in self._view(http, rng.choice(self._pods), job_id):
                self._read(http, rng.choice(self._pods), name)

    def _view(self, http: httpx.Client, pod: str, job_id: str) -> list[str]:
        """View a job. Return the names of its images."""
        sent_at = now()
        answer = self._request(http, "GET", f"{pod}/alpha/v1/jobs/{job_id}")
        if answer is None:
            return []
        return self._record(Operation("view", sent_at, now(), job_id), answer)

    def _cancel(self, http: httpx.Client, rng: random.Random) -> None:
        if self._jobs:
            job_id, sent_at = rng.choice(self._jobs[-5:]), now()
            url = f"{rng.choice(self._pods)}/alpha/v1/jobs/{job_id}"
            answer = self._request(http, "DELETE", url)
            if answer is not None:
                self._record(Operation("cancel", sent_at, now(), job_id), answer)

    def _list(self, http: httpx.Client, rng: random.Random) -> None:
        """List all jobs, page by page."""
        sent_at, pod, before, jobs = now(), rng.choice(self._pods), None, []
        while True:
            query = {"limit": 200, **({"before": before} if before else {})}
            answer = self._request(http, "GET", f"{pod}/alpha/v1/jobs", params=query)
            if answer is None:
                return
            page = answer.json()
            jobs += [(job["id"], job["state"]) for job in page["jobs"]]
            before = page["next_before"]
            if before is None:
                break
        self._history.add(Operation("list", sent_at, now(), jobs=tuple(jobs)))

    def _read(self, http: httpx.Client, pod: str, name: str) -> None:
        sent_at = now()
        answer = self._request(http, "GET", f"{pod}/alpha/v1/file/{name}")
        if answer is not None:
            missing = answer.status_code == 404
            content = "" if missing else hashlib.sha256(answer.content).hexdigest()
            self._history.add(
                Operation("image", sent_at, now(), name, content=content, is_missing=missing)
            )

    def _record(self, operation: Operation, answer: httpx.Response) -> list[str]:
        """Record an answer with a job. Return the names of the images."""
        fields = vars(operation)
        if answer.status_code == 404:
            self._history.add(Operation(**{**fields, "is_missing": True}))
            return []
        job = answer.json()
        names = [image["filename"] for image in job["images"]]
        content = ""
        if operation.kind == "view" and job["state"] in FINAL:
            content = json.dumps([job["state"], names, job["started_at"], job["finished_at"]])
        self._history.add(
            Operation(
                **{
                    **fields,
                    "jobs": ((job["id"], job["state"]),),
                    "content": content,
                    "started_at": job["started_at"],
                }
            )
        )
        return names


@contextlib.contextmanager
def webhook_receiver(history: History) -> Iterator[str]:
    """Record the webhooks that come to an address; yield the address."""

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            at = now()
            history.add(Operation("webhook", at, at, job["id"], ((job["id"], job["state"]),)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", free_port()), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


class Disruptions:
    """Random disruptions of nodes, their cables and the database. Each one is undone."""

    def __init__(
        self, nodes: list[Node], cables: list[Cable], postgres: Postgres, rng: random.Random
    ):
        self._nodes, self._cables, self._postgres, self._rng = nodes, cables, postgres, rng
        self.counts: Counter[str] = Counter()

    def cause_one(self) -> None:
        """Cause a disruption, wait, and undo it."""
        kinds = {
            self._kill: 4,
            self._pause: 4,
            self._split: 4,
            self._restart_database: 1,
        }
        disrupt = self._rng.choices(list(kinds), list(kinds.values()))[0]
        self.counts[disrupt.__name__.strip("_")] += 1
        disrupt()

    def _duration_s(self) -> float:
        """Return mostly a short time, and sometimes more than a claim lasts."""
        return self._rng.choice([0.3, 1.0, 3.0, 20.0])

    def _kill(self) -> None:
        node = self._rng.choice(self._nodes)
        node.kill()
        time.sleep(self._rng.uniform(0, 1))
        node.start()

    def _pause(self) -> None:
        node = self._rng.choice(self._nodes)
        with node.paused():
            time.sleep(self._duration_s())

    def _split(self) -> None:
        cable = self._rng.choice(self._cables)
        cable.cut()
        time.sleep(self._duration_s())
        cable.heal()

    def _restart_database(self) -> None:
        self._postgres.stop(signal.SIGQUIT)
        time.sleep(self._rng.uniform(0.5, 2))
        self._postgres.start()


def run(folder: Path, *, pods: int, workers: int, minutes: float, seed: int) -> dict[str, Any]:
    """Disrupt nodes while clients send requests. Return counts and what the check found."""
    rng, history = random.Random(seed), History()
    with ExitStack() as stack:
        postgres = Postgres()
        stack.callback(postgres.remove)
        webhook_url = stack.enter_context(webhook_receiver(history))
        outputs = folder / "outputs"
        outputs.mkdir()
        nodes: list[Node] = []
        cables: list[Cable] = []
        for number, role in enumerate(["api"] * pods + ["worker"] * workers):
            cable = Cable(urlsplit(postgres.url).netloc.rpartition("@")[2])
            database = postgres.url.replace(
                urlsplit(postgres.url).netloc, f"alphalayer@127.0.0.1:{cable.port}"
            )
            environment = {
                "ALPHALAYER_DATABASE": database,
                "ALPHALAYER_WEBHOOK_SECRET": "of the test",
                "ALPHALAYER_WEBHOOK_ALLOW_PRIVATE": "1",
            }
            node = Node(folder / f"{role}{number}", role, environment, 2000, outputs, STEP_S)
            stack.callback(node.stop)
            nodes.append(node)
            cables.append(cable)
        wait_until(lambda: all(node.answers() for node in nodes), 400)
        clients = Clients([node.address for node in nodes[:pods]], history, webhook_url, 8)
        stack.callback(clients.stop)
        disruptions = Disruptions(nodes, cables, postgres, rng)
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.2, 1.5))
            disruptions.cause_one()
        try:
            wait_until(lambda: all(node.answers() for node in nodes), 120)
        except AssertionError:
            errors = [f"{node.address} is not ready: {node.problem()}" for node in nodes]
            return {"disruptions": dict(disruptions.counts), "errors": errors}
        wait_until(lambda: not _unfinished(nodes[0]), 300)
        calm_at = now()
        time.sleep(CALM_S)
        clients.stop()
        wait_until(lambda: not _unfinished(nodes[0]), 300)
        clients.view_all()
        accepted = {
            operation.jobs[0][0]
            for operation in history.operations()
            if operation.kind == "submit" and operation.jobs
        }
        wait_until(lambda: not accepted - _posted(history), 900)
        operations = history.operations()
        finals = {op.key: op.jobs[0][1] for op in operations if op.kind == "view" and op.jobs}
        return {
            "operations": dict(Counter(operation.kind for operation in operations)),
            "disruptions": dict(disruptions.counts),
            "failed_requests": dict(clients.failures),
            "accepted": len(accepted),
            "states": dict(Counter(finals.values())),
            "errors": [
                *find_contradictions(operations),
                *find_overtaken(operations, calm_at, workers * 2 * BATCH),
            ],
        }


def _posted(history: History) -> set[str]:
    return {operation.key for operation in history.operations() if operation.kind == "webhook"}


def _unfinished(node: Node) -> bool:
    return any(
        httpx.get(
            f"{node.address}/alpha/v1/jobs",
            params={"state": state, "limit": 1},
            trust_env=False,
            timeout=30,
        ).json()["jobs"]
        for state in ("queued", "running")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a file for the result, as JSON")
    options = vars(parser.parse_args())
    target: Path | None = options.pop("write")
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        result = run(Path(folder), **options)
        seconds = round(time.monotonic() - start)
        write_report("splits", {**options, "seconds": seconds, **result}, target)
        sys.exit(bool(result["errors"]))


if __name__ == "__main__":
    main()
