"""Both job queues: the embedded one on SQLite, and the shared one on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import update

from alphalayer.core.errors import (
    Cancelled,
    EngineFailed,
    InvalidRequest,
    QueueFull,
    SetupFailed,
    StorageFailed,
)
from alphalayer.core.job import ImageRef, Job, JobProgress, JobResult, JobSpec, JobState, Submission
from alphalayer.core.request import GenerationRequest, ModelDefaults
from alphalayer.jobs import estimates
from alphalayer.jobs.base import MAX_STARTS, USUAL_SECONDS, Jobs, Outcome
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.jobs.table import jobs

Open = Callable[[], Awaitable[Jobs]]


@pytest.fixture
def outcomes() -> list[tuple[str, str]]:
    """Return the reported outcomes of `open_queue`: the id of a job, and a code."""
    return []


@pytest_asyncio.fixture(params=["embedded", "shared"])
async def open_queue(request, tmp_path, outcomes) -> AsyncIterator[Open]:
    """Yield a function that opens the same queue of ten jobs each time."""

    def on_outcome(job_id: str, outcome: Outcome) -> None:
        outcomes.append((job_id, getattr(outcome, "code", "done")))

    queues: list[Jobs] = []
    shares = {"half": 0.5}
    if request.param == "shared":
        from alphalayer.jobs.postgres import PostgresJobQueue

        url = request.getfixturevalue("postgres").fresh_database()

    async def open_next() -> Jobs:
        if request.param == "shared":
            queues.append(await PostgresJobQueue.open(url, 10, shares, on_outcome=on_outcome))
        else:
            queues.append(
                await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10, shares, on_outcome)
            )
        return queues[-1]

    yield open_next
    for queue in queues:
        await queue.close()


def spec(prompt: str = "x", **fields) -> JobSpec:
    return JobSpec(generation=GenerationRequest(prompt=prompt, **fields))


def result_of(job_spec: JobSpec) -> JobResult:
    image = ImageRef(key="alpha_1.png", seed=1, subseed=1, width=8, height=8, size_bytes=1)
    return JobResult(images=(image,), settings=ModelDefaults(), model_name="m", model_hash="h")


async def submit(
    queue: Any,
    job_spec: JobSpec,
    owner: str = "",
    idempotency_key: str | None = None,
    job_id: str | None = None,
) -> Job:
    submission = Submission(
        owner=owner, idempotency_key=idempotency_key, digest=job_spec.generation.prompt
    )
    return await queue.submit(job_spec, submission, job_id=job_id)


async def within(awaitable, seconds: float = 10):
    return await asyncio.wait_for(awaitable, seconds)


async def poll_until(condition: Callable[[], object]) -> None:
    """Poll until a condition holds, for some seconds."""

    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.02)

    await within(poll())


async def stop(*tasks: asyncio.Task) -> None:
    """Cancel tasks and wait for them, because their connections block a close."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_job_goes_from_queued_to_done(open_queue):
    queue = await open_queue()
    first, second = await queue.submit(spec("one")), await queue.submit(spec("two"))
    for position, job in ((1, first), (2, second)):
        view = await queue.view(job.id)
        assert view
        assert (view.job.state, view.position) == (JobState.QUEUED, position)
    claimed = await within(queue.claim())
    assert claimed == first
    await queue.mark_started(claimed.id)
    running = await queue.view(first.id)
    assert running
    assert (running.job.state, running.job.starts, running.position) == (JobState.RUNNING, 1, 0)
    await queue.complete(claimed.id, result_of(claimed.spec))
    finished = await within(queue.wait(first.id))
    assert (finished.state, finished.result) == (JobState.DONE, result_of(claimed.spec))
    assert finished.finished_at
    view = await queue.view(second.id)
    assert view
    assert view.position == 1
    assert await queue.unfinished_ids() == {second.id}
    assert [(view.job.id, view.position) for view in await queue.list()] == [
        (second.id, 1),
        (first.id, 0),
    ]
    assert [view.job.id for view in await queue.list(state=JobState.DONE)] == [first.id]
    assert await queue.view("none") is None


