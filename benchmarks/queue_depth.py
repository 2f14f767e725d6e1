"""The shared queue with many jobs waiting: `python -m benchmarks.queue_depth [--depths 200 1000]`.

What a claim takes while so many jobs wait: four workers in this process claim, start and finish at once. All jobs are of one kind, so that
they might be drawn together, or each is of its own. PostgreSQL in a folder of its own, fsync off. Writes
benchmarks/results/queue-depth-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import asyncpg
from benchmarks.report import write_report
from benchmarks.shared_queue import RESULT, SPEC, Spent
from tests.support.servers import Postgres

from alphalayer.jobs.postgres import PostgresJobQueue


async def deepen(url: str, jobs: int, alike: bool) -> None:
    """Copies of one job in the queue, until so many wait: of one kind, or each of its own, as jobs of several rounds are."""
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
        found = await connection.fetch(
            "SELECT column_name FROM information_schema.columns WHERE table_name = $1 AND is_generated = 'NEVER'",
            table,
        )
        columns = [
            row["column_name"] for row in found if changes.get(row["column_name"], "") is not None
        ]
        values = ", ".join(changes.get(each) or each for each in columns)
        await connection.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM {table}, generate_series(2, {jobs}) n"
        )
    await connection.execute("ANALYZE")
    await connection.close()


async def claims_at_depth(
    postgres: Postgres, depth: int, *, alike: bool, workers: int = 4, count: int = 200
) -> dict[str, float]:
    """So many workers claim, start and finish jobs while so many wait: milliseconds of a claim, and of PostgreSQL's CPU for all three."""
    url = postgres.fresh_database()
    queues = [await PostgresJobQueue.open(url, depth + 1) for _ in range(workers)]
    await queues[0].submit(SPEC)
    await deepen(url, depth, alike)
    waits: list[float] = []
    spent = Spent(postgres)

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[200, 1000, 20_000], help="jobs that wait"
    )
    options = parser.parse_args()
    report: dict[str, Any] = {"alike": {}, "each of its own kind": {}}
    postgres = Postgres()
    try:
        for name, found in report.items():
            for depth in options.depths:
                found[depth] = asyncio.run(claims_at_depth(postgres, depth, alike=name == "alike"))
                print(name, depth, found[depth], flush=True)
    finally:
        postgres.remove()
    write_report("queue_depth", report)


if __name__ == "__main__":
    main()
