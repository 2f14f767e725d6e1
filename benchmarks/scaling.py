"""Simulation of one shared queue for a growing fleet.

    python -m benchmarks.scaling [--gpus 10 100 1000 10000]

Requests come at random (Poisson) and keep 85 % of the GPUs busy.
PostgreSQL is a number of cores. Each operation takes a core for a random time.
The time is log-normal. Its mean is that of the newest benchmarks/results/shared-queue-*.json.
The ratio of its 99th percentile to its median is that of the measured claims of four workers.

The report has for each size:

- the cores that PostgreSQL needs
- the wait of a job while a GPU is free
- connections, and messages, deliveries and dead rows a second

It compares the current code with the one before `alphalayer.jobs.claims.WakeupSampling`, in which
every idle worker tried to claim every job. Writes benchmarks/results/scaling-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import simpy
from benchmarks.report import RESULTS, write_report

USE = 0.85
GPUS_A_MACHINE = 8
ANSWERS = 4
"""Idle workers that try to claim a job after its notification."""
PROGRESS_A_SECOND, LOOKS_A_SECOND, ASKS_A_SECOND = 1 / 0.3, 1 / 2, 1.0
JOBS_A_POD = 100
"""Jobs a second of one API pod."""
CONNECTIONS_A_MACHINE, CONNECTIONS_A_POD = 3, 6
MAX_BACKLOG = 50_000
"""Waiting operations of PostgreSQL at which a run ends, because it cannot catch up."""


@dataclass(frozen=True)
class Costs:
    """CPU seconds of PostgreSQL by operation."""

    submit: float
    render: float
    ask_for_nothing: float
    look: float
    progress: float
    delivery: float


def measured_costs() -> tuple[Costs, dict[str, Any]]:
    """Return the costs of the newest measurement, and the measurement itself."""
    measured = json.loads(max(RESULTS.glob("shared-queue-*.json")).read_text())
    jobs, small = measured["workers"]["4"]["postgres_cpu_ms_a_job"], measured["postgres_cpu_ms"]
    milliseconds = {"submit": jobs["submit"], "render": jobs["claim_start_finish"], **small}
    milliseconds["delivery"] = measured["delivery_cpu_ms"]
    costs = Costs(**{name: value / 1000 for name, value in milliseconds.items()})
    return costs, measured


@dataclass
class Database:
    """PostgreSQL: its cores and its work."""

    env: simpy.Environment
    cores: simpy.Resource
    rng: random.Random
    sigma: float
    """Standard deviation of the logarithm of times."""
    work_s: float = 0.0
    deliveries: int = 0
    messages: int = 0

    def do(self, seconds: float) -> Generator[Any, Any, None]:
        """Occupy a core for about that time."""
        seconds *= self.rng.lognormvariate(-(self.sigma**2) / 2, self.sigma)
        self.work_s += seconds
        with self.cores.request() as core:
            yield core
            yield self.env.timeout(seconds)


@dataclass
class Fleet:
    """GPUs that render the jobs of the queue."""

    env: simpy.Environment
    database: Database
    costs: Costs
    image_s: float
    pods: int
    all_answer: bool
    rng: random.Random
    idle: int
    waiting: deque[float] = field(default_factory=deque[float])
    delays: list[float] = field(default_factory=list[float])

    def submit(self) -> Generator[Any, Any, None]:
        """Queue a job, and notify idle workers."""
        submitted_at = self.env.now
        yield from self.database.do(self.costs.submit)
        self.database.messages += 1
        self.waiting.append(submitted_at)
        answers = self.idle if self.all_answer else min(self.idle, ANSWERS)
        for i in range(answers):
            self.env.process(self.answer(i == 0))

    def answer(self, is_first: bool) -> Generator[Any, Any, None]:
        """Let an idle worker try to claim a job. The first one gets it."""
        if is_first and self.idle and self.waiting:
            self.idle -= 1
            yield from self.render()
        else:
            yield from self.database.do(self.costs.ask_for_nothing)

    def render(self) -> Generator[Any, Any, None]:
        """Render jobs on one GPU until no job waits."""
        while self.waiting:
            submitted_at = self.waiting.popleft()
            free_since = self.env.now
            yield from self.database.do(self.costs.render)
            self.delays.append(self.env.now - max(submitted_at, free_since))
            seconds = self.rng.uniform(0.8, 1.2) * self.image_s
            messages = round(seconds * PROGRESS_A_SECOND)
            self.database.messages += messages + 2
            for _ in range(messages):
                yield self.env.timeout(seconds / messages)
                self.env.process(
                    self.database.do(self.costs.progress + self.pods * self.costs.delivery)
                )
        yield from self.database.do(self.costs.ask_for_nothing)
        self.idle += 1


def simulate(
    gpus: int,
    cores: int,
    image_s: float,
    costs: Costs,
    *,
    sigma: float,
    all_answer: bool,
    seed: int = 0,
) -> dict[str, Any]:
    """Simulate one size of fleet: many images for each GPU if it is small, else few."""
    env, rng = simpy.Environment(), random.Random(seed)
    jobs_a_second = USE * gpus / image_s
    pods, machines = max(2, round(jobs_a_second / JOBS_A_POD)), -(-gpus // GPUS_A_MACHINE)
    database = Database(env, simpy.Resource(env, cores), rng, sigma)
    fleet = Fleet(env, database, costs, image_s, pods, all_answer, rng, gpus)
    duration_s = max(8 * image_s, 2000 * image_s / gpus)

    def repeat(
        rate: float, action: Callable[[], Generator[Any, Any, None]]
    ) -> Generator[Any, Any, None]:
        while True:
            yield env.timeout(rng.expovariate(rate))
            env.process(action())

    env.process(repeat(jobs_a_second, fleet.submit))
    env.process(repeat((machines + pods) * LOOKS_A_SECOND, lambda: database.do(costs.look)))
    env.process(
        repeat((1 - USE) * gpus * ASKS_A_SECOND, lambda: database.do(costs.ask_for_nothing))
    )
    while env.peek() < duration_s and len(database.cores.queue) < MAX_BACKLOG:
        env.step()
    delays = sorted(fleet.delays)
    return {
        "jobs_a_second": round(jobs_a_second, 1),
        "cores_needed": round(database.work_s / env.now, 2),
        "keeps_up": database.work_s / env.now < cores and len(database.cores.queue) < 10 * cores,
        "claim_ms_median": round(delays[len(delays) // 2] * 1000, 1),
        "claim_ms_p99": round(delays[int(len(delays) * 0.99)] * 1000, 1),
        "api_pods": pods,
        "connections": machines * CONNECTIONS_A_MACHINE + pods * CONNECTIONS_A_POD,
        "messages_a_second": round(database.messages / env.now),
        "deliveries_a_second": round(database.messages / env.now * pods),
    }


def main() -> None:
    """Simulate and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--cores", type=int, default=16, help="of PostgreSQL's machine")
    parser.add_argument("--seconds", type=float, default=2.8, help="seconds for one image")
    options = parser.parse_args()
    costs, measured = measured_costs()
    claim = measured["workers"]["4"]["claim_ms"]
    sigma = math.log(claim["p99"] / claim["median"]) / NormalDist().inv_cdf(0.99)
    report: dict[str, Any] = {**vars(options), "costs_s": vars(costs)}
    report["sigma"] = round(sigma, 3)
    report["messages_a_second_that_one_server_took"] = measured["commits_a_second_with_fsync"][
        "a message"
    ]
    dead_rows = sum(table["dead_rows"] for table in measured["a_job_leaves"].values())
    cases = (
        ("some answer", False, options.cores),
        ("some answer, cores without end", False, 10_000),
        ("all answer", True, options.cores),
    )
    for name, all_answer, cores in cases:
        report[name] = {}
        for gpus in options.gpus:
            figures = simulate(
                gpus, cores, options.seconds, costs, sigma=sigma, all_answer=all_answer
            )
            report[name][gpus] = {
                **figures,
                "dead_rows_a_second": round(figures["jobs_a_second"] * dead_rows),
            }
            print(name, gpus, report[name][gpus], flush=True)
    write_report("scaling", report)


if __name__ == "__main__":
    main()