async def test_watch_yields_progress_and_the_final_state(open_queue):
    queue = await open_queue()
    job = await queue.submit(spec())
    states: list[tuple[JobState, int]] = []

    async def watch() -> None:
        async for view in queue.watch(job.id):
            states.append((view.job.state, view.progress.step))

    watching = asyncio.create_task(watch())
    await within(queue.claim())
    await queue.mark_started(job.id)
    await poll_until(lambda: (JobState.RUNNING, 0) in states)
    await queue.report_progress(job.id, JobProgress(stage="sample", step=3, steps=9))
    await poll_until(lambda: (JobState.RUNNING, 3) in states)
    await queue.complete(job.id, EngineFailed("it broke."))
    await within(watching)
    assert states[-1][0] is JobState.FAILED


async def test_eta_counts_all_earlier_jobs(open_queue):
    queue = await open_queue()
    first, second, third = [await queue.submit(spec()) for _ in range(3)]
    assert [(await queue.view(job.id)).eta_s for job in (first, third)] == [
        USUAL_SECONDS,
        3 * USUAL_SECONDS,
    ]
    await within(queue.claim())
    await queue.mark_started(first.id)
    await asyncio.sleep(0.2)
    await queue.report_progress(first.id, JobProgress(stage="sample", step=1, steps=101))
    async for view in queue.watch(second.id):  # repeated as time passes, without a notification
        if view.eta_s > USUAL_SECONDS:
            break
    rest = (await queue.view(first.id)).eta_s
    assert rest >= 20
    assert (await queue.view(second.id)).eta_s == pytest.approx(rest + USUAL_SECONDS, rel=0.2)
    assert (await queue.view(third.id)).eta_s == pytest.approx(rest + 2 * USUAL_SECONDS, rel=0.2)


async def test_submit_keeps_limit_shares_and_idempotency(open_queue):
    queue = await open_queue()
    for _ in range(5):
        await submit(queue, spec(), owner="half")
    with pytest.raises(QueueFull, match="may fill 50%"):
        await submit(queue, spec(), owner="half")
    first = await submit(queue, spec("same"), owner="a", idempotency_key="k")
    assert await submit(queue, spec("same"), owner="a", idempotency_key="k") == first
    assert (await submit(queue, spec("same"), owner="b", idempotency_key="k")).id != first.id
    for _ in range(3):
        await queue.submit(spec())
    with pytest.raises(QueueFull, match="at most 10"):
        await queue.submit(spec())
    # a retry of an accepted job needs no capacity
    assert await submit(queue, spec("same"), owner="a", idempotency_key="k") == first
    with pytest.raises(InvalidRequest, match="another request") as other:
        await submit(queue, spec("other"), owner="a", idempotency_key="k")
    assert other.value.field == "Idempotency-Key"


async def test_concurrent_submits_with_one_key_create_one_job(open_queue):
    queue = await open_queue()
    job_spec = spec("same", seed=-1)
    specs = [job_spec, job_spec.model_copy()]
    jobs_of_key = await asyncio.gather(
        *(submit(queue, repeated, idempotency_key="k") for repeated in specs * 3)
    )
    assert len({job.id for job in jobs_of_key}) == 1
    assert queue.queue_length <= 1


@pytest.mark.parametrize("is_running", [False, True])
async def test_withdrawn_job_releases_its_idempotency_key(open_queue, is_running):
    queue = await open_queue()
    first = await submit(queue, spec("same"), idempotency_key="k")
    if is_running:
        await within(queue.claim())
        await queue.mark_started(first.id)
    assert (await submit(queue, spec("same"), idempotency_key="k")).id == first.id
    await queue.withdraw(first.id)
    assert (await submit(queue, spec("same"), idempotency_key="k")).id == first.id
    await queue.withdraw(first.id)
    await queue.withdraw(first.id)
    second = await submit(queue, spec("same"), idempotency_key="k", job_id="0123456789ab")
    assert second.id == "0123456789ab"
    if is_running:
        await queue.complete(first.id, Cancelled("cancelled."))
    assert (await within(queue.wait(first.id))).state is JobState.CANCELLED
    # a job that a client cancelled keeps its key, also after a restart
    assert await queue.cancel(second.id)
    await queue.close()
    queue = await open_queue()
    assert (await submit(queue, spec("same"), idempotency_key="k", job_id="ab")).id == second.id


