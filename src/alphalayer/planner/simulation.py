"""How many pods a number of users needs: a simulation of the service, not a formula. On simpy; knows nothing of the service's code.

Users ask, wait for the picture, look at it (think time) and ask again. Pods draw one batch at a time, the oldest job first, and take
along what waits, up to `batch` jobs. Pods may come and go with the age of the oldest job, as Kubernetes and KEDA do it; one that is
started late is cold for a while.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
SYNC_S, TOLERANCE = 15.0, 0.1
"""How often Kubernetes' autoscaler looks, and what it takes for no difference."""
SCALED_S = 7200.0
MOST_USE = 0.9
"""Fleets that are busier than this have nothing left for a bad day."""
OLD_SECONDS = (15.0, 30.0)
"""What a picture took in the old stack, one at a time, by its manual."""
OLD_STACK = (
    "Old stack: its manual says 15 to 30 s a picture, one at a time. Its table of pods by users is not known here; these rows are "
    "computed as the others are, for 95 of 100 answers within twice the time of a picture."
)


@dataclass(frozen=True)
class Load:
    """Who asks: users, and how long each looks at a picture before the next one (mean seconds, exponential)."""

    users: int
    think_s: float


@dataclass(frozen=True)
class Scaling:
    """How pods come and go, as deploy/kubernetes/worker.yaml has it: looked at every 15 seconds, against the age of the oldest job."""

    most_pods: int
    cold_start_s: float = 90.0
    age_s: float = 10.0
    up_a_minute: int = 2
    down_every_s: float = 300.0
    """One pod at most leaves in this time, and none that was wanted in it."""

    def wanted(self, pods: int, age_s: float) -> int:
        """How many pods there should be: more in proportion to the age (KEDA's metric type Value)."""
        ratio = age_s / self.age_s
        return pods if abs(ratio - 1) <= TOLERANCE else math.ceil(pods * ratio)


class Scaler:
    """Kubernetes' autoscaler: how many pods to have, given how old the oldest job is."""

    def __init__(self, scaling: Scaling, least: int):
        self._scaling, self._least = scaling, least
        self._wanted: deque[tuple[float, int]] = deque()
        self._added: deque[tuple[float, int]] = deque()
        self._removed_at = -math.inf

    def look(self, now: float, pods: int, age_s: float) -> int:
        """The pods to have from now on, in seconds of any clock; to be asked every `SYNC_S` seconds."""
        scaling = self._scaling
        wanted = max(self._least, min(scaling.most_pods, scaling.wanted(pods, age_s)))
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - scaling.down_every_s:
            self._wanted.popleft()
        while self._added and self._added[0][0] <= now - 60:
            self._added.popleft()
        if wanted > pods:
            room = scaling.up_a_minute - sum(count for _, count in self._added)
            added = max(0, min(wanted - pods, room))
            self._added.append((now, added))
            return pods + added
        if (
            max(count for _, count in self._wanted) < pods
            and now - self._removed_at >= scaling.down_every_s
        ):
            self._removed_at = now
            return pods - 1
        return pods


@dataclass(frozen=True)
class Fleet:
    """Who draws: pods (at the start), seconds of a picture alone, jobs a batch at most, and what one more in a batch costs."""

    pods: int
    seconds: float
    batch: int = 4
    scaling: Scaling | None = None
    batch_cost: float = BATCH_COST


