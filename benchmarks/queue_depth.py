"""The shared queue with many jobs waiting: `python -m benchmarks.queue_depth [--depths 200 1000]`.

What a claim takes while so many jobs wait: four workers in this process claim, start and finish at once. PostgreSQL in a folder of its own,
fsync off. Writes benchmarks/results/queue-depth-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shlex
import sys
import time
from datetime import date
from typing import Any

import asyncpg
from benchmarks.shared_queue import RESULT, RESULTS, SPEC, Spent
from tests.servers import Postgres

from alphalayer.jobs.shared import SharedDispatcher


async def deepen(url: str, jobs: int) -> None:
    """Copies of one job in the queue, until so many wait."""
    connection = await asyncpg.connect(url)
    name = "lpad(to_hex(n), 24, '0')"
    copies = {
        "jobs": {"id": name, "queue_id": "NULL", "created_at": "created_at + n / 1000.0", "idempotency_key": "NULL"},
        "pgqueuer": {"id": None, "payload": f"convert_to({name}, 'UTF8')"},
    }
    for table, changes in copies.items():
        found = await connection.fetch(
            "SELECT column_name FROM information_schema.columns WHERE table_name = $1 AND is_generated = 'NEVER'", table
        )
        columns = [row["column_name"] for row in found if changes.get(row["column_name"], "") is not None]
        values = ", ".join(changes.get(each) or each for each in columns)
        await connection.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM {table}, generate_series(2, {jobs}) n"
        )
    await connection.execute("ANALYZE")
    await connection.close()


async def claims_at_depth(postgres: Postgres, depth: int, workers: int = 4, count: int = 200) -> dict[str, float]:
    """So many workers claim, start and finish jobs while so many wait: milliseconds of a claim, and of PostgreSQL's CPU for all three."""
    url = postgres.fresh_database()
    queues = [await SharedDispatcher.open(url, depth + 1) for _ in range(workers)]
    await queues[0].submit(SPEC)
    await deepen(url, depth)
    waits: list[float] = []
    spent = Spent(postgres)

    async def work(queue: SharedDispatcher) -> None:
        for _ in range(count // workers):
            start = time.perf_counter()
            job = await queue.take()
            waits.append((time.perf_counter() - start) * 1000)
            await queue.started(job.id)
            await queue.finished(job.id, RESULT)

    await asyncio.gather(*map(work, queues))
    cpu = spent() / len(waits) * 1000
    for queue in queues:
        await queue.close()
    waits.sort()
    quantiles = {"median": waits[len(waits) // 2], "p99": waits[int(len(waits) * 0.99)], "postgres_cpu": cpu}
    return {name: round(value, 1) for name, value in quantiles.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[200, 1000, 20_000], help="jobs that wait")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.queue_depth", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}",
        "load_of_the_machine": {"before": os.getloadavg()},
        "claim_ms_at_depth": {},
    }
    postgres = Postgres()
    try:
        for depth in options.depths:
            report["claim_ms_at_depth"][depth] = asyncio.run(claims_at_depth(postgres, depth))
            print("waiting", depth, report["claim_ms_at_depth"][depth], flush=True)
    finally:
        postgres.remove()
    report["load_of_the_machine"]["after"] = os.getloadavg()
    (RESULTS / f"queue-depth-{date.today()}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
