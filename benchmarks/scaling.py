"""One shared queue under a growing fleet, by simulation: `python -m benchmarks.scaling [--gpus 10 100 1000 10000]`.

Requests come at random (Poisson), as many as keep 85 % of the GPUs busy. PostgreSQL is so many cores, and each thing that is asked of it
holds one for as long as the newest benchmarks/results/shared-queue-*.json says, more or less: the time is drawn from a log-normal
distribution with that mean, whose 99th percentile lies as far above its median as that of the measured claims of four workers.

Reported for each size: the cores that PostgreSQL wants, how long a job waits although a GPU is free, and connections, messages, deliveries
and dead rows a second. Twice: as it is, and as it was before
`alphalayer.jobs.claims.WakeupSampling`, when every idle worker asked
for every job. Writes benchmarks/results/scaling-<date>.json.
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
"""Idle workers that ask for a job when they hear of one."""
PROGRESS_A_SECOND, LOOKS_A_SECOND, ASKS_A_SECOND = 1 / 0.3, 1 / 2, 1.0
JOBS_A_POD = 100
"""Jobs a second that an API pod is given to do."""
CONNECTIONS_A_MACHINE, CONNECTIONS_A_POD = 3, 6
HOPELESS = 50_000
"""A run ends when so much waits for PostgreSQL: it will not catch up."""


@dataclass(frozen=True)
class Costs:
    """CPU seconds of PostgreSQL."""

    submit: float
    draw: float
    ask_for_nothing: float
    look: float
    progress: float
    delivery: float


def measured_costs() -> tuple[Costs, dict[str, Any]]:
    """From the newest measurement; and that whole."""
    found = json.loads(max(RESULTS.glob("shared-queue-*.json")).read_text())
    jobs, small = found["workers"]["4"]["postgres_cpu_ms_a_job"], found["postgres_cpu_ms"]
    milliseconds = {"submit": jobs["submit"], "draw": jobs["claim_start_finish"], **small}
    milliseconds["delivery"] = found["delivery_cpu_ms"]
    costs = Costs(**{name: value / 1000 for name, value in milliseconds.items()})
    return costs, found


@dataclass
class Database:
    """PostgreSQL: cores, and the work that was asked of it."""

    env: simpy.Environment
    cores: simpy.Resource
    rng: random.Random
    sigma: float
    """How far times scatter: the standard deviation of their logarithm."""
    work_s: float = 0.0
    deliveries: int = 0
    messages: int = 0

    def do(self, seconds: float) -> Generator[Any, Any, None]:
        """Hold a core for about so long."""
        seconds *= self.rng.lognormvariate(-(self.sigma**2) / 2, self.sigma)
        self.work_s += seconds
        with self.cores.request() as core:
            yield core
            yield self.env.timeout(seconds)


@dataclass
class Fleet:
    """GPUs that draw what is in the queue, as workers and pods do."""

    env: simpy.Environment
    database: Database
    costs: Costs
    picture_s: float
    pods: int
    all_answer: bool
    rng: random.Random
    idle: int
    waiting: deque[float] = field(default_factory=deque[float])
    delays: list[float] = field(default_factory=list[float])

    def submit(self) -> Generator[Any, Any, None]:
        """A request: a job in the queue, and idle workers that hear of it."""
        asked = self.env.now
        yield from self.database.do(self.costs.submit)
        self.database.messages += 1
        self.waiting.append(asked)
        answers = self.idle if self.all_answer else min(self.idle, ANSWERS)
        for i in range(answers):
            self.env.process(self.answer(i == 0))

    def answer(self, is_first: bool) -> Generator[Any, Any, None]:
        """An idle worker that heard of a job: one gets it."""
        if is_first and self.idle and self.waiting:
            self.idle -= 1
            yield from self.render()
        else:
            yield from self.database.do(self.costs.ask_for_nothing)

    def render(self) -> Generator[Any, Any, None]:
        """A GPU that draws until nothing waits."""
        while self.waiting:
            asked = self.waiting.popleft()
            free_since = self.env.now
            yield from self.database.do(self.costs.render)
            self.delays.append(self.env.now - max(asked, free_since))
            seconds = self.rng.uniform(0.8, 1.2) * self.picture_s
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
    picture_s: float,
    costs: Costs,
    *,
    sigma: float,
    all_answer: bool,
    seed: int = 0,
) -> dict[str, Any]:
    """One size of fleet, for some hundred pictures a GPU where it is small and a few where it is large."""
    env, rng = simpy.Environment(), random.Random(seed)
    jobs_a_second = USE * gpus / picture_s
    pods, machines = max(2, round(jobs_a_second / JOBS_A_POD)), -(-gpus // GPUS_A_MACHINE)
    database = Database(env, simpy.Resource(env, cores), rng, sigma)
    fleet = Fleet(env, database, costs, picture_s, pods, all_answer, rng, gpus)
    duration_s = max(8 * picture_s, 2000 * picture_s / gpus)

    def repeat(
        rate: float, act: Callable[[], Generator[Any, Any, None]]
    ) -> Generator[Any, Any, None]:
        while True:
            yield env.timeout(rng.expovariate(rate))
            env.process(act())

    env.process(repeat(jobs_a_second, fleet.submit))
    env.process(repeat((machines + pods) * LOOKS_A_SECOND, lambda: database.do(costs.look)))
    env.process(
        repeat((1 - USE) * gpus * ASKS_A_SECOND, lambda: database.do(costs.ask_for_nothing))
    )
    while env.peek() < duration_s and len(database.cores.queue) < HOPELESS:
        env.step()
    delays = sorted(fleet.delays)
    return {
        "jobs_a_second": round(jobs_a_second, 1),
        "cores_wanted": round(database.work_s / env.now, 2),
        "keeps_up": database.work_s / env.now < cores and len(database.cores.queue) < 10 * cores,
        "claim_ms_median": round(delays[len(delays) // 2] * 1000, 1),
        "claim_ms_p99": round(delays[int(len(delays) * 0.99)] * 1000, 1),
        "api_pods": pods,
        "connections": machines * CONNECTIONS_A_MACHINE + pods * CONNECTIONS_A_POD,
        "messages_a_second": round(database.messages / env.now),
        "deliveries_a_second": round(database.messages / env.now * pods),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--cores", type=int, default=16, help="of PostgreSQL's machine")
    parser.add_argument("--seconds", type=float, default=2.8, help="a picture takes")
    options = parser.parse_args()
    costs, measured = measured_costs()
    claim = measured["workers"]["4"]["claim_ms"]
    sigma = math.log(claim["p99"] / claim["median"]) / NormalDist().inv_cdf(0.99)
    report: dict[str, Any] = {**vars(options), "costs_s": vars(costs)}
    report["sigma"] = round(sigma, 3)
    report["messages_a_second_that_one_server_took"] = measured["commits_a_second_with_fsync"][
        "a message"
    ]
    dead_rows = sum(each["dead_rows"] for each in measured["a_job_leaves"].values())
    cases = (
        ("some answer", False, options.cores),
        ("some answer, cores without end", False, 10_000),
        ("all answer", True, options.cores),
    )
    for name, all_answer, cores in cases:
        report[name] = {}
        for gpus in options.gpus:
            found = simulate(
                gpus, cores, options.seconds, costs, sigma=sigma, all_answer=all_answer
            )
            report[name][gpus] = {
                **found,
                "dead_rows_a_second": round(found["jobs_a_second"] * dead_rows),
            }
            print(name, gpus, report[name][gpus], flush=True)
    write_report("scaling", report)


if __name__ == "__main__":
    main()
