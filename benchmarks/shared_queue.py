"""Throughput of the shared queue on one machine.

    python -m benchmarks.shared_queue [--workers 1 4 16 64] [--jobs 2000]

Workers claim, start and complete jobs without rendering.
PostgreSQL runs in its own folder with fsync off.
Each worker is a `PostgresJobQueue` with its own connections, in one of two processes.

The report has:

- jobs a second, from the first claim to the last end
- the time of a claim while jobs wait
- the CPU time of PostgreSQL for a job
- the wait of a single job and its cost, if all workers are idle and receive its notification

See benchmarks/shared_workers.py for real workers, and benchmarks/queue_depth.py for long queues.
Writes benchmarks/results/shared-queue-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
from benchmarks.report import write_report
from tests.support.servers import Postgres

from alphalayer.core.job import ImageRef, JobProgress, JobResult, JobSpec
from alphalayer.core.request import GenerationRequest, ModelDefaults
from alphalayer.jobs import claims
from alphalayer.jobs.postgres import PostgresJobQueue

SPEC = JobSpec(generation=GenerationRequest(prompt="x", width=64, height=64, steps=1))
MESSAGES = 500
RESULT = JobResult(
    images=(ImageRef(key="alpha_1.png", seed=1, subseed=1, width=64, height=64, size_bytes=1),),
    settings=ModelDefaults(),
    model_name="none",
    model_hash="0",
)


async def fill(url: str, jobs: int) -> float:
    """Submit jobs, 16 at a time, and return the jobs a second."""
    queue = await PostgresJobQueue.open(url, jobs + 1)
    start = time.perf_counter()
    semaphore = asyncio.Semaphore(16)

    async def submit() -> None:
        async with semaphore:
            await queue.submit(SPEC)

    await asyncio.gather(*(submit() for _ in range(jobs)))
    elapsed = time.perf_counter() - start
    await queue.close()
    return jobs / elapsed


async def _work(url: str, workers: int) -> tuple[list[float], float, float]:
    waits: list[float] = []
    end_times: list[float] = []

    async def work() -> None:
        queue = await PostgresJobQueue.open(url, 10)
        try:
            while True:
                start = time.perf_counter()
                job = await asyncio.wait_for(queue.claim(), 3.0)
                waits.append(time.perf_counter() - start)
                await queue.mark_started(job.id)
                await queue.complete(job.id, RESULT)
                end_times.append(time.time())
        except asyncio.TimeoutError:
            await queue.close()

    started_at = time.time()
    await asyncio.gather(*(work() for _ in range(workers)))
    return waits, started_at, max(end_times, default=started_at)


def work(url: str, workers: int) -> tuple[list[float], float, float]:
    """Run workers in this process until no job is left.

    Returns:
        The seconds of each claim, and the start and end in Unix seconds.
    """
    return asyncio.run(_work(url, workers))


class CpuTime:
    """CPU time of all processes of PostgreSQL since the creation of this object."""

    def __init__(self, postgres: Postgres):
        self._parent = postgres.process_id
        self._before = self._now()

    def __call__(self) -> float:
        """Return the CPU time in seconds."""
        return self._now() - self._before

    def _now(self) -> float:
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(stat.parent.name) == self._parent:
                    ticks += sum(map(int, fields[11:15]))
                elif int(fields[1]) == self._parent:
                    ticks += sum(map(int, fields[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")


async def _idle(url: str, workers: int, seconds: float) -> list[float]:
    delays: list[float] = []

    async def work(queue: PostgresJobQueue) -> None:
        while True:
            job = await queue.claim()
            delays.append(time.time() - job.created_at)
            await queue.mark_started(job.id)
            await queue.complete(job.id, RESULT)

    queues = [await PostgresJobQueue.open(url, 10, role="worker") for _ in range(workers)]
    tasks = [asyncio.create_task(work(queue)) for queue in queues]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for queue in queues:
        await queue.close()
    return delays


def idle(url: str, workers: int, seconds: float) -> list[float]:
    """Run idle workers in this process; return the seconds from submission to claim."""
    return asyncio.run(_idle(url, workers, seconds))


async def submit_slowly(url: str, jobs: int, interval_s: float) -> None:
    """Submit one job in each interval."""
    queue = await PostgresJobQueue.open(url, jobs + 1, role="api")
    for _ in range(jobs):
        await queue.submit(SPEC)
        await asyncio.sleep(interval_s)
    await queue.close()


def measure_idle_fleet(
    postgres: Postgres, workers: int, jobs: int = 30, interval_s: float = 0.4, settle_s: float = 8.0
) -> dict[str, float]:
    """Measure single jobs with idle workers.

    Returns:
        The wait and the cost of a job, and the cost of idle workers.
    """
    url = postgres.fresh_database()
    with ProcessPoolExecutor(1) as pool:
        claiming = pool.submit(idle, url, workers, 2.5 * settle_s + 2 * jobs * interval_s)
        time.sleep(settle_s)
        asyncio.run(submit_slowly(url, jobs, interval_s))
        cpu_time = CpuTime(postgres)
        time.sleep(settle_s / 2)
        idle_load = cpu_time() / (settle_s / 2)
        cpu_time = CpuTime(postgres)
        asyncio.run(submit_slowly(url, jobs, interval_s))
        job_s = cpu_time() / jobs - idle_load * interval_s
        delays = sorted(claiming.result()[jobs:])
    return {
        "taken": len(delays),
        "waits_ms_median": round(delays[len(delays) // 2] * 1000, 1),
        "waits_ms_max": round(delays[-1] * 1000, 1),
        "postgres_cpu_ms_a_job": round(job_s * 1000, 1),
        "postgres_cpu_ms_a_second_idle": round(idle_load * 1000, 1),
    }


async def footprint(url: str, jobs: int) -> dict[str, dict[str, float]]:
    """Measure what a finished job leaves in each table.

    Returns:
        Dead rows until the next autovacuum, and bytes on disk with indexes, by table.
    """
    await asyncio.sleep(2.0)  # statistics arrive with a delay
    connection = await asyncpg.connect(url)
    rows = await connection.fetch(
        "SELECT relname, n_tup_upd + n_tup_del AS dead, pg_total_relation_size(relid) AS bytes "
        "FROM pg_stat_user_tables"
    )
    await connection.close()
    return {
        row["relname"]: {
            "dead_rows": round(row["dead"] / jobs, 2),
            "bytes": round(row["bytes"] / jobs),
        }
        for row in rows
        if row["dead"] or row["bytes"] > 50 * jobs
    }


async def _frequent_operations(
    url: str, start_clock: Callable[[], Callable[[], float]], count: int = 1000
) -> dict[str, float]:
    queue = await PostgresJobQueue.open(url, 10, role="worker")
    job = await queue.submit(SPEC)
    await queue.claim()

    async def claim_nothing() -> None:
        async with queue._transaction() as (_, rows):
            assert (
                await claims.claim_next(
                    rows, queue._worker, None, claims.ModelAffinity(), may_take_over=True
                )
                is None
            )

    async def report_progress() -> None:
        queue._claims[job.id].notified_at = 0.0
        await queue.report_progress(job.id, JobProgress(stage="sample", step=1, steps=20))

    async def look() -> None:
        async with queue._transaction() as (connection, _):
            await queue._stats.refresh(connection)

    costs: dict[str, float] = {}
    operations = {"ask_for_nothing": claim_nothing, "look": look, "progress": report_progress}
    for name, operation in operations.items():
        cpu_time = start_clock()
        for _ in range(count):
            await operation()
        costs[name] = round(cpu_time() / count * 1000, 2)
    await queue.close()
    return costs


def measure_frequent_operations(postgres: Postgres) -> dict[str, float]:
    """Measure PostgreSQL's CPU milliseconds of frequent operations.

    They are a claim without a job, the check of the queue by a pod, and a progress message.
    """
    return asyncio.run(_frequent_operations(postgres.fresh_database(), lambda: CpuTime(postgres)))


async def measure_notifications(
    url: str, listeners: int, count: int = MESSAGES
) -> dict[str, float]:
    """Measure the messages and deliveries a second from one sender to all listeners."""
    remaining = listeners * count
    is_complete = asyncio.Event()

    def receive(*_: object) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            is_complete.set()

    connections = [await asyncpg.connect(url) for _ in range(listeners)]
    for connection in connections:
        await connection.add_listener("notifications", receive)
    sender = await asyncpg.connect(url)
    start = time.perf_counter()
    for _ in range(count):
        await sender.execute(
            "SELECT pg_notify('notifications', $1)",
            '{"event": "progress", "id": "0123456789abcdef01234567"}',
        )
    await is_complete.wait()
    elapsed = time.perf_counter() - start
    for connection in (*connections, sender):
        await connection.close()
    return {
        "messages_a_second": round(count / elapsed),
        "deliveries_a_second": round(count * listeners / elapsed),
    }


async def measure_commits(url: str, senders: int = 16, seconds: float = 5.0) -> dict[str, int]:
    """Measure the commits a second of parallel connections, by their content.

    A commit with NOTIFY holds a lock of the whole server.
    """
    kinds = {
        "a row": ("on", "INSERT INTO written VALUES (1)"),
        "a message": ("on", "SELECT pg_notify('notifications', 'x')"),
        "a message, not waited for on the disk": ("off", "SELECT pg_notify('notifications', 'x')"),
    }
    connections = [await asyncpg.connect(url) for _ in range(senders)]
    await connections[0].execute("CREATE TABLE written (x int)")
    rates: dict[str, int] = {}
    for name, (synchronous, statement) in kinds.items():
        end = time.perf_counter() + seconds

        async def send(
            connection: Any,
            end: float = end,
            synchronous: str = synchronous,
            statement: str = statement,
        ) -> int:
            commits = 0
            while time.perf_counter() < end:
                async with connection.transaction():
                    await connection.execute(f"SET LOCAL synchronous_commit = {synchronous}")
                    await connection.execute(statement)
                commits += 1
            return commits

        count = sum(await asyncio.gather(*map(send, connections)))
        rates[name] = round(count / seconds)
    for connection in connections:
        await connection.close()
    return rates


def measure_throughput(postgres: Postgres, url: str, workers: int, jobs: int) -> dict[str, Any]:
    """Submit jobs, then claim and complete them with a number of workers."""
    cpu_time = CpuTime(postgres)
    submitted = asyncio.run(fill(url, jobs))
    submit_s, cpu_time = cpu_time(), CpuTime(postgres)
    processes = min(2, workers)
    shares = [workers // processes + (i < workers % processes) for i in range(processes)]
    with ProcessPoolExecutor(processes) as pool:
        results = list(pool.map(work, [url] * processes, shares))
    waits = sorted(wait for result in results for wait in result[0])
    claim_s = cpu_time()
    seconds = max(result[2] for result in results) - min(result[1] for result in results)
    return {
        "submitted_a_second": round(submitted, 1),
        "finished_a_second": round(len(waits) / seconds, 1),
        "claim_ms": {
            "median": round(waits[len(waits) // 2] * 1000, 1),
            "p99": round(waits[int(len(waits) * 0.99)] * 1000, 1),
        },
        "postgres_cpu_ms_a_job": {
            "submit": round(submit_s / jobs * 1000, 2),
            "claim_start_finish": round(claim_s / jobs * 1000, 2),
        },
    }


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--idle", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--jobs", type=int, default=2000)
    options = parser.parse_args()
    report: dict[str, Any] = {"jobs": options.jobs, "workers": {}}
    postgres = Postgres()
    try:
        for workers in options.workers:
            url = postgres.fresh_database()
            report["workers"][workers] = measure_throughput(postgres, url, workers, options.jobs)
            print(workers, report["workers"][workers], flush=True)
        report["a_job_leaves"] = asyncio.run(footprint(url, options.jobs))
        print(report["a_job_leaves"], flush=True)
        report["postgres_cpu_ms"] = measure_frequent_operations(postgres)
        print(report["postgres_cpu_ms"], flush=True)
        report["idle_workers"] = {}
        for workers in options.idle:
            report["idle_workers"][workers] = measure_idle_fleet(postgres, workers)
            print("idle", workers, report["idle_workers"][workers], flush=True)
        report["notifications"] = {}
        for listeners in (1, 10, 50, 200):
            cpu_time = CpuTime(postgres)
            report["notifications"][listeners] = asyncio.run(
                measure_notifications(postgres.url, listeners)
            )
        report["delivery_cpu_ms"] = round(cpu_time() / (listeners * MESSAGES) * 1000, 4)
        print(report["notifications"])
    finally:
        postgres.remove()
    durable = Postgres(fsync=True)
    try:
        report["commits_a_second_with_fsync"] = asyncio.run(measure_commits(durable.url))
        print(report["commits_a_second_with_fsync"])
    finally:
        durable.remove()
    write_report("shared_queue", report)


if __name__ == "__main__":
    main()
