"""Workers that draw, behind the shared queue: `python -m benchmarks.shared_workers [--workers 1 4 16 64] [--jobs 1000]`.

Each worker is a supervisor with connections of its own and an engine process with the fake engine, which draws, encodes and stores one
picture of 64x64 for each job; the supervisors live in four processes at most. They begin together, when all jobs wait in PostgreSQL (in a
folder of its own). Reported: jobs a second from the first start to the last end, how long a claim takes, and what PostgreSQL spends on a
job. Without and with a disk that is waited for (fsync). Writes benchmarks/results/shared-workers-<date>.json.
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
from benchmarks.shared_queue import Spent, fill
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


class Timed(PostgresJobQueue):
    """Takes nothing before the file `begin` is there, and notes how long each claim took, in seconds."""

    begin: Path
    claims: list[float]

    async def claim(self, holding: str | None = None) -> Job:
        """The next job; see the protocol."""
        while not self.begin.exists():
            await asyncio.sleep(0.02)
        start = time.perf_counter()
        job = await super().take(holding)
        self.claims.append(time.perf_counter() - start)
        return job


async def _render(url: str, workers: int, folder: Path, host: int) -> list[float]:
    claims: list[float] = []
    queues: list[Timed] = []
    supervisors: list[Supervisor] = []
    for i in range(workers):
        queue = await Timed.open(url, 10, role="worker")
        assert isinstance(queue, Timed)
        queue.begin, queue.claims = folder / BEGIN, claims
        queues.append(queue)
        spec = EngineSpec(FAKE, {}, str(folder / f"pictures-{host}-{i}"))
        supervisors.append(Supervisor(f"{host}-{i}", spec, queue, Metrics(), Traces()))
    tasks = [asyncio.create_task(each.run()) for each in supervisors]
    while not all(each.is_ready for each in supervisors):
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
    """So many workers in this process until the file `over` is there: seconds of each claim."""
    configure_logging("error", False)
    return asyncio.run(_render(url, workers, folder, host))


async def _rate(url: str, jobs: int) -> float:
    connection = await asyncpg.connect(url)
    over = "SELECT count(*), min(started_at), max(finished_at) FROM jobs WHERE state = 'done'"
    while (row := await connection.fetchrow(over))[0] < jobs:
        await asyncio.sleep(0.5)
    await connection.close()
    return jobs / (row[2] - row[1])


def measure(postgres: Postgres, workers: int, jobs: int) -> dict[str, float]:
    """So many workers draw so many jobs: jobs a second, milliseconds of a claim, and of PostgreSQL's CPU for each job."""
    url = postgres.fresh_database()
    hosts = min(HOSTS, workers)
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(hosts) as pool:
        folder = Path(name)
        drawing = [
            pool.submit(render, url, len(range(i, workers, hosts)), folder, i) for i in range(hosts)
        ]
        wait_until(lambda: len(list(folder.glob(f"{READY}-*"))) == hosts, 600)
        asyncio.run(fill(url, jobs))
        spent = Spent(postgres)
        (folder / BEGIN).touch()
        rate = asyncio.run(_rate(url, jobs))
        cpu = spent() / jobs * 1000
        (folder / OVER).touch()
        claims = sorted(each * 1000 for host in drawing for each in host.result())
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
