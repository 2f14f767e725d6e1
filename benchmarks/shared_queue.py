"""What the shared queue carries on one machine: `python -m benchmarks.shared_queue [--workers 1 4 16 64] [--jobs 2000]`.

Workers that draw at once claim jobs from a real PostgreSQL (in a folder of its own, fsync off), start and finish them. Each is a
`PostgresJobQueue` of its own, with its own connections, in one of two processes. Reported: jobs a second from the first claim to the
last end, how long a claim takes while jobs are waiting, and what PostgreSQL's processes alone spend on a job. Then workers that are idle
while a job comes now and then: how long it waits, and what it costs that all of them hear of it. (Real workers, and claims while many
jobs wait: benchmarks/queue_depth.py.) Writes
benchmarks/results/shared-queue-<date>.json.
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
    """Submit so many jobs, 16 at a time; jobs a second."""
    queue = await PostgresJobQueue.open(url, jobs + 1)
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
    waits: list[float] = []
    ends: list[float] = []

    async def work() -> None:
        queue = await PostgresJobQueue.open(url, 10)
        try:
            while True:
                start = time.perf_counter()
                job = await asyncio.wait_for(queue.claim(), 3.0)
                waits.append(time.perf_counter() - start)
                await queue.mark_started(job.id)
                await queue.complete(job.id, RESULT)
                ends.append(time.time())
        except asyncio.TimeoutError:
            await queue.close()

    begun = time.time()
    await asyncio.gather(*(work() for _ in range(workers)))
    return waits, begun, max(ends, default=begun)


def work(url: str, workers: int) -> tuple[list[float], float, float]:
    """So many workers in this process until nothing is left: seconds of each claim, and when it began and ended (Unix seconds)."""
    return asyncio.run(_work(url, workers))


class Spent:
    """CPU seconds of PostgreSQL: all its processes, those that are over, too."""

    def __init__(self, postgres: Postgres):
        self._parent = postgres.process_id
        self._before = self._now()

    def __call__(self) -> float:
        """Since this was made."""
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
    """So many workers in this process for so long: seconds from when a job was made to when it was taken."""
    return asyncio.run(_idle(url, workers, seconds))


async def now_and_then(url: str, jobs: int, every_s: float) -> None:
    """Submit a job now and then."""
    queue = await PostgresJobQueue.open(url, jobs + 1, role="api")
    for _ in range(jobs):
        await queue.submit(SPEC)
        await asyncio.sleep(every_s)
    await queue.close()


def herd(
    postgres: Postgres, workers: int, jobs: int = 30, every_s: float = 0.4, settle_s: float = 8.0
) -> dict[str, float]:
    """Idle workers and a job now and then: how long a job waits, what it costs, and what idling costs by itself."""
    url = postgres.fresh_database()
    with ProcessPoolExecutor(1) as pool:
        working = pool.submit(idle, url, workers, 2.5 * settle_s + 2 * jobs * every_s)
        time.sleep(settle_s)
        asyncio.run(now_and_then(url, jobs, every_s))
        spent = Spent(postgres)
        time.sleep(settle_s / 2)
        idling = spent() / (settle_s / 2)
        spent = Spent(postgres)
        asyncio.run(now_and_then(url, jobs, every_s))
        each = spent() / jobs - idling * every_s
        delays = sorted(working.result()[jobs:])
    return {
        "taken": len(delays),
        "waits_ms_median": round(delays[len(delays) // 2] * 1000, 1),
        "waits_ms_max": round(delays[-1] * 1000, 1),
        "postgres_cpu_ms_a_job": round(each * 1000, 1),
        "postgres_cpu_ms_a_second_idle": round(idling * 1000, 1),
    }


async def footprint(url: str, jobs: int) -> dict[str, dict[str, float]]:
    """What a job that is over leaves in each table: rows that are dead until autovacuum comes, and bytes on disk, indexes included."""
    await asyncio.sleep(2.0)  # statistics arrive with a delay
    connection = await asyncpg.connect(url)
    rows = await connection.fetch(
        "SELECT relname, n_tup_upd + n_tup_del AS dead, pg_total_relation_size(relid) AS bytes FROM pg_stat_user_tables"
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


async def _small_things(
    url: str, spent: Callable[[], Callable[[], float]], count: int = 1000
) -> dict[str, float]:
    queue = await PostgresJobQueue.open(url, 10, role="worker")
    job = await queue.submit(SPEC)
    await queue.claim()

    async def ask_for_nothing() -> None:
        async with queue._transaction() as (_, rows):
            assert (
                await claims.claim_next(
                    rows, queue._worker, None, claims.ModelAffinity(), may_take_over=True
                )
                is None
            )

    async def tell_progress() -> None:
        queue._claims[job.id].notified_at = 0.0
        await queue.report_progress(job.id, JobProgress(stage="sample", step=1, steps=20))

    async def look() -> None:
        async with queue._transaction() as (connection, _):
            await queue._stats.refresh(connection)

    costs: dict[str, float] = {}
    for name, act in {
        "ask_for_nothing": ask_for_nothing,
        "look": look,
        "progress": tell_progress,
    }.items():
        since = spent()
        for _ in range(count):
            await act()
        costs[name] = round(since() / count * 1000, 2)
    await queue.close()
    return costs


def small_things(postgres: Postgres) -> dict[str, float]:
    """CPU milliseconds of PostgreSQL for what happens often: a worker that asks for nothing, a pod that looks, a message of progress."""
    return asyncio.run(_small_things(postgres.fresh_database(), lambda: Spent(postgres)))


async def news(url: str, listeners: int, count: int = MESSAGES) -> dict[str, float]:
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
        await sender.execute(
            "SELECT pg_notify('news', $1)", '{"news": "progress", "id": "0123456789abcdef01234567"}'
        )
    await everything.wait()
    spent = time.perf_counter() - start
    for connection in (*connections, sender):
        await connection.close()
    return {
        "messages_a_second": round(count / spent),
        "deliveries_a_second": round(count * listeners / spent),
    }


async def commits(url: str, senders: int = 16, seconds: float = 5.0) -> dict[str, int]:
    """Commits a second of so many connections at once, by what they commit: a commit with NOTIFY holds a lock of the whole server."""
    kinds = {
        "a row": ("on", "INSERT INTO written VALUES (1)"),
        "a message": ("on", "SELECT pg_notify('news', 'x')"),
        "a message, not waited for on the disk": ("off", "SELECT pg_notify('news', 'x')"),
    }
    connections = [await asyncpg.connect(url) for _ in range(senders)]
    await connections[0].execute("CREATE TABLE written (x int)")
    done: dict[str, int] = {}
    for name, (synchronous, statement) in kinds.items():
        count, end = 0, time.perf_counter() + seconds

        async def send(
            connection: Any,
            end: float = end,
            synchronous: str = synchronous,
            statement: str = statement,
        ) -> int:
            sent = 0
            while time.perf_counter() < end:
                async with connection.transaction():
                    await connection.execute(f"SET LOCAL synchronous_commit = {synchronous}")
                    await connection.execute(statement)
                sent += 1
            return sent

        count = sum(await asyncio.gather(*map(send, connections)))
        done[name] = round(count / seconds)
    for connection in connections:
        await connection.close()
    return done


def main() -> None:
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
            spent = Spent(postgres)
            submitted = asyncio.run(fill(url, options.jobs))
            submitting_cpu, spent = spent(), Spent(postgres)
            processes = min(2, workers)
            shares = [workers // processes + (i < workers % processes) for i in range(processes)]
            with ProcessPoolExecutor(processes) as pool:
                results = list(pool.map(work, [url] * processes, shares))
            waits = sorted(each for result in results for each in result[0])
            drawing_cpu = spent()
            seconds = max(result[2] for result in results) - min(result[1] for result in results)
            report["workers"][workers] = {
                "submitted_a_second": round(submitted, 1),
                "finished_a_second": round(len(waits) / seconds, 1),
                "claim_ms": {
                    "median": round(waits[len(waits) // 2] * 1000, 1),
                    "p99": round(waits[int(len(waits) * 0.99)] * 1000, 1),
                },
                "postgres_cpu_ms_a_job": {
                    "submit": round(submitting_cpu / options.jobs * 1000, 2),
                    "claim_start_finish": round(drawing_cpu / options.jobs * 1000, 2),
                },
            }
            print(workers, report["workers"][workers], flush=True)
        report["a_job_leaves"] = asyncio.run(footprint(url, options.jobs))
        print(report["a_job_leaves"], flush=True)
        report["postgres_cpu_ms"] = small_things(postgres)
        print(report["postgres_cpu_ms"], flush=True)
        report["idle_workers"] = {}
        for workers in options.idle:
            report["idle_workers"][workers] = herd(postgres, workers)
            print("idle", workers, report["idle_workers"][workers], flush=True)
        report["news"] = {}
        for listeners in (1, 10, 50, 200):
            since = Spent(postgres)
            report["news"][listeners] = asyncio.run(news(postgres.url, listeners))
        report["delivery_cpu_ms"] = round(since() / (listeners * MESSAGES) * 1000, 4)
        print(report["news"])
    finally:
        postgres.remove()
    durable = Postgres(fsync=True)
    try:
        report["commits_a_second_with_fsync"] = asyncio.run(commits(durable.url))
        print(report["commits_a_second_with_fsync"])
    finally:
        durable.remove()
    write_report("shared_queue", report)


if __name__ == "__main__":
    main()
