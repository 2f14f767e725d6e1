"""Discrete-event simulation of the service, to estimate how many pods a number of users needs.

A user sends a request, waits for the image, looks at it (think time) and sends the next request.
A pod renders one batch at a time: the oldest job and the next ones, up to `batch` jobs.
The number of pods may follow the age of the oldest job, as with Kubernetes and KEDA.
A new pod is cold for a while. The simulation does not use the code of the service.
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
    """A GPU: seconds for one SDXL image (1024x1024, 20 steps), and dollars an hour."""

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
"""Defaults, not measured with this service. Prices are those of rented GPUs in 2026."""
BATCH_COST = 0.9
"""Time of each further image of a batch, as a part of the time of an image alone."""
SYNC_S, TOLERANCE = 15.0, 0.1
"""Interval of Kubernetes' autoscaler, and the relative difference that it ignores."""
AUTOSCALED_S = 7200.0
"""Least simulated time of an autoscaled fleet, in seconds."""
MAX_UTILIZATION = 0.9
"""Fleets that are busier have no reserve."""
FORGE_SECONDS = (15.0, 30.0)
"""Seconds for one image, one at a time, in the Forge service that Alphalayer replaces."""
FORGE_NOTE = (
    "Forge: the manual of the replaced service reports 15 to 30 s for an image, one at a time. "
    "Its table of pods by users is not available. These rows are simulated like the others, "
    "for 95 of 100 responses within twice the time of an image."
)


@dataclass(frozen=True)
class Load:
    """Load: users, and the mean think time between images (seconds, exponential)."""

    users: int
    think_s: float


@dataclass(frozen=True)
class Scaling:
    """Autoscaling rule by the age of the oldest job, as in deploy/kubernetes/worker.yaml."""

    most_pods: int
    cold_start_s: float = 90.0
    age_s: float = 10.0
    up_a_minute: int = 2
    down_every_s: float = 300.0
    """At most one pod is removed in this time, and none that was required during it."""

    def desired_pods(self, pods: int, age_s: float) -> int:
        """Return the desired pods, in proportion to the age (KEDA's metric type Value)."""
        ratio = age_s / self.age_s
        return pods if abs(ratio - 1) <= TOLERANCE else math.ceil(pods * ratio)


class Autoscaler:
    """Kubernetes' autoscaler: the number of pods by the age of the oldest job."""

    def __init__(self, scaling: Scaling, min_pods: int):
        self._scaling, self._min_pods = scaling, min_pods
        self._desired: deque[tuple[float, int]] = deque()
        self._added: deque[tuple[float, int]] = deque()
        self._removed_at = -math.inf

    def update(self, now: float, pods: int, age_s: float) -> int:
        """Return the new number of pods. Call it every `SYNC_S` seconds.

        Args:
            now: Time in seconds, of any clock.
            pods: Current number of pods.
            age_s: Age of the oldest job.
        """
        scaling = self._scaling
        desired = max(self._min_pods, min(scaling.most_pods, scaling.desired_pods(pods, age_s)))
        self._desired.append((now, desired))
        while self._desired[0][0] < now - scaling.down_every_s:
            self._desired.popleft()
        while self._added and self._added[0][0] <= now - 60:
            self._added.popleft()
        if desired > pods:
            allowed = scaling.up_a_minute - sum(count for _, count in self._added)
            added = max(0, min(desired - pods, allowed))
            self._added.append((now, added))
            return pods + added
        if (
            max(count for _, count in self._desired) < pods
            and now - self._removed_at >= scaling.down_every_s
        ):
            self._removed_at = now
            return pods - 1
        return pods


@dataclass(frozen=True)
class Fleet:
    """Pods that render images, and their speed."""

    pods: int
    """Pods at the start."""
    seconds: float
    """Seconds for one image alone."""
    batch: int = 4
    """Most jobs of a batch."""
    scaling: Scaling | None = None
    batch_cost: float = BATCH_COST