@pytest.mark.parametrize("is_running", [False, True])
async def test_submit_during_the_last_withdraw_gets_a_live_job(open_queue, is_running):
    queue = await open_queue()
    for i in range(10):
        first = await submit(queue, spec(str(i)), idempotency_key=str(i))
        if is_running:
            assert (await within(queue.claim())).id == first.id
            await queue.mark_started(first.id)
        withdrawn, *submitted = await asyncio.gather(
            queue.withdraw(first.id),
            *(submit(queue, spec(str(i)), idempotency_key=str(i)) for _ in range(2)),
        )
        assert withdrawn is None
        assert len({job.id for job in submitted}) == 1
        is_same_job = submitted[0].id == first.id
        view = await queue.view(submitted[0].id)
        assert view
        assert view.job.state is (
            JobState.RUNNING if is_running and is_same_job else JobState.QUEUED
        )
        await queue.withdraw(submitted[0].id)
        await queue.withdraw(submitted[0].id)
        if is_running:
            await within(queue.wait_for_cancel(first.id))
            await queue.complete(first.id, Cancelled("cancelled."))
        for job_id in (first.id, submitted[0].id):
            assert (await within(queue.wait(job_id))).state is JobState.CANCELLED
    await poll_until(lambda: queue.queue_length == 0)


async def test_uncounted_requeue_restores_place_and_starts(
    open_queue,
):
    queue = await open_queue()
    first, second = await queue.submit(spec("one")), await queue.submit(spec("two"))
    for _ in range(MAX_STARTS + 1):
        assert (await within(queue.claim(), 2)).id == first.id
        await queue.mark_started(first.id)
        await queue.requeue(first.id, "the service was stopped", is_counted=False)
    waiting = await queue.list(state=JobState.QUEUED)
    assert [(view.job.id, view.job.starts, view.position) for view in waiting] == [
        (second.id, 0, 2),
        (first.id, 0, 1),
    ]


async def test_unreadable_row_becomes_a_failed_job(open_queue, outcomes):
    queue = await open_queue()
    unreadable, readable = await queue.submit(spec("broken")), await queue.submit(spec("fine"))
    await queue._journal._write(
        update(jobs)
        .where(jobs.c.id == unreadable.id)
        .values(spec='{"prompt": "hidden", "new_field": 1}')
    )
    await queue.close()
    reopened = await open_queue()
    assert (await within(reopened.claim())).id == readable.id
    view = await reopened.view(unreadable.id)
    assert view
    assert view.job.state is JobState.FAILED
    assert "cannot be read" in str(view.job.error)
    assert "hidden" not in str(view.job.error)
    assert {view.job.id for view in await reopened.list()} == {unreadable.id, readable.id}
    assert await reopened.unfinished_ids() == {readable.id}
    assert outcomes == [(unreadable.id, "storage_failed")]


async def test_cancel_ends_queued_and_running_jobs(open_queue):
    queue = await open_queue()
    running, waiting = await queue.submit(spec()), await queue.submit(spec())
    await within(queue.claim())
    await queue.mark_started(running.id)
    assert await queue.cancel(waiting.id)
    assert (await within(queue.wait(waiting.id))).state is JobState.CANCELLED
    assert not await queue.cancel(waiting.id)
    cancelling = asyncio.create_task(queue.wait_for_cancel(running.id))
    assert await queue.cancel(running.id)
    await within(cancelling)
    await queue.complete(running.id, Cancelled("cancelled."))
    assert (await within(queue.wait(running.id))).state is JobState.CANCELLED
    with pytest.raises(asyncio.TimeoutError):
        await within(queue.claim(), 0.3)


async def test_cancel_ends_a_job_that_was_only_sent_ahead(open_queue, outcomes):
    queue = await open_queue()
    job = await submit(queue, spec())
    await within(queue.claim())
    cancelling = asyncio.create_task(queue.wait_for_cancel(job.id))
    await asyncio.sleep(0)
    assert await queue.cancel(job.id)
    view = await queue.view(job.id)
    assert view
    assert view.job.state is JobState.CANCELLED
    await within(cancelling)
    # what its engine reports later changes nothing
    await queue.mark_started(job.id)
    await queue.complete(job.id, result_of(job.spec))
    assert (await queue.wait(job.id)).state is JobState.CANCELLED
    assert outcomes == [(job.id, "cancelled")]


