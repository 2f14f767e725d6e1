"""History of the operations of many clients, and the check of what they observed.

Each operation has the time of its request and of its answer. An operation that was answered
before another one was sent must be visible to it, on whatever pod it looks.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

FINAL = ("done", "failed", "cancelled")
LATER = {
    "queued": {"queued", "running", *FINAL},
    # a job returns to the queue when its worker is lost
    "running": {"queued", "running", *FINAL},
    **{state: {state} for state in FINAL},
}
"""States that may be observed after a state."""


@dataclass(frozen=True)
class Operation:
    """One request of a client and its answer. Times are seconds of one clock."""

    kind: Literal["submit", "view", "list", "cancel", "image", "webhook"]
    sent_at: float
    answered_at: float
    key: str = ""
    """Idempotency key of a submission, name of a file, else the id of the job."""
    jobs: tuple[tuple[str, str], ...] = ()
    """Ids and states of the jobs in the answer."""
    content: str = ""
    """What never changes of a finished job: the names of its images, or the hash of a file."""
    started_at: float | None = None
    """Start of the job, in seconds of the service's clock."""
    is_missing: bool = False
    """Whether the answer was that there is no such job or file."""


class History:
    """Operations of many threads."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._lock = threading.Lock()

    def add(self, operation: Operation) -> None:
        """Record an operation."""
        with self._lock:
            self._operations.append(operation)

    def operations(self) -> list[Operation]:
        """Return all operations, by the time of their answer."""
        with self._lock:
            return sorted(self._operations, key=lambda operation: operation.answered_at)


def now() -> float:
    """Return the time of the clock of all operations."""
    return time.monotonic()


def find_contradictions(operations: Iterable[Operation]) -> list[str]:
    """Return what contradicts the promises of the queue; empty if nothing does.

    Args:
        operations: The operations of all clients. Each job is viewed once more after its end.
    """
    ordered = sorted(operations, key=lambda operation: operation.answered_at)
    return [
        *_doubled_submissions(ordered),
        *_lost_jobs(ordered),
        *_reordered_states(ordered),
        *_changed_results(ordered),
        *_ignored_cancels(ordered),
        *_unfinished_jobs(ordered),
        *_missing_webhooks(ordered),
    ]


def find_overtaken(operations: Iterable[Operation], since: float, limit: int) -> list[str]:
    """Return jobs that more than `limit` later jobs overtook.

    Args:
        operations: The operations of all clients.
        since: Time after which nothing was disrupted. Earlier jobs do not count.
        limit: How many later jobs may start first: as many as start at the same moment.
    """
    ordered = list(operations)
    accepted = {job: op for job, op in _accepted(ordered).items() if op.sent_at > since}
    started = {
        operation.key: operation.started_at
        for operation in ordered
        if operation.kind == "view" and operation.started_at is not None
    }
    contradictions: list[str] = []
    for job_id, own in accepted.items():
        overtaking = [
            other_id
            for other_id, other in accepted.items()
            if other.sent_at > own.answered_at
            and started.get(other_id, math.inf) < started.get(job_id, 0.0)
        ]
        if len(overtaking) > limit:
            contradictions.append(f"job {job_id} was overtaken by {len(overtaking)} jobs")
    return contradictions


def _accepted(ordered: list[Operation]) -> dict[str, Operation]:
    """Return the first answered submission of each job."""
    first: dict[str, Operation] = {}
    for operation in ordered:
        if operation.kind == "submit":
            for job_id, _ in operation.jobs:
                first.setdefault(job_id, operation)
    return first


def _doubled_submissions(ordered: list[Operation]) -> list[str]:
    """Return keys that became more than one job, and jobs with more than one key."""
    ids, keys = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for operation in ordered:
        if operation.kind == "submit":
            for job_id, _ in operation.jobs:
                ids[operation.key].add(job_id)
                keys[job_id].add(operation.key)
    return [
        *(
            f"key {key} became the jobs {sorted(jobs)}"
            for key, jobs in ids.items()
            if len(jobs) > 1
        ),
        *(f"job {job} has the keys {sorted(of)}" for job, of in keys.items() if len(of) > 1),
    ]


def _lost_jobs(ordered: list[Operation]) -> list[str]:
    """Return accepted jobs that a later request did not find."""
    accepted = _accepted(ordered)
    contradictions: list[str] = []
    for operation in ordered:
        known = [job for job, first in accepted.items() if first.answered_at < operation.sent_at]
        if operation.kind == "list" and operation.jobs:
            listed = {job_id for job_id, _ in operation.jobs}
            contradictions += [
                f"job {job} is missing in a list" for job in known if job not in listed
            ]
        elif operation.is_missing and (operation.kind == "image" or operation.key in known):
            contradictions.append(f"{operation.kind}: {operation.key} is missing")
    return contradictions


def _reordered_states(ordered: list[Operation]) -> list[str]:
    """Return observed states that cannot follow an earlier observation."""
    contradictions: list[str] = []
    for job_id, seen in _observations(ordered).items():
        for i, (earlier, state) in enumerate(seen):
            contradictions += [
                f"job {job_id} was {state}, and later {next_state}"
                for later, next_state in seen[i + 1 :]
                if later.sent_at > earlier.answered_at and next_state not in LATER[state]
            ][:1]
    return contradictions


def _changed_results(ordered: list[Operation]) -> list[str]:
    """Return finished jobs and files whose content was observed in two versions."""
    contents = defaultdict[str, set[str]](set)
    for operation in ordered:
        if operation.content:
            contents[operation.key].add(operation.content)
    return [f"{key} has two results: {of}" for key, of in contents.items() if len(of) > 1]


def _ignored_cancels(ordered: list[Operation]) -> list[str]:
    """Return jobs whose cancel request was answered with a state in which they still wait."""
    return [
        f"job {job_id} waits after its cancel request was answered"
        for operation in ordered
        if operation.kind == "cancel"
        for job_id, state in operation.jobs
        if state == "queued"
    ]


def _unfinished_jobs(ordered: list[Operation]) -> list[str]:
    """Return accepted jobs that were never observed in a final state."""
    observations = _observations(ordered)
    return [
        f"job {job_id} never finished"
        for job_id in _accepted(ordered)
        if not any(state in FINAL for _, state in observations[job_id])
    ]


def _missing_webhooks(ordered: list[Operation]) -> list[str]:
    """Return accepted jobs whose outcome was not posted."""
    posted = {operation.key for operation in ordered if operation.kind == "webhook"}
    return [f"job {job_id} posted no webhook" for job_id in _accepted(ordered).keys() - posted]


def _observations(ordered: list[Operation]) -> dict[str, list[tuple[Operation, str]]]:
    """Return the observed states of each job, by the time of the answer."""
    seen = defaultdict[str, list[tuple[Operation, str]]](list)
    for operation in ordered:
        for job_id, state in operation.jobs:
            seen[job_id].append((operation, state))
    return seen