@dataclass
class Outcome:
    """Result of a simulation: the wait of each request in seconds, and the use of the pods."""

    waits: list[float] = field(default_factory=list[float])
    busy_s: float = 0.0
    pod_s: float = 0.0
    counted_s: float = 0.0
    most_pods: int = 0

    @property
    def mean_s(self) -> float:
        """Return the mean wait from request to image, in seconds."""
        return statistics.fmean(self.waits) if self.waits else 0.0

    @property
    def p95_s(self) -> float:
        """Return the 95th percentile of the wait, in seconds."""
        return sorted(self.waits)[int(len(self.waits) * 0.95)] if self.waits else 0.0

    @property
    def mean_pods(self) -> float:
        """Return the mean number of pods, cold ones included, over the measured time."""
        return self.pod_s / self.counted_s if self.counted_s else 0.0

    @property
    def use(self) -> float:
        """Return the part of the pods' time in which they render (0 to 1)."""
        return self.busy_s / self.pod_s if self.pod_s else 0.0


class _Service:
    """Queue and pods of one simulation."""

    def __init__(self, env: simpy.Environment, fleet: Fleet, outcome: Outcome, warm_up_s: float):
        self._env, self._fleet, self._outcome, self._warm_up_s = env, fleet, outcome, warm_up_s
        self._queue: deque[tuple[float, simpy.Event]] = deque()
        self._idle: deque[simpy.Event] = deque()
        self.pods = self._leaving = 0
        self._counted_at = 0.0
        self._add(fleet.pods, 0.0)
        if fleet.scaling:
            env.process(self._scale(fleet.scaling))

    def submit(self) -> simpy.Event:
        """Queue a request and return the event of its image."""
        done = self._env.event()
        self._queue.append((self._env.now, done))
        if self._idle:
            self._idle.popleft().succeed()
        return done

    def count_pods(self) -> None:
        """Add the pods' time since the last call to the outcome."""
        counted_from = max(self._counted_at, self._warm_up_s)
        self._outcome.pod_s += self.pods * max(0.0, self._env.now - counted_from)
        self._counted_at = self._env.now
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
                wakeup = self._env.event()
                self._idle.append(wakeup)
                yield wakeup
            if self._leaving:
                self._leaving -= 1
                return
            batch = [self._queue.popleft() for _ in range(min(self._fleet.batch, len(self._queue)))]
            seconds = self._fleet.seconds * (1 + (len(batch) - 1) * self._fleet.batch_cost)
            yield self._env.timeout(seconds)
            if self._env.now >= self._warm_up_s:
                self._outcome.busy_s += seconds
            for submitted_at, done in batch:
                if submitted_at >= self._warm_up_s:
                    self._outcome.waits.append(self._env.now - submitted_at)
                done.succeed()

    def _scale(self, scaling: Scaling) -> Generator[Any, Any, None]:
        autoscaler = Autoscaler(scaling, self._fleet.pods)
        while True:
            yield self._env.timeout(SYNC_S)
            age = self._env.now - self._queue[0][0] if self._queue else 0.0
            change = autoscaler.update(self._env.now, self.pods, age) - self.pods
            if change > 0:
                self._add(change, scaling.cold_start_s)
            elif change < 0:
                self._remove_one()