async def test_cancel_of_a_running_job_survives_a_restart(short_claims, open_queue):
    queue = await open_queue()
    job = await queue.submit(spec())
    await within(queue.claim())
    await queue.mark_started(job.id)
    assert await queue.cancel(job.id)
    await queue.close()
    queue = await open_queue()
    claiming = asyncio.create_task(queue.claim())
    assert (await within(queue.wait(job.id))).state is JobState.CANCELLED
    assert not claiming.done()
    await stop(claiming)


async def test_requeued_job_comes_first_and_fails_after_max_starts(open_queue):
    queue = await open_queue()
    first, second = await queue.submit(spec("one")), await queue.submit(spec("two"))
    for start in range(MAX_STARTS):
        job = await within(queue.claim())
        assert job.id == first.id
        assert job.starts == start
        await queue.mark_started(job.id)
        await queue.requeue(job.id, "it died")
    failed = await within(queue.wait(first.id))
    assert failed.state is JobState.FAILED
    assert "it died" in str(failed.error)
    assert (await within(queue.claim())).id == second.id


async def test_every_outcome_is_reported_once(open_queue, outcomes):
    queue = await open_queue()
    done, failed, lost, stopped, waiting = [(await queue.submit(spec(name))).id for name in "abcde"]
    for _ in range(2):
        job = await within(queue.claim())
        await queue.mark_started(job.id)
        await queue.complete(
            job.id, result_of(job.spec) if job.id == done else EngineFailed("it broke.")
        )
        await queue.complete(job.id, EngineFailed("again."))
    for _ in range(MAX_STARTS):
        await queue.mark_started((await within(queue.claim())).id)
        await queue.requeue(lost, "it died")
    assert await queue.cancel(waiting)
    assert not await queue.cancel(waiting)
    await queue.mark_started((await within(queue.claim())).id)
    assert await queue.cancel(stopped)
    await queue.complete(stopped, Cancelled("cancelled."))
    assert outcomes == [
        (done, "done"),
        (failed, "engine_failed"),
        (lost, "engine_failed"),
        (waiting, "cancelled"),
        (stopped, "cancelled"),
    ]


async def test_claim_compatible_returns_only_compatible_jobs(open_queue):
    queue = await open_queue()
    first = await queue.submit(spec("a", width=512, height=512))
    await queue.submit(spec("b", width=256, height=512))
    compatible = await queue.submit(spec("c", width=512, height=512, seed=9))
    job = await within(queue.claim())
    assert job.id == first.id
    assert await queue.claim_compatible(job, 512 * 511) is None
    claimed = await queue.claim_compatible(job, 512 * 512)
    assert claimed
    assert claimed.id == compatible.id
    assert await queue.claim_compatible(job, 512 * 512) is None


async def test_delete_finished_deletes_only_older_jobs(open_queue):
    queue = await open_queue()
    job = await queue.submit(spec())
    await within(queue.claim())
    await queue.mark_started(job.id)
    await queue.complete(job.id, result_of(job.spec))
    finished_at = (await within(queue.wait(job.id))).finished_at
    assert await queue.delete_finished(finished_at - 1, 10) == 0
    assert await queue.delete_finished(finished_at + 1, 10) == 1
    assert await queue.view(job.id) is None


async def test_options_are_stored_by_client_for_all_services(open_queue, request):
    queue = await open_queue()
    await queue.save_options("ann", {"sd_model_checkpoint": "a", "clip_skip": 2})
    await queue.save_options("ann", {"sd_model_checkpoint": "b"})
    await queue.save_options("bob", {"previews": True})
    if "embedded" in request.node.name:
        await queue.close()  # one service at a time
    other = await open_queue()
    assert await other.load_options("ann") == {"sd_model_checkpoint": "b", "clip_skip": 2}
    assert await other.load_options("bob") == {"previews": True}
    assert await other.load_options("") == {}


def test_estimates_divide_waiting_jobs_among_engines():
    assert estimates.waiting_s([10.0, None], 2, 4, usual_s=20.0) == (10 + 20) / 2 + 4 * 20 / 2 + 20
    assert (
        estimates.running_s(None, JobProgress())
        is estimates.running_s(0.0, JobProgress(steps=9))
        is None
    )
    assert estimates.running_s(10.0, JobProgress(step=5, steps=20)) == pytest.approx(30, abs=1)


# --- the shared queue


