"""What the shared queue carries on one machine: `python -m benchmarks.shared_queue [--workers 1 4 16 64] [--jobs 2000]`.

Workers that draw at once claim jobs from a real PostgreSQL (in a folder of its own, fsync off), start and finish them. Each is a
`SharedDispatcher` of its own, with its own connections, in one of two processes. Reported: jobs a second from the first claim to the
last end, and how long a claim takes while jobs are waiting. Writes benchmarks/results/shared-queue-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import asyncpg
from tests.servers import Postgres

from alphalayer.job import ImageRef, JobResult, JobSpec
from alphalayer.jobs.shared import SharedDispatcher
from alphalayer.request import GenerationRequest

RESULTS = Path(__file__).parent / "results"
SPEC = JobSpec(generation=GenerationRequest(prompt="x", width=64, height=64, steps=1))
RESULT = JobResult(
    images=(ImageRef(key="alpha_1.png", seed=1, subseed=1, width=64, height=64, size_bytes=1, parameters=""),),
    generation=SPEC.generation,
    model_name="none",
    model_hash="0",
)


async def fill(url: str, jobs: int) -> float:
    """Submit so many jobs, 16 at a time; jobs a second."""
    queue = await SharedDispatcher.open(url, jobs + 1)
    start = time.perf_counter()
    room = asyncio.Semaphore(16)

    async def submit() -> None:
        async with room:
            await queue.submit(SPEC)

    await asyncio.gather(*(submit() for _ in range(jobs)))
    spent = time.perf_counter() - start
    await queue.close()
    return jobs / spent


async def _work(url: str, workers: int) -> tuple[list[float], float, float]:
    claims: list[float] = []
    ends: list[float] = []

    async def work() -> None:
        queue = await SharedDispatcher.open(url, 10)
        try:
            while True:
                start = time.perf_counter()
                job = await asyncio.wait_for(queue.take(), 3.0)
                claims.append(time.perf_counter() - start)
                await queue.started(job.id)
                await queue.finished(job.id, RESULT)
                ends.append(time.time())
        except asyncio.TimeoutError:
            await queue.close()

    begun = time.time()
    await asyncio.gather(*(work() for _ in range(workers)))
    return claims, begun, max(ends, default=begun)


def work(url: str, workers: int) -> tuple[list[float], float, float]:
    """So many workers in this process until nothing is left: seconds of each claim, and when it began and ended (Unix seconds)."""
    return asyncio.run(_work(url, workers))


async def news(url: str, listeners: int, count: int = 500) -> dict[str, float]:
    """One sender and so many listening connections: messages a second until everybody has all of them, and deliveries a second."""
    left = listeners * count
    everything = asyncio.Event()

    def hear(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            everything.set()

    connections = [await asyncpg.connect(url) for _ in range(listeners)]
    for connection in connections:
        await connection.add_listener("news", hear)
    sender = await asyncpg.connect(url)
    start = time.perf_counter()
    for _ in range(count):
        await sender.execute("SELECT pg_notify('news', $1)", '{"news": "progress", "id": "0123456789abcdef01234567"}')
    await everything.wait()
    spent = time.perf_counter() - start
    for connection in (*connections, sender):
        await connection.close()
    return {"messages_a_second": round(count / spent), "deliveries_a_second": round(count * listeners / spent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--jobs", type=int, default=2000)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python -m benchmarks.shared_queue",
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, Python {platform.python_version()}",
        "jobs": options.jobs,
        "workers": {},
    }
    postgres = Postgres()
    try:
        for workers in options.workers:
            url = postgres.fresh_database()
            submitted = asyncio.run(fill(url, options.jobs))
            processes = min(2, workers)
            shares = [workers // processes + (i < workers % processes) for i in range(processes)]
            with ProcessPoolExecutor(processes) as pool:
                results = list(pool.map(work, [url] * processes, shares))
            claims = sorted(each for result in results for each in result[0])
            spent = max(result[2] for result in results) - min(result[1] for result in results)
            report["workers"][workers] = {
                "submitted_a_second": round(submitted, 1),
                "finished_a_second": round(len(claims) / spent, 1),
                "claim_ms": {
                    "median": round(claims[len(claims) // 2] * 1000, 1),
                    "p99": round(claims[int(len(claims) * 0.99)] * 1000, 1),
                },
            }
            print(workers, report["workers"][workers], flush=True)
        report["news"] = {n: asyncio.run(news(postgres.url, n)) for n in (1, 10, 50, 200)}
        print(report["news"])
    finally:
        postgres.remove()
    (RESULTS / f"shared-queue-{date.today()}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