def simulate(load: Load, fleet: Fleet, duration_s: float = 0.0, seed: int = 0) -> Outcome:
    """Simulate users and pods. The first fifth of the time is not counted.

    Args:
        load: Users and their think time.
        fleet: Pods and their speed.
        duration_s: Simulated seconds. The default is up to 30 requests of each user,
            and at least two hours with autoscaling.
        seed: Seed of the random think times.
    """
    import simpy  # part of the extra "planner"; `plan --help` works without it

    env, outcome = simpy.Environment(), Outcome()
    rng = random.Random(seed)  # nosec B311 # a simulation is repeatable
    rounds = max(6, min(30, 20_000 // load.users)) * (load.think_s + fleet.seconds)
    duration_s = duration_s or (max(rounds, AUTOSCALED_S) if fleet.scaling else rounds)
    warm_up_s = duration_s / 5
    service = _Service(env, fleet, outcome, warm_up_s)

    def user() -> Generator[Any, Any, None]:
        yield env.timeout(rng.uniform(0, load.think_s))
        while True:
            yield service.submit()
            yield env.timeout(rng.expovariate(1 / load.think_s) if load.think_s else 0)

    for _ in range(load.users):
        env.process(user())
    env.run(until=duration_s)
    service.count_pods()
    outcome.counted_s = duration_s - warm_up_s
    return outcome


def find_min_pods(
    load: Load, seconds: float, batch: int, p95_s: float, limit: int = 100_000
) -> tuple[int, Outcome]:
    """Find the fewest pods that meet the target and are not overloaded, by bisection.

    Args:
        load: Users and their think time.
        seconds: Seconds for one image alone.
        batch: Most jobs of a batch.
        p95_s: Target of the 95th percentile of the wait.
        limit: Most pods to try.

    Returns:
        The number of pods, and the outcome of their simulation.

    Raises:
        ValueError: One image alone takes longer than the target, or `limit` pods are too few.
    """
    if seconds > p95_s:
        raise ValueError(f"one image alone takes {seconds:.1f} s; use at least that as --p95")
    # the load if every user waits as long as is allowed: fewer pods cannot keep up
    busy = load.users * seconds * (1 + (batch - 1) * BATCH_COST) / batch / (load.think_s + p95_s)
    low, high = 0, max(1, round(busy / MAX_UTILIZATION))
    outcomes: dict[int, Outcome] = {}

    def is_enough(pods: int) -> bool:
        outcome = outcomes[pods] = simulate(load, Fleet(pods, seconds, batch))
        return bool(outcome.waits) and outcome.p95_s <= p95_s and outcome.use <= MAX_UTILIZATION

    while not is_enough(high):
        low, high = high, high + max(1, high // 8)
        if high > limit:
            raise ValueError(f"{limit} pods are not enough")
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high, outcomes[high]


@dataclass(frozen=True)
class Estimate:
    """Estimate for one kind of fleet."""

    name: str
    seconds: float
    """Seconds for one image alone."""
    pods: str
    outcome: Outcome
    price: float | None = None
    """Dollars an hour of one pod, if known."""

    @property
    def hourly_cost(self) -> float | None:
        """Return the dollars an hour of all pods, cold ones included."""
        return None if self.price is None else self.outcome.mean_pods * self.price

    @property
    def cost_per_thousand(self) -> float | None:
        """Return the dollars for a thousand images."""
        hourly_images = len(self.outcome.waits) / self.outcome.counted_s * 3600
        return None if self.hourly_cost is None else self.hourly_cost / hourly_images * 1000


def estimate_fixed(
    name: str, load: Load, seconds: float, batch: int, p95_s: float, price: float | None = None
) -> Estimate:
    """Estimate a fleet of constant size.

    Raises:
        ValueError: No number of pods meets the target. See `find_min_pods`.
    """
    pods, outcome = find_min_pods(load, seconds, batch, p95_s)
    return Estimate(name, seconds, str(pods), outcome, price)


def estimate_autoscaled(
    name: str, load: Load, seconds: float, batch: int, price: float, scaling: Scaling
) -> Estimate:
    """Estimate a fleet that starts with one pod and scales by the age of the queue."""
    outcome = simulate(load, Fleet(1, seconds, batch, scaling))
    pods = f"{outcome.mean_pods:.1f} ({outcome.most_pods})"
    return Estimate(name, seconds, pods, outcome, price)


def estimate_forge(load: Load, p95_s: float) -> list[Estimate]:
    """Estimate Forge: one image at a time, and a wait of up to twice that time."""
    return [
        estimate_fixed(f"Forge, {seconds:g} s", load, seconds, 1, max(p95_s, 2 * seconds))
        for seconds in FORGE_SECONDS
    ]