@pytest_asyncio.fixture
async def two_pods(postgres) -> AsyncIterator[tuple[Jobs, Jobs]]:
    from alphalayer.jobs.postgres import PostgresJobQueue

    url = postgres.fresh_database()
    async with contextlib.AsyncExitStack() as stack:
        pods = [await PostgresJobQueue.open(url, 10), await PostgresJobQueue.open(url, 10)]
        for pod in pods:
            stack.push_async_callback(pod.close)
        yield pods[0], pods[1]


@pytest.fixture
def short_claims(monkeypatch):
    monkeypatch.setattr("alphalayer.jobs.claims.CLAIM_S", 1.0)


async def test_other_pod_watches_and_cancels_a_job(two_pods):
    api, worker = two_pods
    claiming = asyncio.create_task(worker.claim())
    await asyncio.sleep(0.2)
    job = await api.submit(spec())
    assert (await within(claiming, 2)).id == job.id  # by the notification, not by polling
    await worker.mark_started(job.id)
    cancelling = asyncio.create_task(worker.wait_for_cancel(job.id))
    steps: list[int] = []

    async def watch() -> None:
        async for view in api.watch(job.id):
            steps.append(view.progress.step)

    watching = asyncio.create_task(watch())
    await poll_until(lambda: steps)
    await worker.report_progress(job.id, JobProgress(stage="sample", step=5, steps=9))
    await poll_until(lambda: 5 in steps)
    assert await api.cancel(job.id)
    await within(cancelling)
    await worker.complete(job.id, Cancelled("cancelled."))
    await within(watching)


async def test_concurrent_claims_return_distinct_jobs(two_pods):
    ids = {(await two_pods[0].submit(spec(str(i)))).id for i in range(10)}
    claimed = await within(asyncio.gather(*(two_pods[i % 2].claim() for i in range(10))))
    assert {job.id for job in claimed} == ids
    assert len(claimed) == len(ids)


async def test_pod_has_at_most_six_connections(two_pods):
    """Use one connection for notifications and five for statements.

    docs/concepts/scaling.md relies on these numbers.
    """
    pod, other = two_pods
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(pod._transaction())
        sixth_request = asyncio.create_task(pod.submit(spec()))
        await other.submit(spec())
        _, pending = await asyncio.wait([sixth_request], timeout=0.3)
        assert pending
    await within(sixth_request)


async def render(queue: Jobs, count: int, pause_s: float = 0.0) -> list[str | None]:
    """Claim and complete jobs as a worker, and return their models in order."""
    models: list[str | None] = []
    for _ in range(count):
        job = await within(queue.claim(models[-1] if models else None))
        models.append(job.spec.generation.model)
        await queue.mark_started(job.id)
        await asyncio.sleep(pause_s)
        await queue.complete(job.id, result_of(job.spec))
    return models


async def test_worker_keeps_its_model_within_affinity_s(two_pods, monkeypatch):
    api, worker = two_pods
    for i in range(8):
        await api.submit(spec(model="ab"[i % 2]))
    monkeypatch.setattr("alphalayer.jobs.claims.AFFINITY_S", 0.0)
    assert await render(worker, 2) == ["a", "b"]
    monkeypatch.setattr("alphalayer.jobs.claims.AFFINITY_S", 30.0)
    assert await render(worker, 6) == ["a"] * 3 + ["b"] * 3


async def test_requeued_job_precedes_the_loaded_model(two_pods):
    api, worker = two_pods
    crashing = await api.submit(spec(model="other"))
    await api.submit(spec(model="held"))
    await within(worker.claim("other"))
    await worker.mark_started(crashing.id)
    await worker.requeue(crashing.id, "it died")
    assert (await within(worker.claim("held"))).id == crashing.id


async def test_wait_computes_no_position(two_pods, monkeypatch):
    api, worker = two_pods

    async def fail(*_arguments):
        raise AssertionError("no position is needed here")

    monkeypatch.setattr(api._stats, "positions", fail)
    job = await api.submit(spec())
    waiting = asyncio.create_task(api.wait(job.id))
    await within(worker.claim())
    await worker.mark_started(job.id)
    await worker.complete(job.id, result_of(job.spec))
    assert (await within(waiting)).state is JobState.DONE


async def test_rare_model_is_not_starved_by_a_popular_one(two_pods, monkeypatch):
    monkeypatch.setattr("alphalayer.jobs.claims.AFFINITY_S", 0.3)
    api, worker = two_pods
    await api.submit(spec(model="popular"))
    await api.submit(spec(model="rare"))
    for _ in range(6):
        await api.submit(spec(model="popular"))
    models = await render(worker, 8, pause_s=0.12)
    assert 1 < models.index("rare") < 6


