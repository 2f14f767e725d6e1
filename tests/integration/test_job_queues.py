"""What both dispatchers promise: the embedded one on SQLite, and the shared one on a real PostgreSQL."""

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
def ends() -> list[tuple[str, str]]:
    """Each end of a job of `open_one` that was told: id, and what came of it."""
    return []


@pytest_asyncio.fixture(params=["embedded", "shared"])
async def open_one(request, tmp_path, ends) -> AsyncIterator[Open]:
    """Opens a job_queue with room for ten jobs; each time the same queue. Closed at the end."""

    def on_outcome(job_id: str, outcome: Outcome) -> None:
        ends.append((job_id, getattr(outcome, "code", "done")))

    opened: list[Jobs] = []
    shares = {"half": 0.5}
    if request.param == "shared":
        from alphalayer.jobs.postgres import PostgresJobQueue

        url = request.getfixturevalue("postgres").fresh_database()

    async def open_now() -> Jobs:
        if request.param == "shared":
            opened.append(await PostgresJobQueue.open(url, 10, shares, on_outcome=on_outcome))
        else:
            opened.append(
                await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10, shares, on_outcome)
            )
        return opened[-1]

    yield open_now
    for each in opened:
        await each.close()


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


async def soon(awaitable, seconds: float = 10):
    return await asyncio.wait_for(awaitable, seconds)


async def until(condition: Callable[[], object]) -> None:
    """Poll until a condition holds, for some seconds."""

    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.02)

    await soon(poll())


