"""`alphalayer plan` against a real service: `python -m benchmarks.plan [--minutes 3] [--cases light batches]`.

Users ask a real API pod for pictures, wait for them, think (exponential) and ask again; real workers with the fake engine, whose pictures
take some 1.5 seconds, pull the jobs from a shared PostgreSQL. What a picture takes alone is measured first, as one is told to do
for `--seconds`; then the same users and pods are simulated. Reported side by side: pictures, mean and 95th percentile of the wait, use
of the workers. Among the cases are workers that draw up to four jobs together (of the fake engine a batch takes as long as one), and
workers that come by the queue's age: then a real worker is started whenever the simulation's own `Scaler`, fed with the age that the
API pod tells at /metrics, asks for one, and is cold for as long as it takes to start. Writes benchmarks/results/plan-<date>.json.
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

from alphalayer.planner.simulation import SYNC_S, Fleet, Load, Outcome, Scaler, Scaling, simulate

STEPS = 150
REQUEST = {"prompt": "x", "width": 64, "height": 64, "steps": STEPS}
MOST, AGE_S = 4, 4.0


@dataclass(frozen=True)
class Case:
    """Users, workers at the start, jobs a batch, and whether workers come by the queue's age."""

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
    """The waits of real users after the first fifth, and the seconds in which they were counted."""
    waits: list[float] = []
    begun = time.monotonic()
    counted_from = begun + duration_s / 5

    async def user(seed: int, client: httpx.AsyncClient) -> None:
        rng = random.Random(seed)
        await asyncio.sleep(rng.uniform(0, load.think_s))
        while (asked := time.monotonic()) < begun + duration_s:
            (await client.post("/alpha/v1/txt2img", json=REQUEST)).raise_for_status()
            if counted_from <= asked and time.monotonic() < begun + duration_s:
                waits.append(time.monotonic() - asked)
            await asyncio.sleep(rng.expovariate(1 / load.think_s))

    async with httpx.AsyncClient(base_url=address, timeout=120, trust_env=False) as client:
        await asyncio.gather(*(user(i, client) for i in range(load.users)))
    return waits, duration_s * 4 / 5


def _alone(address: str, pictures: int = 8) -> float:
    """Mean seconds of a picture that nobody else waits for; the first is not counted."""
    taken: list[float] = []
    for _ in range(pictures + 1):
        start = time.monotonic()
        httpx.post(
            f"{address}/alpha/v1/txt2img", json=REQUEST, timeout=60, trust_env=False
        ).raise_for_status()
        taken.append(time.monotonic() - start)
    return statistics.fmean(taken[1:])


class Site:
    """A PostgreSQL, an API pod and workers."""

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
        """How many were started."""
        return len(self._nodes) - 1

    def start(self, role: str) -> Node:
        """Start one more process; it is cold at first."""
        node = Node(self._folder / f"{len(self._nodes)}", role, self._environment)
        self._stack.callback(node.stop)
        self._nodes.append(node)
        return node

    def age_s(self) -> float:
        """How long the oldest job has waited, as Prometheus would hear it."""
        told = httpx.get(f"{self.address}/metrics", trust_env=False).text
        return next(
            float(line.split()[1])
            for line in told.splitlines()
            if line.startswith("alphalayer_queue_age_")
        )


async def _scale(site: Site, scaling: Scaling, log: dict[str, list[float]]) -> None:
    """Start workers as the simulation's scaler says, until cancelled; when they were started and how long each was cold."""
    scaler, begun = Scaler(scaling, site.workers), time.monotonic()

    async def warm(node: Node) -> None:
        start = time.monotonic()
        while not await asyncio.to_thread(node.answers):
            await asyncio.sleep(0.1)
        log["cold_s"].append(time.monotonic() - start)

    warming: list[asyncio.Task[None]] = []
    while True:
        await asyncio.sleep(SYNC_S)
        now = time.monotonic() - begun
        age_s = await asyncio.to_thread(site.age_s)
        for _ in range(max(0, scaler.look(now, site.workers, age_s) - site.workers)):
            log["started_at"].append(now)
            warming.append(asyncio.create_task(warm(site.start("worker"))))


async def _measure_scaled(
    site: Site, case: Case, duration_s: float, log: dict[str, list[float]]
) -> tuple[list[float], float]:
    scaling = (
        asyncio.create_task(_scale(site, Scaling(MOST, age_s=AGE_S), log)) if case.scales else None
    )
    try:
        return await _measure(site.address, case.load, duration_s)
    finally:
        if scaling:
            scaling.cancel()
            await asyncio.gather(scaling, return_exceptions=True)


def real_run(case: Case, duration_s: float) -> tuple[Outcome, float, dict[str, list[float]]]:
    """Measure a case; the seconds of a picture alone, and what was started when."""
    log: dict[str, list[float]] = {"started_at": [], "cold_s": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        site = Site(Path(folder), case, stack)
        seconds = _alone(site.address)
        waits, counted_s = asyncio.run(_measure_scaled(site, case, duration_s, log))
    first = duration_s - counted_s
    pod_s = case.pods * counted_s + sum(duration_s - max(each, first) for each in log["started_at"])
    return (
        Outcome(waits, busy_s=len(waits) * seconds, pod_s=pod_s, counted_s=counted_s),
        seconds,
        log,
    )


def _figures(outcome: Outcome) -> dict[str, Any]:
    return {
        "pictures": len(outcome.waits),
        "mean_s": round(statistics.fmean(outcome.waits), 2),
        "p95_s": round(outcome.p95_s, 2),
        "use": round(outcome.use, 2),
        "mean_pods": round(outcome.mean_pods, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="of each case")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--write", type=Path, help="where to; else benchmarks/results")
    options = parser.parse_args()
    report: dict[str, Any] = {"cases": {}}
    for name in options.cases:
        case = CASES[name]
        outcome, seconds, log = real_run(case, options.minutes * 60)
        real = _figures(outcome)
        if case.batch > 1:
            real["use"] = None  # how full the batches were is not seen from outside
        cold_s = statistics.fmean(log["cold_s"]) if log["cold_s"] else 0.0
        scaling = Scaling(MOST, cold_s, AGE_S) if case.scales else None
        fleet = Fleet(case.pods, seconds, case.batch, scaling, batch_cost=0.0)
        # what chance alone does to a run of this length: twenty of them
        runs = [simulate(case.load, fleet, options.minutes * 60, seed) for seed in range(20)]
        planned = [_figures(run) for run in runs]
        ranges = {
            key: [min(each[key] for each in planned), max(each[key] for each in planned)]
            for key in planned[0]
        }
        report["cases"][name] = {
            "users": case.load.users,
            "think_s": case.load.think_s,
            "workers": case.pods,
            "batch": case.batch,
            "scaling": {**vars(scaling), **log} if scaling else None,
            "seconds_a_picture": round(seconds, 2),
            "measured": real,
            "simulated": {
                key: round(statistics.fmean(each[key] for each in planned), 2) for key in planned[0]
            },
            "simulated_range": ranges,
        }
        print(json.dumps({name: report["cases"][name]}, indent=1), flush=True)
    write_report("plan", report, options.write)


if __name__ == "__main__":
    main()