async def test_model_affinity_matches_name_file_and_title(two_pods):
    api, worker = two_pods
    await api.submit(spec(model="other"))
    matching = [
        await api.submit(spec(model=name))
        for name in ("mine.safetensors", "mine [0123abcdef]", "mine")
    ]
    assert [(await within(worker.claim("mine"))).id for _ in matching] == [
        job.id for job in matching
    ]


async def test_few_of_many_idle_workers_try_to_claim(postgres, monkeypatch):
    from alphalayer.jobs import claims
    from alphalayer.jobs.postgres import PostgresJobQueue

    tries = 0
    claim_next = claims.claim_next

    async def claim_counted(*arguments):
        nonlocal tries
        tries += 1
        return await claim_next(*arguments)

    monkeypatch.setattr(claims, "claim_next", claim_counted)
    url, workers, count = postgres.fresh_database(), 24, 24
    delays: list[float] = []

    async def render(worker: PostgresJobQueue) -> None:
        while True:
            job = await worker.claim()
            delays.append(time.time() - job.created_at)
            await worker.mark_started(job.id)
            await worker.complete(job.id, result_of(job.spec))

    async with contextlib.AsyncExitStack() as stack:
        pods = [await PostgresJobQueue.open(url, 100, role="worker") for _ in range(workers)]
        for pod in pods:
            stack.push_async_callback(pod.close)
        tasks = [asyncio.create_task(render(pod)) for pod in pods]
        for i in range(count):
            if i == count // 2:
                tries = 0
            await pods[0].submit(spec(str(i)))
            await asyncio.sleep(0.1)
        await poll_until(lambda: len(delays) == count)
        await stop(*tasks)
    # without sampling, each worker would try each job, and once more after its own job
    assert tries < workers * count / 2 / 2
    assert sorted(delays)[count // 2] < 0.5, (
        "most jobs are claimed by the notification, and the others by the poll of one second"
    )


async def test_stale_outcome_of_a_partitioned_worker_is_ignored(postgres, monkeypatch):
    """Let the claim of a partitioned worker expire, and store its outcome later."""
    from alphalayer.jobs import claims
    from alphalayer.jobs import postgres as postgres_queue

    monkeypatch.setattr(claims, "CLAIM_S", 1.0)
    url = postgres.fresh_database()
    partitioned, healthy = (
        await postgres_queue.PostgresJobQueue.open(url, 10),
        await postgres_queue.PostgresJobQueue.open(url, 10),
    )
    try:
        job = await partitioned.submit(spec())
        await within(partitioned.claim())
        await partitioned.mark_started(job.id)
        for task in partitioned._tasks:
            task.cancel()  # no heartbeats from here on
        reclaimed = await within(healthy.claim())
        assert (reclaimed.id, reclaimed.starts) == (job.id, 1)
        await healthy.mark_started(job.id)
        await partitioned.complete(job.id, EngineFailed("too late."))
        view = await healthy.view(job.id)
        assert view
        assert view.job.state is JobState.RUNNING
        await healthy.complete(job.id, result_of(job.spec))
        await partitioned.complete(job.id, EngineFailed("too late."))
        assert (await within(healthy.wait(job.id))).state is JobState.DONE
    finally:
        await partitioned.close()
        await healthy.close()


async def test_partitioned_claim_locks_the_job_for_a_short_time(two_pods, monkeypatch):
    from alphalayer.jobs import claims, transactions

    monkeypatch.setattr(transactions, "IDLE_S", 1)
    partitioned, healthy = two_pods
    job = await partitioned.submit(spec())
    with pytest.raises(StorageFailed):  # noqa: PT012
        async with partitioned._transaction() as (_, queue):
            assert await claims.claim_next(
                queue, partitioned._worker, None, claims.ModelAffinity(), may_take_over=False
            )
            with pytest.raises(asyncio.TimeoutError):
                await within(healthy.claim(), 0.5)
            assert (await within(healthy.claim(), 5)).id == job.id


