"""Random operations on the job queue, compared with a small model of what it promises.

The promises: an accepted job is never lost, its outcome never changes, jobs are claimed in
their order, a job starts at most `MAX_STARTS` times, and a repeated key is one job.
A restart may happen between any two operations. `QUEUE_EXAMPLES=1000` tries more of them.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from alphalayer.core.errors import Cancelled, EngineFailed, QueueFull
from alphalayer.core.job import ImageRef, JobResult, JobSpec, JobState, Submission
from alphalayer.core.request import GenerationRequest, ModelDefaults
from alphalayer.jobs.base import MAX_STARTS, Outcome
from alphalayer.jobs.sqlite import SqliteJobQueue

T = TypeVar("T")
LIMIT = 5
PROMPTS = {"same size": 64, "other size": 128}
RESULT = JobResult(
    images=(ImageRef(key="alpha_1.png", seed=1, subseed=1, width=8, height=8, size_bytes=1),),
    settings=ModelDefaults(),
    model_name="m",
    model_hash="h",
)
OUTCOMES: dict[JobState, Outcome] = {
    JobState.DONE: RESULT,
    JobState.FAILED: EngineFailed("broken."),
    JobState.CANCELLED: Cancelled("cancelled."),
}


@dataclass
class ExpectedJob:
    """What the model knows of a job."""

    number: int
    prompt: str
    key: str | None
    state: JobState = JobState.QUEUED
    starts: int = 0
    clients: int = 1
    cancel_requested: bool = False


class QueueMachine(RuleBasedStateMachine):
    """The embedded queue and its model, changed together."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self._folder = tempfile.TemporaryDirectory()
        self._outcomes: list[str] = []
        self._queue = self._open()
        self.expected: dict[str, ExpectedJob] = {}
        self.waiting: list[str] = []
        self.claimed: list[str] = []

    def teardown(self) -> None:
        self._run(self._queue.close())
        self._loop.close()
        self._folder.cleanup()

    @rule(prompt=st.sampled_from(list(PROMPTS)), key=st.none() | st.sampled_from("ab"))
    def submit(self, prompt: str, key: str | None) -> None:
        side = PROMPTS[prompt]
        spec = JobSpec(generation=GenerationRequest(prompt=prompt, width=side, height=64))
        submission = Submission(idempotency_key=key and f"{key} {prompt}", digest=prompt)
        holder = next(
            (id for id, job in self.expected.items() if key and job.key == (key, prompt)), None
        )
        try:
            job = self._run(self._queue.submit(spec, submission))
        except QueueFull:
            assert holder is None
            assert len(self.waiting) >= LIMIT
            return
        if holder:
            assert job.id == holder
            self.expected[holder].clients += not self.expected[holder].state.is_final
            return
        assert len(self.waiting) < LIMIT
        assert job.id not in self.expected
        self.expected[job.id] = ExpectedJob(len(self.expected), prompt, key and (key, prompt))
        self.waiting.append(job.id)

    @precondition(lambda self: self.waiting)
    @rule()
    def claim(self) -> None:
        job = self._run(self._queue.claim())
        assert job.id == self.waiting.pop(0)
        self.claimed.append(job.id)

    @precondition(lambda self: self.claimed)
    @rule(data=st.data())
    def claim_compatible(self, data: st.DataObject) -> None:
        first_id = data.draw(st.sampled_from(self.claimed))
        first = self._run(self._queue.view(first_id)).job
        job = self._run(self._queue.claim_compatible(first, 10**6))
        first = self.expected[first_id]
        compatible = [
            id
            for id in self.waiting
            if first.starts == self.expected[id].starts == 0
            and self.expected[id].prompt == first.prompt
        ]
        assert (job and job.id) == next(iter(compatible), None)
        if job:
            self.waiting.remove(job.id)
            self.claimed.append(job.id)

    @precondition(lambda self: self.claimed)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.claimed))
        job = self.expected[job_id]
        if job.state is not JobState.RUNNING:
            self._run(self._queue.mark_started(job_id))
        if job.state is JobState.QUEUED:
            job.state, job.starts = JobState.RUNNING, job.starts + 1

    @precondition(lambda self: self.claimed)
    @rule(data=st.data(), state=st.sampled_from(list(OUTCOMES)))
    def complete(self, data: st.DataObject, state: JobState) -> None:
        job_id = data.draw(st.sampled_from(self.claimed))
        self._run(self._queue.complete(job_id, OUTCOMES[state]))
        self.claimed.remove(job_id)
        if not self.expected[job_id].state.is_final:  # it was cancelled meanwhile
            self.expected[job_id].state = state

    @precondition(lambda self: any(job.state.is_final for job in self.expected.values()))
    @rule(data=st.data(), state=st.sampled_from(list(OUTCOMES)))
    def complete_again(self, data: st.DataObject, state: JobState) -> None:
        """A late outcome, of an engine that was thought lost, changes nothing."""
        finished = [id for id, job in self.expected.items() if job.state.is_final]
        self._run(self._queue.complete(data.draw(st.sampled_from(finished)), OUTCOMES[state]))

    @precondition(lambda self: self.claimed)
    @rule(data=st.data(), is_counted=st.booleans())
    def requeue(self, data: st.DataObject, is_counted: bool) -> None:
        job_id = data.draw(st.sampled_from(self.claimed))
        self._run(self._queue.requeue(job_id, "killed", is_counted=is_counted))
        self.claimed.remove(job_id)
        job = self.expected[job_id]
        if job.state is JobState.RUNNING and not is_counted:
            job.starts -= 1
        if not job.state.is_final:
            self._return(job_id, at_front=True)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(list(self.expected)))
        job = self.expected[job_id]
        assert self._run(self._queue.cancel(job_id)) is not job.state.is_final
        self._expect_cancel(job_id)

    @precondition(lambda self: any(job.clients for job in self.expected.values()))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        ids = [id for id, job in self.expected.items() if job.clients]
        job_id = data.draw(st.sampled_from(ids))
        job = self.expected[job_id]
        self._run(self._queue.withdraw(job_id))
        job.clients -= 1
        if not job.clients and not job.state.is_final:
            job.key = None
            self._expect_cancel(job_id)

    @rule()
    def restart(self) -> None:
        """Restart the service. Nothing is written at the end, so that a kill is the same."""
        self._run(self._queue.close())
        self._queue = self._open()
        unfinished = [id for id, job in self.expected.items() if not job.state.is_final]
        self.waiting, self.claimed = [], []
        for job_id in sorted(unfinished, key=lambda id: self.expected[id].number):
            self.expected[job_id].clients = 1
            self._return(job_id, at_front=False)

    @invariant()
    def jobs_are_as_expected(self) -> None:
        assert self._queue.queue_length == len(self.waiting)
        for job_id, expected in self.expected.items():
            view = self._run(self._queue.view(job_id))
            assert view is not None, f"{job_id} is lost"
            assert (view.job.state, view.job.starts) == (expected.state, expected.starts)
            if expected.state is JobState.DONE:
                assert view.job.result == RESULT
            position = self.waiting.index(job_id) + 1 if job_id in self.waiting else 0
            assert view.position == position

    @invariant()
    def every_outcome_is_reported_once(self) -> None:
        finished = [id for id, job in self.expected.items() if job.state.is_final]
        assert sorted(self._outcomes) == sorted(finished)

    def _expect_cancel(self, job_id: str) -> None:
        """Expect a job that no engine has started to end at once, and a running one later."""
        job = self.expected[job_id]
        if job.state is JobState.QUEUED:
            if job_id in self.waiting:
                self.waiting.remove(job_id)
            job.state = JobState.CANCELLED
        elif job.state is JobState.RUNNING:
            job.cancel_requested = True

    def _return(self, job_id: str, *, at_front: bool) -> None:
        """Expect a job that no engine has any more to end, or to wait again."""
        job = self.expected[job_id]
        if job.cancel_requested:
            job.state = JobState.CANCELLED
        elif job.starts >= MAX_STARTS:
            job.state = JobState.FAILED
        else:
            job.state = JobState.QUEUED
            self.waiting.insert(0 if at_front else len(self.waiting), job_id)

    def _open(self) -> SqliteJobQueue:
        file = Path(self._folder.name) / "jobs.sqlite"
        return self._run(
            SqliteJobQueue.open(
                file, LIMIT, on_outcome=lambda job_id, _outcome: self._outcomes.append(job_id)
            )
        )

    def _run(self, operation: Awaitable[T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(operation, 60))


EXAMPLES = int(os.environ.get("QUEUE_EXAMPLES", "15"))


def test_queue_keeps_its_promises():
    run_state_machine_as_test(
        QueueMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            derandomize=EXAMPLES == 15,
            suppress_health_check=list(HealthCheck),
        ),
    )