async def stop(*tasks: asyncio.Task) -> None:
    """Cancel tasks and wait until they are over: one that still has a connection would keep it from being closed."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_job_from_its_place_in_the_queue_to_its_pictures(open_one):
    queue = await open_one()
    first, second = await queue.submit(spec("one")), await queue.submit(spec("two"))
    for position, job in ((1, first), (2, second)):
        view = await queue.view(job.id)
        assert view
        assert (view.job.state, view.position) == (JobState.QUEUED, position)
    taken = await soon(queue.claim())
    assert taken == first
    await queue.mark_started(taken.id)
    running = await queue.view(first.id)
    assert running
    assert (running.job.state, running.job.starts, running.position) == (JobState.RUNNING, 1, 0)
    await queue.complete(taken.id, result_of(taken.spec))
    done = await soon(queue.wait(first.id))
    assert (done.state, done.result) == (JobState.DONE, result_of(taken.spec))
    assert done.finished_at
    view = await queue.view(second.id)
    assert view
    assert view.position == 1
    assert await queue.unfinished_ids() == {second.id}
    assert [(each.job.id, each.position) for each in await queue.list()] == [
        (second.id, 1),
        (first.id, 0),
    ]
    assert [each.job.id for each in await queue.list(state=JobState.DONE)] == [first.id]
    assert await queue.view("none") is None


async def test_whoever_watches_sees_progress_and_the_end(open_one):
    queue = await open_one()
    job = await queue.submit(spec())
    seen: list[tuple[JobState, int]] = []

    async def watch() -> None:
        async for view in queue.watch(job.id):
            seen.append((view.job.state, view.progress.step))

    watching = asyncio.create_task(watch())
    await soon(queue.claim())
    await queue.mark_started(job.id)
    await until(lambda: (JobState.RUNNING, 0) in seen)
    await queue.report_progress(job.id, JobProgress(stage="sample", step=3, steps=9))
    await until(lambda: (JobState.RUNNING, 3) in seen)
    await queue.complete(job.id, EngineFailed("it broke."))
    await soon(watching)
    assert seen[-1][0] is JobState.FAILED


async def test_the_time_left_counts_all_that_comes_before(open_one):
    queue = await open_one()
    first, second, third = [await queue.submit(spec()) for _ in range(3)]
    assert [(await queue.view(each.id)).eta_s for each in (first, third)] == [
        USUAL_SECONDS,
        3 * USUAL_SECONDS,
    ]
    await soon(queue.claim())
    await queue.mark_started(first.id)
    await asyncio.sleep(0.2)
    await queue.report_progress(first.id, JobProgress(stage="sample", step=1, steps=101))
    async for view in queue.watch(second.id):  # told again as time passes, without any news of it
        if view.eta_s > USUAL_SECONDS:
            break
    rest = (await queue.view(first.id)).eta_s
    assert rest >= 20
    assert (await queue.view(second.id)).eta_s == pytest.approx(rest + USUAL_SECONDS, rel=0.2)
    assert (await queue.view(third.id)).eta_s == pytest.approx(rest + 2 * USUAL_SECONDS, rel=0.2)


async def test_room_shares_and_idempotency(open_one):
    queue = await open_one()
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
    # a retry of what was accepted needs no room
    assert await submit(queue, spec("same"), owner="a", idempotency_key="k") == first
    with pytest.raises(InvalidRequest, match="another request") as other:
        await submit(queue, spec("other"), owner="a", idempotency_key="k")
    assert other.value.field == "Idempotency-Key"


async def test_one_key_at_the_same_moment_is_one_job(open_one):
    queue = await open_one()
    asked = spec("same", seed=-1)
    twice = [asked, asked.model_copy()]
    same = await asyncio.gather(*(submit(queue, each, idempotency_key="k") for each in twice * 3))
    assert len({job.id for job in same}) == 1
    assert queue.queue_length <= 1


@pytest.mark.parametrize("is_running", [False, True])
async def test_a_job_whose_clients_left_gives_up_its_key(open_one, is_running):
    queue = await open_one()
    first = await submit(queue, spec("same"), idempotency_key="k")
    if is_running:
        await soon(queue.claim())
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
    assert (await soon(queue.wait(first.id))).state is JobState.CANCELLED
    # one that somebody wanted to stop keeps it, also over a restart
    assert await queue.cancel(second.id)
    await queue.close()
    queue = await open_one()
    assert (await submit(queue, spec("same"), idempotency_key="k", job_id="ab")).id == second.id


@pytest.mark.parametrize("is_running", [False, True])
async def test_who_comes_as_the_last_one_leaves_has_a_job_that_goes_on(open_one, is_running):
    queue = await open_one()
    for i in range(10):
        first = await submit(queue, spec(str(i)), idempotency_key=str(i))
        if is_running:
            assert (await soon(queue.claim())).id == first.id
            await queue.mark_started(first.id)
        left, *came = await asyncio.gather(
            queue.withdraw(first.id),
            *(submit(queue, spec(str(i)), idempotency_key=str(i)) for _ in range(2)),
        )
        assert left is None
        assert len({job.id for job in came}) == 1
        stays = came[0].id == first.id
        view = await queue.view(came[0].id)
        assert view
        assert view.job.state is (JobState.RUNNING if is_running and stays else JobState.QUEUED)
        await queue.withdraw(came[0].id)
        await queue.withdraw(came[0].id)
        if is_running:
            await soon(queue.wait_for_cancel(first.id))
            await queue.complete(first.id, Cancelled("cancelled."))
        for job_id in (first.id, came[0].id):
            assert (await soon(queue.wait(job_id))).state is JobState.CANCELLED
    await until(lambda: queue.queue_length == 0)


async def test_a_job_that_was_stopped_in_good_order_waits_again_as_if_it_had_not_been_begun(
    open_one,
):
    queue = await open_one()
    first, second = await queue.submit(spec("one")), await queue.submit(spec("two"))
    for _ in range(MAX_STARTS + 1):
        assert (await soon(queue.claim(), 2)).id == first.id
        await queue.mark_started(first.id)
        await queue.requeue(first.id, "the service was stopped", is_counted=False)
    waiting = await queue.list(state=JobState.QUEUED)
    assert [(each.job.id, each.job.starts, each.position) for each in waiting] == [
        (second.id, 0, 2),
        (first.id, 0, 1),
    ]


async def test_a_row_that_cannot_be_read_any_more_is_a_failed_job(open_one, ends):
    queue = await open_one()
    broken, done = await queue.submit(spec("broken")), await queue.submit(spec("fine"))
    async with queue._journal.engine.begin() as connection:
        await connection.execute(
            update(jobs)
            .where(jobs.c.id == broken.id)
            .values(spec='{"prompt": "hidden", "new_field": 1}')
        )
    await queue.close()
    again = await open_one()
    assert (await soon(again.claim())).id == done.id
    view = await again.view(broken.id)
    assert view
    assert view.job.state is JobState.FAILED
    assert "cannot be read" in str(view.job.error)
    assert "hidden" not in str(view.job.error)
    assert {each.job.id for each in await again.list()} == {broken.id, done.id}
    assert await again.unfinished_ids() == {done.id}
    assert ends == [(broken.id, "storage_failed")]


async def test_cancel_while_it_waits_and_while_it_runs(open_one):
    queue = await open_one()
    running, waiting = await queue.submit(spec()), await queue.submit(spec())
    await soon(queue.claim())
    await queue.mark_started(running.id)
    assert await queue.cancel(waiting.id)
    assert (await soon(queue.wait(waiting.id))).state is JobState.CANCELLED
    assert not await queue.cancel(waiting.id)
    asked = asyncio.create_task(queue.wait_for_cancel(running.id))
    assert await queue.cancel(running.id)
    await soon(asked)
    await queue.complete(running.id, Cancelled("cancelled."))
    assert (await soon(queue.wait(running.id))).state is JobState.CANCELLED
    with pytest.raises(asyncio.TimeoutError):
        await soon(queue.claim(), 0.3)


async def test_a_cancel_outlives_the_service_that_was_told(claims_of_a_second, open_one):
    queue = await open_one()
    job = await queue.submit(spec())
    await soon(queue.claim())
    await queue.mark_started(job.id)
    assert await queue.cancel(job.id)
    await queue.close()
    queue = await open_one()
    taking = asyncio.create_task(queue.claim())
    assert (await soon(queue.wait(job.id))).state is JobState.CANCELLED
    assert not taking.done()
    await stop(taking)


async def test_a_job_whose_engine_died_comes_first_again_and_is_given_up_in_the_end(open_one):
    queue = await open_one()
    first, second = await queue.submit(spec("one")), await queue.submit(spec("two"))
    for start in range(MAX_STARTS):
        job = await soon(queue.claim())
        assert job.id == first.id
        assert job.starts == start
        await queue.mark_started(job.id)
        await queue.requeue(job.id, "it died")
    given_up = await soon(queue.wait(first.id))
    assert given_up.state is JobState.FAILED
    assert "it died" in str(given_up.error)
    assert (await soon(queue.claim())).id == second.id


async def test_every_end_is_told_once(open_one, ends):
    queue = await open_one()
    done, failed, lost, stopped, waiting = [(await queue.submit(spec(name))).id for name in "abcde"]
    for _ in range(2):
        job = await soon(queue.claim())
        await queue.mark_started(job.id)
        await queue.complete(
            job.id, result_of(job.spec) if job.id == done else EngineFailed("it broke.")
        )
        await queue.complete(job.id, EngineFailed("again."))
    for _ in range(MAX_STARTS):
        await queue.mark_started((await soon(queue.claim())).id)
        await queue.requeue(lost, "it died")
    assert await queue.cancel(waiting)
    assert not await queue.cancel(waiting)
    await queue.mark_started((await soon(queue.claim())).id)
    assert await queue.cancel(stopped)
    await queue.complete(stopped, Cancelled("cancelled."))
    assert ends == [
        (done, "done"),
        (failed, "engine_failed"),
        (lost, "engine_failed"),
        (waiting, "cancelled"),
        (stopped, "cancelled"),
    ]


async def test_mates_are_alike(open_one):
    queue = await open_one()
    first = await queue.submit(spec("a", width=512, height=512))
    await queue.submit(spec("b", width=256, height=512))
    mate = await queue.submit(spec("c", width=512, height=512, seed=9))
    job = await soon(queue.claim())
    assert job.id == first.id
    assert await queue.claim_compatible(job, 512 * 511) is None
    taken = await queue.claim_compatible(job, 512 * 512)
    assert taken
    assert taken.id == mate.id
    assert await queue.claim_compatible(job, 512 * 512) is None


async def test_finished_jobs_are_forgotten_in_time(open_one):
    queue = await open_one()
    job = await queue.submit(spec())
    await soon(queue.claim())
    await queue.mark_started(job.id)
    await queue.complete(job.id, result_of(job.spec))
    ended = (await soon(queue.wait(job.id))).finished_at
    assert await queue.delete_finished(ended - 1) == 0
    assert await queue.delete_finished(ended + 1) == 1
    assert await queue.view(job.id) is None


def test_several_engines_share_what_waits():
    assert estimates.waiting_s([10.0, None], 2, 4, usual_s=20.0) == (10 + 20) / 2 + 4 * 20 / 2 + 20
    assert (
        estimates.running_s(None, JobProgress())
        is estimates.running_s(time.time(), JobProgress(steps=9))
        is None
    )
    assert estimates.running_s(time.time() - 10, JobProgress(step=5, steps=20)) == pytest.approx(
        30, abs=1
    )


# --- only where many share a queue


@pytest_asyncio.fixture
async def two(postgres) -> AsyncIterator[tuple[Jobs, Jobs]]:
    from alphalayer.jobs.postgres import PostgresJobQueue

    url = postgres.fresh_database()
    async with contextlib.AsyncExitStack() as stack:
        pods = [await PostgresJobQueue.open(url, 10), await PostgresJobQueue.open(url, 10)]
        for pod in pods:
            stack.push_async_callback(pod.close)
        yield pods[0], pods[1]


@pytest.fixture
def claims_of_a_second(monkeypatch):
    monkeypatch.setattr("alphalayer.jobs.claims.CLAIM_S", 1.0)


async def test_any_pod_answers_streams_and_cancels(two):
    asking, drawing = two
    taking = asyncio.create_task(drawing.claim())
    await asyncio.sleep(0.2)
    job = await asking.submit(spec())
    assert (await soon(taking, 2)).id == job.id  # by the news, not by looking
    await drawing.mark_started(job.id)
    asked = asyncio.create_task(drawing.wait_for_cancel(job.id))
    steps: list[int] = []

    async def watch() -> None:
        async for view in asking.watch(job.id):
            steps.append(view.progress.step)

    watching = asyncio.create_task(watch())
    await until(lambda: steps)
    await drawing.report_progress(job.id, JobProgress(stage="sample", step=5, steps=9))
    await until(lambda: 5 in steps)
    assert await asking.cancel(job.id)
    await soon(asked)
    await drawing.complete(job.id, Cancelled("cancelled."))
    await soon(watching)


async def test_no_job_is_taken_twice(two):
    ids = {(await two[0].submit(spec(str(i)))).id for i in range(10)}
    taken = await soon(asyncio.gather(*(two[i % 2].claim() for i in range(10))))
    assert {job.id for job in taken} == ids
    assert len(taken) == len(ids)


async def test_a_pod_has_six_connections_at_most(two):
    """One for news and five for statements, whatever is asked of it: docs/concepts/scaling.md counts on that."""
    pod, other = two
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(pod._transaction())
        sixth = asyncio.create_task(pod.submit(spec()))
        await other.submit(spec())
        _, pending = await asyncio.wait([sixth], timeout=0.3)
        assert pending
    await soon(sixth)


async def render(queue: Jobs, count: int, pause_s: float = 0.0) -> list[str | None]:
    """Take and finish so many jobs as a worker does; the models that it had to hold, one after the other."""
    held: list[str | None] = []
    for _ in range(count):
        job = await soon(queue.claim(held[-1] if held else None))
        held.append(job.spec.generation.model)
        await queue.mark_started(job.id)
        await asyncio.sleep(pause_s)
        await queue.complete(job.id, result_of(job.spec))
    return held


async def test_a_worker_stays_with_its_model_for_a_time_however_long_all_have_waited(
    two, monkeypatch
):
    asking, drawing = two
    for i in range(8):
        await asking.submit(spec(model="ab"[i % 2]))
    monkeypatch.setattr("alphalayer.jobs.claims.AFFINITY_S", 0.0)
    assert await render(drawing, 2) == ["a", "b"]
    monkeypatch.setattr("alphalayer.jobs.claims.AFFINITY_S", 30.0)
    assert await render(drawing, 6) == ["a"] * 3 + ["b"] * 3


async def test_a_job_that_was_begun_before_goes_before_the_model_that_is_held(two):
    asking, drawing = two
    crashing = await asking.submit(spec(model="other"))
    await asking.submit(spec(model="held"))
    await soon(drawing.claim("other"))
    await drawing.mark_started(crashing.id)
    await drawing.requeue(crashing.id, "it died")
    assert (await soon(drawing.claim("held"))).id == crashing.id


async def test_who_only_waits_does_not_count_the_queue(two, monkeypatch):
    asking, drawing = two

    async def never(*_arguments):
        raise AssertionError("nobody reads a position here")

    monkeypatch.setattr(asking._stats, "positions", never)
    job = await asking.submit(spec())
    waiting = asyncio.create_task(asking.wait(job.id))
    await soon(drawing.claim())
    await drawing.mark_started(job.id)
    await drawing.complete(job.id, result_of(job.spec))
    assert (await soon(waiting)).state is JobState.DONE


async def test_no_model_is_kept_waiting_by_a_stream_of_jobs_for_another(two, monkeypatch):
    monkeypatch.setattr("alphalayer.jobs.claims.AFFINITY_S", 0.3)
    asking, drawing = two
    await asking.submit(spec(model="popular"))
    await asking.submit(spec(model="rare"))
    for _ in range(6):
        await asking.submit(spec(model="popular"))
    held = await render(drawing, 8, pause_s=0.12)
    assert 1 < held.index("rare") < 6


async def test_a_model_is_known_by_its_name_its_file_and_its_title(two):
    asking, drawing = two
    await asking.submit(spec(model="other"))
    mine = [
        await asking.submit(spec(model=name))
        for name in ("mine.safetensors", "mine [0123abcdef]", "mine")
    ]
    assert [(await soon(drawing.claim("mine"))).id for _ in mine] == [job.id for job in mine]


async def test_of_many_idle_workers_a_few_ask_for_a_job(postgres, monkeypatch):
    from alphalayer.jobs import claims
    from alphalayer.jobs.postgres import PostgresJobQueue

    asked = 0
    claim_next = claims.claim_next

    async def counted(*arguments):
        nonlocal asked
        asked += 1
        return await claim_next(*arguments)

    monkeypatch.setattr(claims, "claim_next", counted)
    url, workers, count = postgres.fresh_database(), 24, 40
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
        drawing = [asyncio.create_task(render(pod)) for pod in pods]
        for i in range(count):
            if i == count // 2:
                asked = 0
            await pods[0].submit(spec(str(i)))
            await asyncio.sleep(0.1)
        await until(lambda: len(delays) == count)
        await stop(*drawing)
    # each of them would ask for each job; drawing one asks again afterwards, too
    assert asked < workers * count / 2 / 2
    assert sorted(delays)[count // 2] < 0.5, (
        "most are taken by the news; who hears none asks once a second"
    )


async def test_a_late_result_changes_nothing(postgres, monkeypatch):
    """A worker that was cut off: its claim runs out, another one draws, and what the first one brings later is not wanted."""
    from alphalayer.jobs import claims
    from alphalayer.jobs import postgres as postgres_queue

    monkeypatch.setattr(claims, "CLAIM_S", 1.0)
    url = postgres.fresh_database()
    cut_off, healthy = (
        await postgres_queue.PostgresJobQueue.open(url, 10),
        await postgres_queue.PostgresJobQueue.open(url, 10),
    )
    try:
        job = await cut_off.submit(spec())
        await soon(cut_off.claim())
        await cut_off.mark_started(job.id)
        for task in cut_off._tasks:
            task.cancel()  # no heartbeats from here on
        again = await soon(healthy.claim())
        assert (again.id, again.starts) == (job.id, 1)
        await healthy.mark_started(job.id)
        await cut_off.complete(job.id, EngineFailed("too late."))
        view = await healthy.view(job.id)
        assert view
        assert view.job.state is JobState.RUNNING
        await healthy.complete(job.id, result_of(job.spec))
        await cut_off.complete(job.id, EngineFailed("too late."))
        assert (await soon(healthy.wait(job.id))).state is JobState.DONE
    finally:
        await cut_off.close()
        await healthy.close()


async def test_a_worker_that_is_cut_off_while_it_claims_locks_the_job_for_a_short_time_only(
    two, monkeypatch
):
    from alphalayer.jobs import claims, transactions

    monkeypatch.setattr(transactions, "IDLE_S", 1)
    cut_off, healthy = two
    job = await cut_off.submit(spec())
    with pytest.raises(StorageFailed):  # noqa: PT012
        async with cut_off._transaction() as (_, queue):
            assert await claims.claim_next(
                queue, cut_off._worker, None, claims.ModelAffinity(), may_take_over=False
            )
            with pytest.raises(asyncio.TimeoutError):
                await soon(healthy.claim(), 0.5)
            assert (await soon(healthy.claim(), 5)).id == job.id


async def test_a_cancel_that_nobody_hears_of_is_seen(claims_of_a_second, two):
    asking, drawing = two
    drawing._tasks[0].cancel()  # hears no news from here on
    for is_started in (True, False):
        job = await asking.submit(spec())
        await soon(drawing.claim())
        if is_started:
            await drawing.mark_started(job.id)
        asked = asyncio.create_task(drawing.wait_for_cancel(job.id))
        assert await asking.cancel(job.id)
        await soon(asked)
        await drawing.complete(job.id, Cancelled("cancelled."))
        assert (await soon(asking.wait(job.id))).state is JobState.CANCELLED


async def test_whose_claim_is_anothers_by_now_stops_and_ends_nothing(claims_of_a_second, two):
    cut_off, healthy = two
    job = await cut_off.submit(spec())
    await soon(cut_off.claim())
    await cut_off.mark_started(job.id)
    beating = cut_off._tasks[1]
    await stop(beating)
    assert (await soon(healthy.claim())).id == job.id
    beating = asyncio.create_task(cut_off._keep_claims_alive())
    await soon(cut_off.wait_for_cancel(job.id), 2)
    await cut_off.complete(job.id, Cancelled("cancelled."))
    assert (await healthy.view(job.id)).job.state is JobState.RUNNING
    await healthy.mark_started(job.id)
    await healthy.complete(job.id, result_of(job.spec))
    assert (await soon(healthy.wait(job.id))).state is JobState.DONE
    await stop(beating)


async def test_a_job_that_took_an_engine_down_is_nobodys_mate(two):
    asking, drawing = two
    crashing, innocent, mate = [
        await asking.submit(spec(str(i), width=64, height=64)) for i in range(3)
    ]
    assert (await soon(drawing.claim())).id == crashing.id
    await drawing.mark_started(crashing.id)
    job = await soon(asking.claim())
    assert job.id == innocent.id
    await drawing.requeue(crashing.id, "it died")
    taken = await asking.claim_compatible(job, 64 * 64)
    assert taken
    assert taken.id == mate.id
    assert await asking.claim_compatible(job, 64 * 64) is None
    assert (await soon(asking.claim())).id == crashing.id
    assert await asking.cancel(crashing.id)


async def test_a_database_that_was_away_takes_no_job_from_the_worker_that_draws_it(
    postgres, monkeypatch
):
    from alphalayer.jobs import claims
    from alphalayer.jobs import postgres as postgres_queue
    from alphalayer.jobs.postgres import PostgresJobQueue

    monkeypatch.setattr(claims, "CLAIM_S", 2.0)
    monkeypatch.setattr(postgres_queue, "CLAIM_EVERY_S", 0.2)
    url = postgres.fresh_database()
    drawing, idle = [await PostgresJobQueue.open(url, 10, role="worker") for _ in range(2)]
    try:
        job = await drawing.submit(spec())
        await soon(drawing.claim())
        await drawing.mark_started(job.id)
        takings = [asyncio.create_task(each.claim()) for each in (idle, drawing)]
        await until(lambda: idle._transaction.healthy_s > claims.CLAIM_S / 2)
        await asyncio.to_thread(postgres.stop)
        await asyncio.sleep(claims.CLAIM_S + 0.2)
        await asyncio.to_thread(postgres.start)
        # until they may take claims over again, and some
        with pytest.raises(asyncio.TimeoutError):
            await soon(
                asyncio.wait(takings, return_when=asyncio.FIRST_COMPLETED), claims.CLAIM_S / 2 + 0.8
            )
        await stop(*takings)
        assert not drawing._claims[job.id].cancel.is_set()
    finally:
        await drawing.close()
        await idle.close()


async def test_a_database_that_hangs_ends_neither_waiting_nor_heartbeats(postgres, monkeypatch):
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
        await soon(queue.claim())
        await queue.mark_started(job.id)
        others = [await queue.submit(spec(str(i))) for i in range(30)]

        async def stale() -> list:
            async with queue._transaction() as (_, rows):
                return await rows.stale_jobs(timedelta(seconds=claims.CLAIM_S))

        waiting = [asyncio.create_task(queue.wait(each.id)) for each in others]
        with postgres.hanging():
            await until(lambda: not queue.is_reachable)
            with pytest.raises(StorageFailed):
                await queue.view(job.id)
        await until(lambda: queue.is_reachable)

        async def caught_up() -> None:
            while await stale():
                await asyncio.sleep(0.05)

        await soon(caught_up())
        assert not any(task.done() for task in (*waiting, *queue._tasks))
        await stop(*waiting)
    finally:
        await queue.close()


async def test_a_database_that_is_away_is_waited_for(postgres):
    from alphalayer.jobs.postgres import PostgresJobQueue

    queue = await PostgresJobQueue.open(postgres.fresh_database(), 10)
    try:
        job = await queue.submit(spec())
        await soon(queue.claim())
        await queue.mark_started(job.id)
        waiting = asyncio.create_task(queue.wait(job.id))
        await asyncio.to_thread(postgres.stop)
        finishing = asyncio.create_task(queue.complete(job.id, result_of(job.spec)))
        await asyncio.sleep(0.3)
        assert not finishing.done()
        await asyncio.to_thread(postgres.start)
        await soon(finishing)
        assert (await soon(waiting)).state is JobState.DONE
        taking = asyncio.create_task(queue.claim())
        later = await queue.submit(spec())
        assert (await soon(taking)).id == later.id
    finally:
        await queue.close()


async def test_an_address_says_what_postgresqls_own_programs_understand(postgres):
    from alphalayer.jobs.postgres import PostgresJobQueue

    url = postgres.fresh_database()
    queue = await PostgresJobQueue.open(f"{url}?sslmode=prefer&application_name=pod", 10)
    try:
        taking = asyncio.create_task(queue.claim())
        job = await queue.submit(spec())
        assert (await soon(taking)).id == job.id
    finally:
        await queue.close()
    # of several hosts the first one that answers
    await (await PostgresJobQueue.open(url.replace("@", "@127.0.0.1:1,"), 10)).close()
    for wrong in (
        "postgresql://u:zzz/zzz@127.0.0.1/db",
        "postgresql://u@127.0.0.1:1/db?password=zzz",
    ):
        with pytest.raises(SetupFailed, match="cannot be opened") as refused:
            await PostgresJobQueue.open(wrong, 10)
        assert "zzz" not in str(refused.value)
    # the server here has no TLS
    for wrong in ("?sslmode=require", "?sslmode=nonsense", "_not_there"):
        with pytest.raises(SetupFailed, match="cannot be opened"):
            await PostgresJobQueue.open(url + wrong, 10)


async def test_pgqueuers_tables_are_cleaned_often_enough_and_its_log_is_emptied(
    postgres, monkeypatch
):
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
        await until(lambda: sorted(pod._notifications.is_first for pod in pods) == [False, True])

        async def emptied() -> None:
            while True:
                async with pods[0]._transaction() as (_, queue):
                    if not await queue.queue_log():
                        assert await queue.queue_size() != []
                        return
                await asyncio.sleep(0.1)

        await soon(emptied())
        first, other = sorted(pods, key=lambda pod: pod._notifications.is_first, reverse=True)
        await first.close()
        pods.remove(first)
        await until(lambda: other._notifications.is_first)
    finally:
        for pod in pods:
            await pod.close()
