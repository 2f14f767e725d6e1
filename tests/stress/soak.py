"""Clients of every dialect for a long time: no answer 5xx, and memory that does not grow.

`python -m tests.stress.soak --minutes 30 --write benchmarks/results/soak.json`. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from fastmcp import Client as McpClient

from tests.stress.hostile import memory_mb
from tests.stress.report import write_report
from tests.support.processes import children_of
from tests.support.serving import answers, free_port, wait_until

SMALL = {"prompt": "an apple", "width": 64, "height": 64, "steps": 2}
GROWTH_MB = 20
"""Accepted growth between the first and the last quarter, after a warm-up."""


class Soak:
    """A service with the embedded model, and clients in threads."""

    def __init__(self, folder: Path):
        self._folder, port = folder, free_port()
        self.address = f"http://127.0.0.1:{port}"
        command = ["-m", "alphalayer", "serve", "--port", str(port), "--queue-limit", "50"]
        environment = {**os.environ, "ALPHALAYER_WEBHOOK_SECRET": "of the test"}
        with (folder / "service.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=log
            )
        wait_until(lambda: answers(self.address), 120)
        self.statuses: Counter[str] = Counter()
        self.failures: list[str] = []
        self._is_over = threading.Event()
        self._names: list[str] = []
        actions = (self._native, self._job, self._a1111, self._openai, self._read, self._mcp)
        self._threads = [threading.Thread(target=self._repeat, args=(do,)) for do in actions]

    def run(self, minutes: float) -> list[dict[str, int]]:
        """Send requests for some time. Return the memory of each process, every ten seconds."""
        for thread in self._threads:
            thread.start()
        samples: list[dict[str, int]] = []
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end and self.process.poll() is None:
            time.sleep(10)
            samples.append(self._memory())
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        return samples

    def stop(self) -> int:
        """Stop the service. Return its exit code."""
        self.process.terminate()
        return self.process.wait(60)

    def _memory(self) -> dict[str, int]:
        return {
            "service_mb": memory_mb(self.process.pid),
            "engine_mb": sum(map(memory_mb, children_of(self.process.pid))),
        }

    def _repeat(self, action: Callable[[httpx.Client, random.Random], None]) -> None:
        rng = random.Random(action.__name__)
        with httpx.Client(base_url=self.address, timeout=120, trust_env=False) as http:
            while not self._is_over.is_set():
                try:
                    action(http, rng)
                except Exception as error:
                    self.failures.append(f"{action.__name__}: {error!r}"[:300])
                time.sleep(rng.uniform(0.05, 0.5))

    def _send(self, http: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request, and count its status. 429 is an answer as good as 200."""
        answer = http.request(method, path, **options)
        self.statuses[f"{method} {path.split('?')[0].rsplit('/', 1)[0]} {answer.status_code}"] += 1
        if answer.status_code >= 500:
            self.failures.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
        return answer

    def _native(self, http: httpx.Client, rng: random.Random) -> None:
        body = {**SMALL, "seed": rng.randrange(10**6), "response_format": "base64"}
        answer = self._send(http, "POST", "/alpha/v1/txt2img", json=body)
        if answer.status_code == 200:
            self._names = [*self._names[-50:], answer.json()["filename"]]
        if rng.random() < 0.1:
            self._send(http, "POST", "/alpha/v1/txt2img", json={**SMALL, "steps": "many"})

    def _job(self, http: httpx.Client, rng: random.Random) -> None:
        body = {**SMALL, "previews": True, "steps": rng.randint(1, 8), "batch_size": 2}
        answer = self._send(http, "POST", "/alpha/v1/jobs", json=body)
        if answer.status_code != 202:
            return
        path = f"/alpha/v1/jobs/{answer.json()['id']}"
        if rng.random() < 0.2:
            self._send(http, "DELETE", path)
        with http.stream("GET", f"{path}/events") as events:
            for _ in events.iter_lines():
                pass
        self._send(http, "GET", path)
        self._send(http, "GET", "/alpha/v1/jobs?limit=200")

    def _a1111(self, http: httpx.Client, rng: random.Random) -> None:
        body = {**SMALL, "sampler_name": "Euler", "seed": rng.randrange(10**6)}
        answer = self._send(http, "POST", "/sdapi/v1/txt2img", json=body)
        if answer.status_code == 200:
            image = answer.json()["images"][0]
            self._send(http, "POST", "/sdapi/v1/png-info", json={"image": image})
        for name in ("sd-models", "samplers", "loras", "options", "progress", "memory"):
            self._send(http, "GET", f"/sdapi/v1/{name}")
        self._send(http, "POST", "/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2})

    def _openai(self, http: httpx.Client, rng: random.Random) -> None:
        body = {"prompt": "an apple", "size": "64x64", "stream": rng.random() < 0.5}
        self._send(http, "POST", "/v1/images/generations", json=body)
        self._send(http, "GET", "/v1/models")

    def _read(self, http: httpx.Client, rng: random.Random) -> None:
        for path in ("/", "/docs", "/openapi.json", "/readyz", "/ping", "/metrics"):
            self._send(http, "GET", path)
        if self._names:
            name = rng.choice(self._names)
            self._send(http, "GET", f"/alpha/v1/file/{name}")
            query = {"format": rng.choice(["webp", "avif"]), "defringe": "true"}
            self._send(http, "GET", f"/alpha/v1/convert/{name}", params=query)
        # a client that leaves before its answer
        try:
            http.post("/alpha/v1/txt2img", json={**SMALL, "steps": 20}, timeout=0.05)
        except httpx.TimeoutException:
            self.statuses["left early"] += 1

    def _mcp(self, _http: httpx.Client, _rng: random.Random) -> None:
        async def call() -> None:
            async with McpClient(f"{self.address}/mcp/") as client:
                tools = await client.list_tools()
                await client.call_tool(tools[0].name, {"prompt": "an apple"})

        asyncio.run(call())
        self.statuses["mcp"] += 1
        time.sleep(2)


def find_growth(samples: list[dict[str, int]]) -> list[str]:
    """Return the processes whose memory grew, by the medians of two quarters.

    The first quarter is a warm-up: caches fill, and each size of image is met once.
    """
    quarter = len(samples) // 4
    growths: list[str] = []
    for name in samples[0]:
        early = statistics.median(sample[name] for sample in samples[quarter : 2 * quarter])
        late = statistics.median(sample[name] for sample in samples[-quarter:])
        if late > early + GROWTH_MB:
            growths.append(f"{name}: {early:.0f} and later {late:.0f}")
    return growths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--write", type=Path, help="a file for the result, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        try:
            samples = soak.run(options.minutes)
        finally:
            code = soak.stop()
    growth = find_growth(samples)
    report = {
        "requests": dict(sorted(soak.statuses.items())),
        "failures": soak.failures[:50],
        "exit_code": code,
        "growth": growth,
        "memory": samples[:: max(1, len(samples) // 30)],
    }
    write_report("soak", report, options.write)
    # the server ends by the signal that stopped it
    sys.exit(bool(soak.failures or growth or code not in (0, -signal.SIGTERM)))


if __name__ == "__main__":
    main()
