"""Time of a claim in the shared queue while many jobs wait.

    python -m benchmarks.queue_depth [--depths 200 1000]

Four workers in this process claim, start and complete jobs without rendering.
All jobs are compatible with each other, or none is.
PostgreSQL runs in its own folder with fsync off.
Writes benchmarks/results/queue-depth-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import asyncpg
from benchmarks.report import write_report
from benchmarks.shared_queue import RESULT, SPEC, CpuTime
from tests.support.servers import Postgres

from alphalayer.jobs.postgres import PostgresJobQueue


async def copy_job(url: str, jobs: int, alike: bool) -> None:
    """Copy one job until `jobs` wait: all compatible, or each incompatible."""
    connection = await asyncpg.connect(url)
    name = "lpad(to_hex(n), 24, '0')"
    copies = {
        "jobs": {
            "id": name,
            "queue_id": "NULL",
            "created_at": "created_at + n / 1000.0",
            "idempotency_key": "NULL",
        },
        "pgqueuer": {
            "id": None,
            "payload": f"convert_to({name}, 'UTF8')",
            "entrypoint": "entrypoint"
            if alike
            else "split_part(entrypoint, '/', 1) || '/' || lpad(to_hex(n), 16, '0')",
        },
    }
    for table, changes in copies.items():
        rows = await connection.fetch(
            "SELECT column_name FROM information_schema.columns "
            "WHERE table_name = $1 AND is_generated = 'NEVER'",
            table,
        )
        columns = [
            row["column_name"] for row in rows if changes.get(row["column_name"], "") is not None
        ]
        values = ", ".join(changes.get(column) or column for column in columns)
        await connection.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) "
            f"SELECT {values} FROM {table}, generate_series(2, {jobs}) n"
        )
    await connection.execute("ANALYZE")
    await connection.close()


async def claims_at_depth(
    postgres: Postgres, depth: int, *, alike: bool, workers: int = 4, count: int = 200
) -> dict[str, float]:
    """Claim, start and complete jobs while `depth` jobs wait.

    Returns:
        Milliseconds of a claim, and of PostgreSQL's CPU for each job.
    """
    url = postgres.fresh_database()
    queues = [await PostgresJobQueue.open(url, depth + 1) for _ in range(workers)]
    await queues[0].submit(SPEC)
    await copy_job(url, depth, alike)
    waits: list[float] = []
    spent = CpuTime(postgres)

    async def work(queue: PostgresJobQueue) -> None:
        for _ in range(count // workers):
            start = time.perf_counter()
            job = await queue.claim()
            waits.append((time.perf_counter() - start) * 1000)
            await queue.mark_started(job.id)
            await queue.complete(job.id, RESULT)

    await asyncio.gather(*map(work, queues))
    cpu = spent() / len(waits) * 1000
    for queue in queues:
        await queue.close()
    waits.sort()
    quantiles = {
        "median": waits[len(waits) // 2],
        "p99": waits[int(len(waits) * 0.99)],
        "postgres_cpu": cpu,
    }
    return {name: round(value, 1) for name, value in quantiles.items()}


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[200, 1000, 20_000], help="waiting jobs"
    )
    options = parser.parse_args()
    report: dict[str, Any] = {"alike": {}, "each of its own kind": {}}
    postgres = Postgres()
    try:
        for name, figures in report.items():
            for depth in options.depths:
                is_alike = name == "alike"
                figures[depth] = asyncio.run(claims_at_depth(postgres, depth, alike=is_alike))
                print(name, depth, figures[depth], flush=True)
    finally:
        postgres.remove()
    write_report("queue_depth", report)


if __name__ == "__main__":
    main()