@dataclass
class Outcome:
    """What came of it: waits in seconds from asking to the picture, and how busy the pods were (0 to 1)."""

    waits: list[float] = field(default_factory=list[float])
    busy_s: float = 0.0
    pod_s: float = 0.0
    counted_s: float = 0.0
    most_pods: int = 0

    @property
    def mean_s(self) -> float:
        """Mean seconds from asking to the picture."""
        return statistics.fmean(self.waits) if self.waits else 0.0

    @property
    def p95_s(self) -> float:
        """Seconds that 95 of 100 requests stay below."""
        return sorted(self.waits)[int(len(self.waits) * 0.95)] if self.waits else 0.0

    @property
    def mean_pods(self) -> float:
        """Pods, cold ones among them, on the mean over the time that is counted."""
        return self.pod_s / self.counted_s if self.counted_s else 0.0

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
        self.pods = self._leaving = 0
        self._since = 0.0
        self._add(fleet.pods, 0.0)
        if fleet.scaling:
            env.process(self._scale(fleet.scaling))

    def ask(self) -> simpy.Event:
        """Join the queue; the event comes with the picture."""
        done = self._env.event()
        self._queue.append((self._env.now, done))
        if self._idle:
            self._idle.popleft().succeed()
        return done

    def count_pods(self) -> None:
        """Add the pods' time since the last time to the outcome."""
        self._outcome.pod_s += self.pods * max(
            0.0, self._env.now - max(self._since, self._warm_up_s)
        )
        self._since = self._env.now
        if self._env.now >= self._warm_up_s:
            self._outcome.most_pods = max(self._outcome.most_pods, self.pods)

    def _add(self, pods: int, cold_s: float) -> None:
        self.count_pods()
        self.pods += pods
        for _ in range(pods):
            self._env.process(self._pod(cold_s))

    def _remove_one(self) -> None:
        self.count_pods()
        self.pods -= 1
        self._leaving += 1
        if self._idle:
            self._idle.popleft().succeed()

    def _pod(self, cold_s: float) -> Generator[Any, Any, None]:
        if cold_s:
            yield self._env.timeout(cold_s)
        while True:
            while not self._queue and not self._leaving:
                woken = self._env.event()
                self._idle.append(woken)
                yield woken
            if self._leaving:
                self._leaving -= 1
                return
            batch = [self._queue.popleft() for _ in range(min(self._fleet.batch, len(self._queue)))]
            seconds = self._fleet.seconds * (1 + (len(batch) - 1) * self._fleet.batch_cost)
            yield self._env.timeout(seconds)
            if self._env.now >= self._warm_up_s:
                self._outcome.busy_s += seconds
            for asked_at, done in batch:
                if asked_at >= self._warm_up_s:
                    self._outcome.waits.append(self._env.now - asked_at)
                done.succeed()

    def _scale(self, scaling: Scaling) -> Generator[Any, Any, None]:
        scaler = Scaler(scaling, self._fleet.pods)
        while True:
            yield self._env.timeout(SYNC_S)
            age = self._env.now - self._queue[0][0] if self._queue else 0.0
            more = scaler.look(self._env.now, self.pods, age) - self.pods
            if more > 0:
                self._add(more, scaling.cold_start_s)
            elif more < 0:
                self._remove_one()


def simulate(load: Load, fleet: Fleet, duration_s: float = 0.0, seed: int = 0) -> Outcome:
    """Run users against pods; by default for 30 rounds of a user, fewer of many, and for two hours where pods come and go. The first
    fifth is not counted."""
    import simpy  # comes with the extra "planner"; the command shows its options without it

    env, outcome, rng = simpy.Environment(), Outcome(), random.Random(seed)
    rounds = max(6, min(30, 20_000 // load.users)) * (load.think_s + fleet.seconds)
    duration_s = duration_s or (max(rounds, SCALED_S) if fleet.scaling else rounds)
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
    service.count_pods()
    outcome.counted_s = duration_s - warm_up_s
    return outcome


def pods_needed(
    load: Load, seconds: float, batch: int, p95_s: float, most: int = 100_000
) -> tuple[int, Outcome]:
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
        return (
            bool(outcomes[pods].waits)
            and outcomes[pods].p95_s <= p95_s
            and outcomes[pods].use <= MOST_USE
        )

    while not is_enough(high):
        low, high = high, high + max(1, high // 8)
        if high > most:
            raise ValueError(f"{most} pods are not enough")
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high, outcomes[high]


@dataclass(frozen=True)
class Offer:
    """One way to serve a load: what draws, a picture's seconds there, how it went, and dollars an hour of one pod, where that is known."""

    name: str
    seconds: float
    pods: str
    outcome: Outcome
    price: float | None = None

    @property
    def hourly(self) -> float | None:
        """Dollars an hour of all pods, cold ones among them."""
        return None if self.price is None else self.outcome.mean_pods * self.price

    @property
    def a_thousand(self) -> float | None:
        """Dollars for a thousand pictures."""
        an_hour = len(self.outcome.waits) / self.outcome.counted_s * 3600
        return None if self.hourly is None else self.hourly / an_hour * 1000


def fixed_offer(
    name: str, load: Load, seconds: float, batch: int, p95_s: float, price: float | None = None
) -> Offer:
    """As many pods all the time as `pods_needed` says. Raises `ValueError`, see there."""
    pods, outcome = pods_needed(load, seconds, batch, p95_s)
    return Offer(name, seconds, str(pods), outcome, price)


def scaled_offer(
    name: str, load: Load, seconds: float, batch: int, price: float, scaling: Scaling
) -> Offer:
    """From one pod on as many as it takes, by the age of the oldest job."""
    outcome = simulate(load, Fleet(1, seconds, batch, scaling))
    return Offer(name, seconds, f"{outcome.mean_pods:.1f} ({outcome.most_pods})", outcome, price)


def old_offers(load: Load, p95_s: float) -> list[Offer]:
    """The old stack: one picture at a time in what its manual says; answers may take twice as long as a picture."""
    return [
        fixed_offer(f"old stack, {each:g} s", load, each, 1, max(p95_s, 2 * each))
        for each in OLD_SECONDS
    ]
