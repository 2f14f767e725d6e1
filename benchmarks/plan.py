"""Comparison of `alphalayer plan` with a real service.

    python -m benchmarks.plan [--minutes 3] [--cases light batches]

Users send requests to a real API pod, wait for the image, think (exponential) and repeat.
Real workers with the fake engine claim the jobs from a shared PostgreSQL.
An image takes about 1.5 seconds. The time of an image alone is measured first, for `--seconds`.
Then the same users and pods are simulated.

The report compares the number of images, the mean and the 95th percentile of the wait, and the
use of the workers.

- In one case a worker renders up to four jobs together. With the fake engine, a batch takes as
  long as one image.
- In another case workers start by the age of the queue, which the API pod reports at /metrics.
  The `Autoscaler` of the simulation starts real workers, which are cold while they start.

Writes benchmarks/results/plan-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from benchmarks.report import write_report
from tests.stress.pods import Node
from tests.support.servers import Postgres
from tests.support.serving import wait_until

from alphalayer.planner.simulation import (
    SYNC_S,
    Autoscaler,
    Fleet,
    Load,
    Outcome,
    Scaling,
    simulate,
)

STEPS = 150
REQUEST = {"prompt": "x", "width": 64, "height": 64, "steps": STEPS}
MAX_PODS, AGE_S = 4, 4.0


@dataclass(frozen=True)
class Case:
    """Users, workers at the start, jobs of a batch, and whether workers are autoscaled."""

    load: Load
    pods: int = 2
    batch: int = 1
    scales: bool = False


CASES = {
    "light": Case(Load(8, 6.0)),
    "busy": Case(Load(10, 6.0)),
    "too few workers": Case(Load(16, 6.0)),
    "batches": Case(Load(24, 6.0), batch=4),
    "autoscaled": Case(Load(16, 6.0), pods=1, scales=True),
}


async def _measure(address: str, load: Load, duration_s: float) -> tuple[list[float], float]:
    """Measure the waits of real users, without the first fifth of the time.

    Returns:
        The waits in seconds, and the measured time in seconds.
    """
    waits: list[float] = []
    started_at = time.monotonic()
    counted_from = started_at + duration_s / 5

    async def user(seed: int, client: httpx.AsyncClient) -> None:
        rng = random.Random(seed)
        await asyncio.sleep(rng.uniform(0, load.think_s))
        while (sent_at := time.monotonic()) < started_at + duration_s:
            (await client.post("/alpha/v1/txt2img", json=REQUEST)).raise_for_status()
            if counted_from <= sent_at and time.monotonic() < started_at + duration_s:
                waits.append(time.monotonic() - sent_at)
            await asyncio.sleep(rng.expovariate(1 / load.think_s))

    async with httpx.AsyncClient(base_url=address, timeout=120, trust_env=False) as client:
        await asyncio.gather(*(user(i, client) for i in range(load.users)))
    return waits, duration_s * 4 / 5


def _measure_alone(address: str, images: int = 8) -> float:
    """Measure the mean seconds of an image without other load. Skip the first one."""
    times: list[float] = []
    for _ in range(images + 1):
        start = time.monotonic()
        httpx.post(
            f"{address}/alpha/v1/txt2img", json=REQUEST, timeout=60, trust_env=False
        ).raise_for_status()
        times.append(time.monotonic() - start)
    return statistics.fmean(times[1:])


class Site:
    """A PostgreSQL server, an API pod and workers."""

    def __init__(self, folder: Path, case: Case, stack: ExitStack):
        postgres = Postgres()
        stack.callback(postgres.remove)
        self._folder, self._stack = folder, stack
        self._environment = {"ALPHALAYER_DATABASE": postgres.url}
        if case.batch > 1:
            self._environment |= {"ALPHALAYER_BATCH_PIXELS": str(case.batch * 64 * 64)}
        self._nodes: list[Node] = []
        self.address = self.start("api").address
        for _ in range(case.pods):
            self.start("worker")
        wait_until(lambda: all(node.answers() for node in self._nodes), 120)

    @property
    def workers(self) -> int:
        """Return the number of started workers."""
        return len(self._nodes) - 1

    def start(self, role: str) -> Node:
        """Start one more process, which is cold at first."""
        node = Node(self._folder / f"{len(self._nodes)}", role, self._environment)
        self._stack.callback(node.stop)
        self._nodes.append(node)
        return node

    def age_s(self) -> float:
        """Return the age of the oldest job, from /metrics."""
        metrics = httpx.get(f"{self.address}/metrics", trust_env=False).text
        return next(
            float(line.split()[1])
            for line in metrics.splitlines()
            if line.startswith("alphalayer_queue_age_")
        )


async def _scale(site: Site, scaling: Scaling, log: dict[str, list[float]]) -> None:
    """Start workers by the autoscaler until cancelled, and log their starts."""
    autoscaler, started_at = Autoscaler(scaling, site.workers), time.monotonic()

    async def warm(node: Node) -> None:
        start = time.monotonic()
        while not await asyncio.to_thread(node.answers):
            await asyncio.sleep(0.1)
        log["cold_s"].append(time.monotonic() - start)

    warming: list[asyncio.Task[None]] = []
    while True:
        await asyncio.sleep(SYNC_S)
        now = time.monotonic() - started_at
        age_s = await asyncio.to_thread(site.age_s)
        pods = autoscaler.update(now, site.workers, age_s)
        for _ in range(max(0, pods - site.workers)):
            log["started_at"].append(now)
            warming.append(asyncio.create_task(warm(site.start("worker"))))


async def _measure_scaled(
    site: Site, case: Case, duration_s: float, log: dict[str, list[float]]
) -> tuple[list[float], float]:
    rule = Scaling(MAX_PODS, age_s=AGE_S)
    scaling = asyncio.create_task(_scale(site, rule, log)) if case.scales else None
    try:
        return await _measure(site.address, case.load, duration_s)
    finally:
        if scaling:
            scaling.cancel()
            await asyncio.gather(scaling, return_exceptions=True)


def real_run(case: Case, duration_s: float) -> tuple[Outcome, float, dict[str, list[float]]]:
    """Measure a case; return the outcome, the seconds of an image, and all starts."""
    log: dict[str, list[float]] = {"started_at": [], "cold_s": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        site = Site(Path(folder), case, stack)
        seconds = _measure_alone(site.address)
        waits, counted_s = asyncio.run(_measure_scaled(site, case, duration_s, log))
    first = duration_s - counted_s
    added_s = sum(duration_s - max(start, first) for start in log["started_at"])
    pod_s = case.pods * counted_s + added_s
    return (
        Outcome(waits, busy_s=len(waits) * seconds, pod_s=pod_s, counted_s=counted_s),
        seconds,
        log,
    )


def _figures(outcome: Outcome) -> dict[str, Any]:
    return {
        "images": len(outcome.waits),
        "mean_s": round(statistics.fmean(outcome.waits), 2),
        "p95_s": round(outcome.p95_s, 2),
        "use": round(outcome.use, 2),
        "mean_pods": round(outcome.mean_pods, 2),
    }


def main() -> None:
    """Measure and simulate the cases, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="duration of each case")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument(
        "--write", type=Path, help="report to write; default: below benchmarks/results"
    )
    options = parser.parse_args()
    report: dict[str, Any] = {"cases": {}}
    for name in options.cases:
        case = CASES[name]
        outcome, seconds, log = real_run(case, options.minutes * 60)
        real = _figures(outcome)
        if case.batch > 1:
            real["use"] = None  # the service does not report the sizes of its batches
        cold_s = statistics.fmean(log["cold_s"]) if log["cold_s"] else 0.0
        scaling = Scaling(MAX_PODS, cold_s, AGE_S) if case.scales else None
        fleet = Fleet(case.pods, seconds, case.batch, scaling, batch_cost=0.0)
        # twenty runs show the random variation of a run of this length
        runs = [
            _figures(simulate(case.load, fleet, options.minutes * 60, seed)) for seed in range(20)
        ]
        ranges = {
            key: [min(run[key] for run in runs), max(run[key] for run in runs)] for key in runs[0]
        }
        report["cases"][name] = {
            "users": case.load.users,
            "think_s": case.load.think_s,
            "workers": case.pods,
            "batch": case.batch,
            "scaling": {**vars(scaling), **log} if scaling else None,
            "seconds_an_image": round(seconds, 2),
            "measured": real,
            "simulated": {
                key: round(statistics.fmean(run[key] for run in runs), 2) for key in runs[0]
            },
            "simulated_range": ranges,
        }
        print(json.dumps({name: report["cases"][name]}, indent=1), flush=True)
    write_report("plan", report, options.write)


if __name__ == "__main__":
    main()
