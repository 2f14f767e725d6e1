"""Cost of jobs by key: what is charged, and what is not."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from alphalayer.api.auth import Authenticator
from alphalayer.api.deps import submit_job
from alphalayer.auth.api_keys import Key
from alphalayer.auth.rates import KeyRates
from alphalayer.core.errors import InvalidRequest, QueueFull, RateLimited
from alphalayer.core.job import JobSpec, Submission
from alphalayer.core.request import GenerationRequest

KEY = Key(name="shop", sha256="0" * 64, cost_per_minute=100)


def test_charge_limits_the_cost_a_minute():
    rates = KeyRates(lambda: [KEY])
    rates.charge("shop", 60.5)
    with pytest.raises(RateLimited, match="100 megapixel-steps a minute"):
        rates.charge("shop", 60.5)
    rates.charge("shop", 38.5)
    with pytest.raises(InvalidRequest, match="costs 101 megapixel-steps"):
        rates.charge("shop", 101.0)
    rates.charge("removed meanwhile", 1e9)


def test_refund_never_gives_more_than_was_charged():
    rates = KeyRates(lambda: [KEY])
    rates.charge("shop", 60.5)
    rates.refund("shop", 60.5)
    rates.refund("shop", 60.5)
    rates.refund("removed meanwhile", 1.0)
    rates.charge("shop", 100.0)
    with pytest.raises(RateLimited):
        rates.charge("shop", 1.0)


class Queue:
    """A queue with the outcome of its next submission: an error, or an earlier job."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.earlier: str | None = None

    async def submit(self, _spec: Any, _submission: Any, _delivery: Any, job_id: str) -> Any:
        if self.error:
            raise self.error
        return SimpleNamespace(id=self.earlier or job_id)


async def test_submit_charges_only_new_jobs():
    spec = JobSpec(generation=GenerationRequest(prompt="x", width=1024, height=1024, steps=30))
    key = Key(name="shop", sha256="0" * 64, cost_per_minute=math.ceil(spec.cost) * 2)
    queue = Queue()
    service: Any = SimpleNamespace(
        job_queue=queue,
        authenticator=Authenticator(lambda: [key]),
        max_pixels=0,
        max_cost=0.0,
        knows_models=False,
        log_prompts=False,
    )

    async def submit() -> None:
        await submit_job(service, spec, Submission(owner="shop"))

    await submit()
    queue.earlier = "earlier"
    for _ in range(3):
        await submit()
    queue.error = QueueFull("full")
    for _ in range(3):
        with pytest.raises(QueueFull):
            await submit()
    queue.error = queue.earlier = None
    await submit()
    with pytest.raises(RateLimited):
        await submit()
