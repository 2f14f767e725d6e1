"""How many pods a number of users needs: a simulation of the service, not a formula. On simpy; knows nothing of the service's code.

Users ask, wait for the picture, look at it (think time) and ask again. Pods draw one batch at a time, the oldest job first, and take
along what waits, up to `batch` jobs. A pod that is started late is cold for a while.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import simpy


@dataclass(frozen=True)
class Gpu:
    """One kind of card: seconds for a picture of SDXL (1024x1024, 20 steps) drawn alone, and dollars an hour."""

    seconds: float
    price: float
    source: str


GPUS = {
    "rtx3090": Gpu(5.7, 0.45, "published: OneDiff's baseline"),
    "rtx4090": Gpu(2.8, 0.70, "published: OneDiff's baseline"),
    "a5000": Gpu(6.3, 0.35, "estimated: RTX 3090 x 1.1"),
    "a100": Gpu(1.8, 1.80, "published: diffusers' tutorial at 20 steps, with decoding estimated"),
    "l40s": Gpu(2.4, 0.90, "estimated: MLPerf's rate, half as fast without fp8"),
    "h100": Gpu(1.3, 2.80, "published: stable-fast's rates, with decoding estimated"),
    "h200": Gpu(0.9, 3.80, "computed: 0.9 to 1.2 s is ordinary for bf16"),
}
"""Before anything was measured with this service; prices are what such cards were rented for in 2026. Both can be given."""
BATCH_COST = 0.9
"""A picture that is drawn along with others takes this part of the time of one alone."""
MOST_USE = 0.9
"""Fleets that are busier than this have nothing left for a bad day."""
OLD_SECONDS = (15.0, 30.0)
"""What a picture took in the old stack, one at a time, by its manual."""


@dataclass(frozen=True)
class Load:
    """Who asks: users, and how long each looks at a picture before the next one (mean seconds, exponential)."""

    users: int
    think_s: float


@dataclass(frozen=True)
class Fleet:
    """Who draws: pods from the start and at most, seconds of a picture alone, jobs a batch at most, and how long a start takes."""

    pods: int
    seconds: float
    batch: int = 4
    most_pods: int = 0
    cold_start_s: float = 90.0
    wanted_wait_s: float = 10.0
    """Above this age of the oldest job one more pod is started, up to `most_pods`."""


@dataclass
class Outcome:
    """What came of it: waits in seconds from asking to the picture, and how busy the pods were (0 to 1)."""

    waits: list[float] = field(default_factory=list[float])
    busy_s: float = 0.0
    pod_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """Mean seconds from asking to the picture."""
        return statistics.fmean(self.waits) if self.waits else 0.0

    @property
    def p95_s(self) -> float:
        """Seconds that 95 of 100 requests stay below."""
        return sorted(self.waits)[int(len(self.waits) * 0.95)] if self.waits else 0.0

    @property
    def use(self) -> float:
        """Part of the pods' time that they draw."""
        return self.busy_s / self.pod_s if self.pod_s else 0.0


class _Service:
    """The queue and the pods of one simulation."""

    def __init__(self, env: simpy.Environment, fleet: Fleet, outcome: Outcome, warm_up_s: float):
        self._env, self._fleet, self._outcome, self._warm_up_s = env, fleet, outcome, warm_up_s
        self._queue: deque[tuple[float, simpy.Event]] = deque()
        self._idle: deque[simpy.Event] = deque()
        self.pods = 0
        for _ in range(fleet.pods):
            self._start_pod(0.0)
        if fleet.most_pods > fleet.pods:
            env.process(self._scale())

    def ask(self) -> simpy.Event:
        """Join the queue; the event comes with the picture."""
        done = self._env.event()
        self._queue.append((self._env.now, done))
        if self._idle:
            self._idle.popleft().succeed()
        return done

    def _start_pod(self, cold_s: float) -> None:
        self.pods += 1
        self._env.process(self._pod(cold_s))

    def _pod(self, cold_s: float) -> Generator[Any, Any, None]:
        if cold_s:
            yield self._env.timeout(cold_s)
        while True:
            while not self._queue:
                woken = self._env.event()
                self._idle.append(woken)
                yield woken
            batch = [self._queue.popleft() for _ in range(min(self._fleet.batch, len(self._queue)))]
            seconds = self._fleet.seconds * (1 + (len(batch) - 1) * BATCH_COST)
            yield self._env.timeout(seconds)
            if self._env.now >= self._warm_up_s:
                self._outcome.busy_s += seconds
            for asked_at, done in batch:
                if asked_at >= self._warm_up_s:
                    self._outcome.waits.append(self._env.now - asked_at)
                done.succeed()

    def _scale(self) -> Generator[Any, Any, None]:
        while True:
            yield self._env.timeout(self._fleet.wanted_wait_s)
            age = self._env.now - self._queue[0][0] if self._queue else 0.0
            if age > self._fleet.wanted_wait_s and self.pods < self._fleet.most_pods:
                self._start_pod(self._fleet.cold_start_s)


def simulate(load: Load, fleet: Fleet, duration_s: float = 0.0, seed: int = 0) -> Outcome:
    """Run users against pods; by default for 30 rounds of a user, fewer of many. The first fifth is not counted."""
    env, outcome, rng = simpy.Environment(), Outcome(), random.Random(seed)
    duration_s = duration_s or max(6, min(30, 20_000 // load.users)) * (load.think_s + fleet.seconds)
    warm_up_s = duration_s / 5
    service = _Service(env, fleet, outcome, warm_up_s)

    def user() -> Generator[Any, Any, None]:
        yield env.timeout(rng.uniform(0, load.think_s))
        while True:
            yield service.ask()
            yield env.timeout(rng.expovariate(1 / load.think_s) if load.think_s else 0)

    for _ in range(load.users):
        env.process(user())
    env.run(until=duration_s)
    outcome.pod_s = service.pods * (duration_s - warm_up_s)
    return outcome


def pods_needed(load: Load, seconds: float, batch: int, p95_s: float, most: int = 100_000) -> tuple[int, Outcome]:
    """The fewest pods with which 95 of 100 requests have their picture in time and some room is left, by bisection; and how it goes.

    Raises:
        ValueError: one picture alone takes longer than that.
    """
    if seconds > p95_s:
        raise ValueError(f"a picture alone takes {seconds:.1f} s; ask for no less than that")
    # users who wait as long as is allowed ask this often; fewer pods than that cannot keep up
    busy = load.users * seconds * (1 + (batch - 1) * BATCH_COST) / batch / (load.think_s + p95_s)
    low, high = 0, max(1, round(busy / MOST_USE))
    outcomes: dict[int, Outcome] = {}

    def is_enough(pods: int) -> bool:
        outcomes[pods] = simulate(load, Fleet(pods, seconds, batch))
        return bool(outcomes[pods].waits) and outcomes[pods].p95_s <= p95_s and outcomes[pods].use <= MOST_USE

    while not is_enough(high):
        low, high = high, high + max(1, high // 8)
        if high > most:
            raise ValueError(f"{most} pods are not enough")
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high, outcomes[high]
