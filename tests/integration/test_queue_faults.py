"""What goes wrong around the queue: webhooks of what never ran, requests that go away, full and damaged disks, dead starts."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
import pytest_asyncio
from tests.integration.test_job_queues import result_of, soon, spec, until

from alphalayer.core.errors import EngineFailed, QueueFull, SetupFailed, StorageFailed
from alphalayer.core.job import Delivery, Job, JobProgress, JobState, Submission, Webhook
from alphalayer.jobs import lock, table
from alphalayer.jobs.base import Jobs
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.jobs.table import Journal


@pytest_asyncio.fixture
async def own(tmp_path: Path) -> AsyncIterator[SqliteJobQueue]:
    """A queue with room for ten jobs, half of them "half"'s."""
    queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10, {"half": 0.5})
    yield queue
    await queue.close()


@pytest_asyncio.fixture
async def shared(postgres) -> AsyncIterator[Jobs]:
    """A queue of many, in which there is one."""
    from alphalayer.jobs.postgres import PostgresJobQueue

    queue = await PostgresJobQueue.open(postgres.fresh_database(), 10)
    yield queue
    await queue.close()


@pytest.fixture(params=["own", "shared"])
def queue(request: pytest.FixtureRequest) -> Jobs:
    return request.getfixturevalue(request.param)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Journal:
    """A journal that has no room until the test takes it back."""

    async def no_room(_journal: Journal, _job: Job) -> bool:
        raise StorageFailed("the disk is full.")

    monkeypatch.setattr(Journal, "save", no_room)
    return monkeypatch


async def test_the_receiver_of_a_job_that_is_cancelled_as_it_waits_is_told(queue: Jobs):
    delivery = Delivery(webhook=Webhook(url="https://x.org", service_url="https://y.org"))
    text = 'a text with "webhook":{ in it'
    with_receiver = await queue.submit(spec(text), delivery=delivery)
    without = await queue.submit(spec(text))
    for job in (with_receiver, without):
        assert await queue.cancel(job.id)
    owed = await queue.claim_due_webhooks(5)
    assert [(job.id, job.state, tries) for job, tries in owed] == [
        (with_receiver.id, JobState.CANCELLED, 0)
    ]


async def test_old_jobs_are_forgotten_in_portions(queue: Jobs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(table, "DELETE_BATCH", 2)
    for _ in range(5):
        await queue.cancel((await queue.submit(spec())).id)
    stays = await queue.submit(spec())
    written, write = [], Journal._write

    async def counted(self: Journal, *statement: object) -> int:
        written.append(await write(self, *statement))
        return written[-1]

    monkeypatch.setattr(Journal, "_write", counted)
    assert await queue.delete_finished(time.time() + 1) == 5
    assert written == [2, 2, 1]
    assert [view.job.id for view in await queue.list()] == [stays.id]


async def test_a_crowd_does_not_pass_the_share_of_its_owner(own: SqliteJobQueue):
    asked = await asyncio.gather(
        *(own.submit(spec(), Submission(owner="half")) for _ in range(9)), return_exceptions=True
    )
    refused = [each for each in asked if isinstance(each, QueueFull)]
    assert len(refused) == 4
    assert "may fill 50%" in str(refused[0])
    await own.submit(spec(), Submission(owner="other"))


async def test_a_request_that_goes_away_as_its_job_is_written_leaves_a_job_in_the_queue(
    own: SqliteJobQueue, monkeypatch: pytest.MonkeyPatch
):
    add, writes, may_write = Journal.add, asyncio.Event(), asyncio.Event()

    async def slow(self: Journal, job: Job) -> Job:
        writes.set()
        await may_write.wait()
        return await add(self, job)

    monkeypatch.setattr(Journal, "add", slow)
    asked = [
        asyncio.create_task(own.submit(spec(), job_id=job_id))
        for job_id in ("0123456789ab", "0123456789cd")
    ]
    await soon(writes.wait())
    for each in asked:
        each.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    leaving = asyncio.create_task(own.withdraw("0123456789cd"))
    may_write.set()
    await soon(leaving)
    assert (await soon(own.claim())).id == "0123456789ab"
    assert await own.unfinished_ids() == {"0123456789ab"}
    assert own.queue_length == 0


async def test_a_job_is_over_when_that_is_written(
    own: SqliteJobQueue, full_disk: pytest.MonkeyPatch, tmp_path: Path
):
    job = await own.submit(spec())
    await soon(own.claim())
    await own.mark_started(job.id)
    finishing = asyncio.create_task(own.complete(job.id, result_of(job.spec)))
    await asyncio.sleep(0)
    watched = own.watch(job.id)
    for view in (await own.view(job.id), (await own.list())[0], await anext(watched)):
        assert view
        assert (view.job.state, view.job.result) == (JobState.RUNNING, None)
    await watched.aclose()
    # a service that is stopped now hands it back as it was before this start
    finishing.cancel()
    full_disk.undo()
    await own.requeue(job.id, "the service was stopped", is_counted=False)
    await own.close()
    again = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10)
    assert (await soon(again.claim())).starts == 0
    await again.close()


