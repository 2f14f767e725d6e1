"""`alphalayer plan` against a real service: `python -m benchmarks.plan [--minutes 3]`.

Users ask a real API pod for pictures, wait for them, think (exponential) and ask again; real workers with the fake engine, whose pictures
take some 1.5 seconds, pull the jobs from a shared PostgreSQL. What a picture takes alone is measured first, as one is told to do
for `--seconds`; then the same users and pods are simulated. Reported side by side: pictures, mean and 95th percentile of the wait, use
of the workers. Writes benchmarks/results/plan-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import httpx
from tests.servers import Postgres
from tests.serving import wait_until
from tests.stress.pods import Node

from alphalayer.plan import Fleet, Load, Outcome, simulate

RESULTS = Path(__file__).parent / "results"
STEPS = 150
REQUEST = {"prompt": "x", "width": 64, "height": 64, "steps": STEPS}
CASES = {"light": (Load(8, 6.0), 2), "busy": (Load(10, 6.0), 2), "too few workers": (Load(16, 6.0), 2)}


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
        httpx.post(f"{address}/alpha/v1/txt2img", json=REQUEST, timeout=60, trust_env=False).raise_for_status()
        taken.append(time.monotonic() - start)
    return statistics.fmean(taken[1:])


def real_run(load: Load, pods: int, duration_s: float) -> tuple[Outcome, float]:
    """Measure so many workers; and the seconds of a picture alone."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        postgres = Postgres()
        stack.callback(postgres.remove)
        environment = {"ALPHALAYER_DATABASE": postgres.url}
        nodes = [Node(Path(folder) / f"{i}", "worker" if i else "api", environment) for i in range(pods + 1)]
        for node in nodes:
            stack.callback(node.stop)
        wait_until(lambda: all(node.answers() for node in nodes), 60)
        seconds = _alone(nodes[0].address)
        waits, counted_s = asyncio.run(_measure(nodes[0].address, load, duration_s))
    return Outcome(waits, busy_s=len(waits) * seconds, pod_s=pods * counted_s), seconds


def _figures(outcome: Outcome) -> dict[str, Any]:
    return {
        "pictures": len(outcome.waits),
        "mean_s": round(statistics.fmean(outcome.waits), 2),
        "p95_s": round(outcome.p95_s, 2),
        "use": round(outcome.use, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="of each case")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python -m benchmarks.plan",
        "machine": f"2 x {platform.machine()}, Python {platform.python_version()}",
        "cases": {},
    }
    for name, (load, pods) in CASES.items():
        outcome, seconds = real_run(load, pods, options.minutes * 60)
        real = _figures(outcome)
        # what chance alone does to a run of this length: twenty of them
        runs = [simulate(load, Fleet(pods, seconds, batch=1), options.minutes * 60, seed) for seed in range(20)]
        planned = [_figures(run) for run in runs]
        ranges = {key: [min(each[key] for each in planned), max(each[key] for each in planned)] for key in planned[0]}
        report["cases"][name] = {
            "users": load.users,
            "think_s": load.think_s,
            "workers": pods,
            "seconds_a_picture": round(seconds, 2),
            "measured": real,
            "simulated": {key: round(statistics.fmean(each[key] for each in planned), 2) for key in planned[0]},
            "simulated_range": ranges,
        }
        print(json.dumps({name: report["cases"][name]}, indent=1), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"plan-{date.today()}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