async def test_cancel_without_a_notification_is_detected(short_claims, two_pods):
    api, worker = two_pods
    worker._tasks[0].cancel()  # receives no notification from here on
    for is_started in (True, False):
        job = await api.submit(spec())
        await within(worker.claim())
        if is_started:
            await worker.mark_started(job.id)
        cancelling = asyncio.create_task(worker.wait_for_cancel(job.id))
        assert await api.cancel(job.id)
        await within(cancelling)
        await worker.complete(job.id, Cancelled("cancelled."))
        assert (await within(api.wait(job.id))).state is JobState.CANCELLED


async def test_worker_with_a_lost_claim_stores_no_outcome(short_claims, two_pods):
    partitioned, healthy = two_pods
    job = await partitioned.submit(spec())
    await within(partitioned.claim())
    await partitioned.mark_started(job.id)
    heartbeat = partitioned._tasks[1]
    await stop(heartbeat)
    assert (await within(healthy.claim())).id == job.id
    heartbeat = asyncio.create_task(partitioned._keep_claims_alive())
    await within(partitioned.wait_for_cancel(job.id), 2)
    await partitioned.complete(job.id, Cancelled("cancelled."))
    assert (await healthy.view(job.id)).job.state is JobState.RUNNING
    await healthy.mark_started(job.id)
    await healthy.complete(job.id, result_of(job.spec))
    assert (await within(healthy.wait(job.id))).state is JobState.DONE
    await stop(heartbeat)


async def test_job_that_crashed_an_engine_is_not_batched(two_pods):
    other, worker = two_pods
    crashing, first, compatible = [
        await other.submit(spec(str(i), width=64, height=64)) for i in range(3)
    ]
    assert (await within(worker.claim())).id == crashing.id
    await worker.mark_started(crashing.id)
    job = await within(other.claim())
    assert job.id == first.id
    await worker.requeue(crashing.id, "it died")
    claimed = await other.claim_compatible(job, 64 * 64)
    assert claimed
    assert claimed.id == compatible.id
    assert await other.claim_compatible(job, 64 * 64) is None
    assert (await within(other.claim())).id == crashing.id
    assert await other.cancel(crashing.id)


async def test_database_outage_keeps_claims_of_running_jobs(postgres, monkeypatch):
    from alphalayer.jobs import claims
    from alphalayer.jobs import postgres as postgres_queue
    from alphalayer.jobs.postgres import PostgresJobQueue

    monkeypatch.setattr(claims, "CLAIM_S", 2.0)
    monkeypatch.setattr(postgres_queue, "CLAIM_EVERY_S", 0.2)
    url = postgres.fresh_database()
    busy, idle = [await PostgresJobQueue.open(url, 10, role="worker") for _ in range(2)]
    try:
        job = await busy.submit(spec())
        await within(busy.claim())
        await busy.mark_started(job.id)
        claims_in_progress = [asyncio.create_task(queue.claim()) for queue in (idle, busy)]
        await poll_until(lambda: idle._transaction.healthy_s > claims.CLAIM_S / 2)
        await asyncio.to_thread(postgres.stop)
        await asyncio.sleep(claims.CLAIM_S + 0.2)
        await asyncio.to_thread(postgres.start)
        # until they can take over claims again, and some time more
        with pytest.raises(asyncio.TimeoutError):
            await within(
                asyncio.wait(claims_in_progress, return_when=asyncio.FIRST_COMPLETED),
                claims.CLAIM_S / 2 + 0.8,
            )
        await stop(*claims_in_progress)
        assert not busy._claims[job.id].cancel.is_set()
    finally:
        await busy.close()
        await idle.close()


async def test_hanging_database_stops_no_wait_or_heartbeat(postgres, monkeypatch):
    from alphalayer.jobs import claims, connections
    from alphalayer.jobs import postgres as postgres_queue

    for name in ("CONNECT_S", "STATEMENT_S", "POOL_WAIT_S"):
        monkeypatch.setattr(connections, name, 0.5)
    monkeypatch.setattr(claims, "CLAIM_S", 1.0)
    monkeypatch.setattr(postgres_queue, "POLL_EVERY_S", 0.2)
    monkeypatch.setattr(postgres_queue, "UNREACHABLE_S", 1.5)
    queue = await postgres_queue.PostgresJobQueue.open(postgres.fresh_database(), 100)
    try:
        job = await queue.submit(spec())
        await within(queue.claim())
        await queue.mark_started(job.id)
        others = [await queue.submit(spec(str(i))) for i in range(30)]

        async def stale_jobs() -> list:
            async with queue._transaction() as (_, rows):
                return await rows.stale_jobs(timedelta(seconds=claims.CLAIM_S))

        waiting = [asyncio.create_task(queue.wait(job.id)) for job in others]
        with postgres.hanging():
            await poll_until(lambda: queue.problem)
            with pytest.raises(StorageFailed):
                await queue.view(job.id)
        await poll_until(lambda: not queue.problem)

        async def wait_for_heartbeats() -> None:
            while await stale_jobs():
                await asyncio.sleep(0.05)

        await within(wait_for_heartbeats())
        assert not any(task.done() for task in (*waiting, *queue._tasks))
        await stop(*waiting)
    finally:
        await queue.close()


