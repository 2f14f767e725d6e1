"""Throughput of real workers with the shared queue.

    python -m benchmarks.shared_workers [--workers 1 4 16 64] [--jobs 1000]

A worker is a supervisor with its own connections and an engine process with the fake engine.
For each job it renders, encodes and stores one image of 64x64.
The supervisors run in at most four processes.
They start together, when all jobs wait in PostgreSQL, which runs in its own folder.

The report has, without and with fsync:

- jobs a second, from the first start to the last end
- the time of a claim
- the CPU time of PostgreSQL for a job

Writes benchmarks/results/shared-workers-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
from benchmarks.report import write_report
from benchmarks.shared_queue import CpuTime, fill
from tests.support.servers import Postgres
from tests.support.serving import FAKE, wait_until

from alphalayer.core.job import Job
from alphalayer.jobs.postgres import PostgresJobQueue
from alphalayer.observability.logging import configure_logging
from alphalayer.observability.metrics import Metrics
from alphalayer.observability.tracing import Traces
from alphalayer.worker.supervisor import EngineSpec, Supervisor

HOSTS = 4
READY, BEGIN, OVER = "ready", "begin", "over"


class TimedQueue(PostgresJobQueue):
    """Queue that waits for the file `begin`, and records the seconds of each claim."""

    begin: Path
    claims: list[float]

    async def claim(self, holding: str | None = None) -> Job:
        """Claim the next job."""
        while not self.begin.exists():
            await asyncio.sleep(0.02)
        start = time.perf_counter()
        job = await super().claim(holding)
        self.claims.append(time.perf_counter() - start)
        return job


async def _render(url: str, workers: int, folder: Path, host: int) -> list[float]:
    claims: list[float] = []
    queues: list[TimedQueue] = []
    supervisors: list[Supervisor] = []
    for i in range(workers):
        queue = await TimedQueue.open(url, 10, role="worker")
        assert isinstance(queue, TimedQueue)
        queue.begin, queue.claims = folder / BEGIN, claims
        queues.append(queue)
        spec = EngineSpec(FAKE, {}, str(folder / f"images-{host}-{i}"))
        supervisors.append(Supervisor(f"{host}-{i}", spec, queue, Metrics(), Traces()))
    tasks = [asyncio.create_task(supervisor.run()) for supervisor in supervisors]
    while not all(supervisor.is_ready for supervisor in supervisors):
        await asyncio.sleep(0.1)
    (folder / f"{READY}-{host}").touch()
    while not (folder / OVER).exists():
        await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for queue in queues:
        await queue.close()
    return claims


def render(url: str, workers: int, folder: Path, host: int) -> list[float]:
    """Run workers until the file `over` exists; return the seconds of each claim."""
    configure_logging("error", False)
    return asyncio.run(_render(url, workers, folder, host))


async def _rate(url: str, jobs: int) -> float:
    connection = await asyncpg.connect(url)
    query = "SELECT count(*), min(started_at), max(finished_at) FROM jobs WHERE state = 'done'"
    while (row := await connection.fetchrow(query))[0] < jobs:
        await asyncio.sleep(0.5)
    await connection.close()
    return jobs / (row[2] - row[1])


def measure(postgres: Postgres, workers: int, jobs: int) -> dict[str, float]:
    """Render jobs with a number of workers.

    Returns:
        Jobs a second, milliseconds of a claim, and of PostgreSQL's CPU for each job.
    """
    url = postgres.fresh_database()
    hosts = min(HOSTS, workers)
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(hosts) as pool:
        folder = Path(name)
        renders = [
            pool.submit(render, url, len(range(i, workers, hosts)), folder, i) for i in range(hosts)
        ]
        wait_until(lambda: len(list(folder.glob(f"{READY}-*"))) == hosts, 600)
        asyncio.run(fill(url, jobs))
        spent = CpuTime(postgres)
        (folder / BEGIN).touch()
        rate = asyncio.run(_rate(url, jobs))
        cpu = spent() / jobs * 1000
        (folder / OVER).touch()
        claims = sorted(seconds * 1000 for task in renders for seconds in task.result())
    quantiles = {
        "claim_ms_median": claims[len(claims) // 2],
        "claim_ms_p99": claims[int(len(claims) * 0.99)],
    }
    return {
        name: round(value, 1)
        for name, value in {
            "finished_a_second": rate,
            **quantiles,
            "postgres_cpu_ms_a_job": cpu,
        }.items()
    }


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--jobs", type=int, default=1000)
    options = parser.parse_args()
    report: dict[str, Any] = {"jobs": options.jobs}
    for fsync in (False, True):
        postgres = Postgres(fsync=fsync)
        name = "with_fsync" if fsync else "without_fsync"
        report[name] = {}
        try:
            for workers in options.workers:
                report[name][workers] = measure(postgres, workers, options.jobs)
                print(name, workers, report[name][workers], flush=True)
        finally:
            postgres.remove()
    write_report("shared_workers", report)


if __name__ == "__main__":
    main()