async def test_a_damaged_journal_is_said_and_let_go(tmp_path: Path):
    file = tmp_path / "jobs.sqlite"
    queue = await SqliteJobQueue.open(file, 1000)
    for _ in range(100):
        await queue.submit(spec("x" * 200))
    await queue.close()
    whole = file.read_bytes()
    file.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    for damaged in (lock.check(file), SqliteJobQueue.open(file, 10)):
        with pytest.raises(SetupFailed, match="damaged") as told:
            await damaged
        assert "docs/guides/backup.md" in told.value.hint
    file.write_bytes(b"no journal" * 1000)
    with pytest.raises(SetupFailed, match="backup") as told:
        await SqliteJobQueue.open(file, 10)
    for left in tmp_path.glob("jobs.sqlite*"):
        left.unlink()
    await (await SqliteJobQueue.open(file, 10)).close()


async def test_a_look_at_the_journal_ends_no_job(own: SqliteJobQueue, tmp_path: Path):
    job = await own.submit(spec())
    await soon(own.claim())
    await own.mark_started(job.id)
    await own.cancel(job.id)
    await own.close()
    await lock.check(tmp_path / "jobs.sqlite")
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as file:
        assert file.execute("SELECT state FROM jobs").fetchall() == [("running",)]


# --- only where many share a queue


async def test_a_claim_whose_taker_is_stopped_runs_out(
    shared: Jobs, monkeypatch: pytest.MonkeyPatch
):
    job = await shared.submit(spec())
    await soon(shared.claim())
    await shared.mark_started(job.id)
    await shared.cancel(job.id)
    row = shared._claims.pop(job.id).row

    async def fail(*_: object) -> None:
        writing.set()
        raise StorageFailed("the database cannot be reached.")

    writing = asyncio.Event()
    monkeypatch.setattr(shared, "_store_outcome", fail)
    holding = asyncio.create_task(shared._accept_claim(row))
    await soon(writing.wait())
    holding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await holding
    assert shared._claims == {}


async def test_the_progress_of_a_dead_start_is_not_that_of_the_next(shared: Jobs):
    job = await shared.submit(spec())
    for _ in range(2):
        await soon(shared.claim())
        await shared.mark_started(job.id)
        await until(lambda: shared._notifications.progress_of(job.id) == JobProgress())
        view = await shared.view(job.id)
        assert view
        assert (view.progress.step, view.eta_s) == (0, None)
        await shared.report_progress(job.id, JobProgress(stage="sample", step=5, steps=9))
        await until(lambda: shared._notifications.progress_of(job.id).step == 5)
        await shared.requeue(job.id, "it died")
    await soon(shared.claim())
    await shared.complete(job.id, EngineFailed("it broke."))