async def test_complete_waits_for_an_unreachable_database(postgres):
    from alphalayer.jobs.postgres import PostgresJobQueue

    queue = await PostgresJobQueue.open(postgres.fresh_database(), 10)
    try:
        job = await queue.submit(spec())
        await within(queue.claim())
        await queue.mark_started(job.id)
        waiting = asyncio.create_task(queue.wait(job.id))
        await asyncio.to_thread(postgres.stop)
        finishing = asyncio.create_task(queue.complete(job.id, result_of(job.spec)))
        await asyncio.sleep(0.3)
        assert not finishing.done()
        await asyncio.to_thread(postgres.start)
        await within(finishing)
        assert (await within(waiting)).state is JobState.DONE
        claiming = asyncio.create_task(queue.claim())
        later = await queue.submit(spec())
        assert (await within(claiming)).id == later.id
    finally:
        await queue.close()


async def test_open_accepts_libpq_addresses_and_hides_passwords(postgres):
    from alphalayer.jobs.postgres import PostgresJobQueue

    url = postgres.fresh_database()
    queue = await PostgresJobQueue.open(f"{url}?sslmode=prefer&application_name=pod", 10)
    try:
        claiming = asyncio.create_task(queue.claim())
        job = await queue.submit(spec())
        assert (await within(claiming)).id == job.id
    finally:
        await queue.close()
    # the first of several hosts that accepts connections
    await (await PostgresJobQueue.open(url.replace("@", "@127.0.0.1:1,"), 10)).close()
    for address in (
        "postgresql://u:zzz/zzz@127.0.0.1/db",
        "postgresql://u@127.0.0.1:1/db?password=zzz",
    ):
        with pytest.raises(SetupFailed, match="cannot be opened") as caught:
            await PostgresJobQueue.open(address, 10)
        assert "zzz" not in str(caught.value)
    # this server has no TLS
    for address in ("?sslmode=require", "?sslmode=nonsense", "_not_there"):
        with pytest.raises(SetupFailed, match="cannot be opened"):
            await PostgresJobQueue.open(url + address, 10)


async def test_pgqueuer_tables_are_vacuumed_and_log_is_emptied(postgres, monkeypatch):
    from alphalayer.jobs import claims, notifications
    from alphalayer.jobs import postgres as postgres_queue

    monkeypatch.setattr(notifications, "CHECK_EVERY_S", 0.2)
    monkeypatch.setattr(claims, "CLEAN_EVERY_S", 0.5)
    url = postgres.fresh_database()
    pods = [await postgres_queue.PostgresJobQueue.open(url, 10) for _ in range(2)]
    try:
        await pods[0].submit(spec())
        async with pods[0]._transaction() as (connection, queue):
            options = "SELECT reloptions::text FROM pg_class WHERE relname = 'pgqueuer'"
            assert (
                "autovacuum_vacuum_scale_factor"
                in (await connection.exec_driver_sql(options)).scalar_one()
            )
            assert await queue.queue_log() != []
        await poll_until(
            lambda: sorted(pod._notifications.is_first for pod in pods) == [False, True]
        )

        async def wait_for_empty_log() -> None:
            while True:
                async with pods[0]._transaction() as (_, queue):
                    if not await queue.queue_log():
                        assert await queue.queue_size() != []
                        return
                await asyncio.sleep(0.1)

        await within(wait_for_empty_log())
        first, other = sorted(pods, key=lambda pod: pod._notifications.is_first, reverse=True)
        await first.close()
        pods.remove(first)
        await poll_until(lambda: other._notifications.is_first)
    finally:
        for pod in pods:
            await pod.close()
