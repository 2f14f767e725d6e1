"""Errors of the queue: cancelled requests, full and damaged disks, and failed starts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from structlog.testing import capture_logs
from tests.integration.test_job_queues import poll_until, result_of, spec, within

from alphalayer.core.errors import EngineFailed, QueueFull, SetupFailed, StorageFailed
from alphalayer.core.job import Delivery, Job, JobProgress, JobState, Submission, Webhook
from alphalayer.jobs import estimates, lock, table
from alphalayer.jobs.base import USUAL_SECONDS, Jobs
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.jobs.table import Journal


@pytest_asyncio.fixture
async def embedded(tmp_path: Path) -> AsyncIterator[SqliteJobQueue]:
    """Open a queue of ten jobs, half of them for the owner "half"."""
    queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10, {"half": 0.5})
    yield queue
    await queue.close()


@pytest_asyncio.fixture
async def shared(postgres) -> AsyncIterator[Jobs]:
    """Open a shared queue."""
    from alphalayer.jobs.postgres import PostgresJobQueue

    queue = await PostgresJobQueue.open(postgres.fresh_database(), 10)
    yield queue
    await queue.close()


@pytest.fixture(params=["embedded", "shared"])
def queue(request: pytest.FixtureRequest) -> Jobs:
    return request.getfixturevalue(request.param)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Journal:
    """Fail each write to the journal, until the test undoes the patch."""

    async def fail_to_save(_journal: Journal, _job: Job) -> bool:
        raise StorageFailed("the disk is full.")

    monkeypatch.setattr(Journal, "save", fail_to_save)
    return monkeypatch


async def test_cancelled_queued_job_has_a_due_webhook(queue: Jobs):
    delivery = Delivery(webhook=Webhook(url="https://x.org", service_url="https://y.org"))
    text = 'a text with "webhook":{ in it'
    with_receiver = await queue.submit(spec(text), delivery=delivery)
    without_receiver = await queue.submit(spec(text))
    for job in (with_receiver, without_receiver):
        assert await queue.cancel(job.id)
    due = await queue.claim_due_webhooks(5)
    assert [(job.id, job.state, tries) for job, tries in due] == [
        (with_receiver.id, JobState.CANCELLED, 0)
    ]


async def test_delete_finished_deletes_in_batches(queue: Jobs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(table, "DELETE_BATCH", 2)
    for _ in range(5):
        await queue.cancel((await queue.submit(spec())).id)
    remaining = await queue.submit(spec())
    row_counts, write = [], Journal._write

    async def write_counted(self: Journal, *statement: object) -> int:
        row_counts.append(await write(self, *statement))
        return row_counts[-1]

    monkeypatch.setattr(Journal, "_write", write_counted)
    assert await queue.count_finished() == 5
    assert await queue.delete_finished(time.time() + 1, 3) == 3
    assert await queue.delete_finished(time.time() + 1, 100) == 2
    assert row_counts == [2, 1, 2, 0]
    assert [view.job.id for view in await queue.list()] == [remaining.id]


async def test_concurrent_submits_keep_the_share_of_their_owner(embedded: SqliteJobQueue):
    results = await asyncio.gather(
        *(embedded.submit(spec(), Submission(owner="half")) for _ in range(9)),
        return_exceptions=True,
    )
    errors = [result for result in results if isinstance(result, QueueFull)]
    assert len(errors) == 4
    assert "may fill 50%" in str(errors[0])
    await embedded.submit(spec(), Submission(owner="other"))


async def test_submit_cancelled_while_job_is_written_keeps_the_job(
    embedded: SqliteJobQueue, monkeypatch: pytest.MonkeyPatch
):
    add, is_writing, can_write = Journal.add, asyncio.Event(), asyncio.Event()

    async def add_slowly(self: Journal, job: Job) -> Job:
        is_writing.set()
        await can_write.wait()
        return await add(self, job)

    monkeypatch.setattr(Journal, "add", add_slowly)
    submissions = [
        asyncio.create_task(embedded.submit(spec(), job_id=job_id))
        for job_id in ("0123456789ab", "0123456789cd")
    ]
    await within(is_writing.wait())
    for submission in submissions:
        submission.cancel()
    await asyncio.gather(*submissions, return_exceptions=True)
    withdrawing = asyncio.create_task(embedded.withdraw("0123456789cd"))
    can_write.set()
    await within(withdrawing)
    assert (await within(embedded.claim())).id == "0123456789ab"
    assert await embedded.unfinished_ids() == {"0123456789ab"}
    assert embedded.queue_length == 0


async def test_job_is_running_until_its_outcome_is_written(
    embedded: SqliteJobQueue, full_disk: pytest.MonkeyPatch, tmp_path: Path
):
    job = await embedded.submit(spec())
    await within(embedded.claim())
    await embedded.mark_started(job.id)
    finishing = asyncio.create_task(embedded.complete(job.id, result_of(job.spec)))
    await asyncio.sleep(0)
    watched = embedded.watch(job.id)
    for view in (await embedded.view(job.id), (await embedded.list())[0], await anext(watched)):
        assert view
        assert (view.job.state, view.job.result) == (JobState.RUNNING, None)
    await watched.aclose()
    # a service that stops now requeues it without this start
    finishing.cancel()
    full_disk.undo()
    await embedded.requeue(job.id, "the service was stopped", is_counted=False)
    await embedded.close()
    reopened = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10)
    assert (await within(reopened.claim())).starts == 0
    await reopened.close()


async def test_damaged_journal_is_reported_and_unlocked(tmp_path: Path):
    file = tmp_path / "jobs.sqlite"
    queue = await SqliteJobQueue.open(file, 1000)
    for _ in range(100):
        await queue.submit(spec("x" * 200))
    await queue.close()
    data = file.read_bytes()
    file.write_bytes(data[:8192] + b"\xff" * (len(data) - 8192))
    for opening in (lock.check(file), SqliteJobQueue.open(file, 10)):
        with pytest.raises(SetupFailed, match="damaged") as caught:
            await opening
        assert "docs/guides/backup.md" in caught.value.hint
    file.write_bytes(b"no journal" * 1000)
    with pytest.raises(SetupFailed, match="backup") as caught:
        await SqliteJobQueue.open(file, 10)
    for path in tmp_path.glob("jobs.sqlite*"):
        path.unlink()
    await (await SqliteJobQueue.open(file, 10)).close()


@pytest.mark.parametrize("lost", ["empty", "missing"])
async def test_lost_journal_is_reported_and_not_replaced(tmp_path: Path, lost: str):
    file = tmp_path / "jobs.sqlite"
    queue = await SqliteJobQueue.open(file, 10)
    await queue.submit(spec())
    changes = (tmp_path / "jobs.sqlite-wal").read_bytes()
    await queue.close()
    if lost == "empty":
        os.truncate(file, 0)
    else:
        file.unlink()
        (tmp_path / "jobs.sqlite-wal").write_bytes(changes)
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    for opening in (lock.check(file), SqliteJobQueue.open(file, 10)):
        with pytest.raises(SetupFailed, match=f"is {lost}.* Its jobs are lost") as caught:
            await opening
        assert "docs/guides/backup.md" in caught.value.hint
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == before


async def test_failed_creation_leaves_no_empty_journal(tmp_path: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    file = tmp_path / "jobs.sqlite"
    with monkeypatch.context() as patch:
        patch.setattr(table, "_migrate", fail)
        with pytest.raises(SetupFailed, match="full"):
            await SqliteJobQueue.open(file, 10)
    await (await SqliteJobQueue.open(file, 10)).close()


@pytest.mark.parametrize("place", [(Path, "rename"), (table, "SqliteDatabase")])
async def test_start_killed_during_creation_is_repeated(
    tmp_path: Path, monkeypatch, place: tuple[Any, str]
):
    def kill(*_: object) -> None:
        raise asyncio.CancelledError  # leaves the files as they are

    file = tmp_path / "jobs.sqlite"
    with monkeypatch.context() as patch:
        patch.setattr(*place, kill)
        with pytest.raises(asyncio.CancelledError):
            await table.Journal.open(file)
    queue = await SqliteJobQueue.open(file, 10)
    await queue.submit(spec())
    await queue.close()
    assert not file.with_name("jobs.sqlite.new").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs rights of files")
async def test_journal_is_readable_by_its_owner_alone(tmp_path: Path):
    before, file = os.umask(0o022), tmp_path / "data" / "jobs.sqlite"
    try:
        for expected in (0o700, 0o755):
            queue = await SqliteJobQueue.open(file, 10)
            await queue.submit(spec())
            rights = {path.name: path.stat().st_mode & 0o777 for path in file.parent.iterdir()}
            assert rights == dict.fromkeys(
                ("jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm", "jobs.sqlite.lock"), 0o600
            )
            assert file.parent.stat().st_mode & 0o777 == expected
            await queue.close()
            # as an earlier version created them, in a folder of the user's choice
            file.parent.chmod(0o755)
            for path in file.parent.iterdir():
                path.chmod(0o644)
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed")
async def test_journal_removed_while_open_is_restored(tmp_path: Path):
    file = tmp_path / "data" / "jobs.sqlite"
    queue = await SqliteJobQueue.open(file, 10)
    before = await queue.submit(spec("before"))
    shutil.rmtree(file.parent)
    assert await queue.view(before.id)
    with capture_logs() as logs:
        after = await queue.submit(spec("after"))
    assert [line["event"] for line in logs] == ["journal.restored"]
    with pytest.raises(SetupFailed, match="another service"):
        await lock.check(file)
    later = await queue.submit(spec("later"))
    assert await queue.unfinished_ids() == {before.id, after.id, later.id}
    await queue.close()
    reopened = await SqliteJobQueue.open(file, 10)
    assert [(await within(reopened.claim())).id for _ in range(3)] == [
        before.id,
        after.id,
        later.id,
    ]
    await reopened.close()


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed")
async def test_journal_replaced_while_open_refuses_jobs(embedded: SqliteJobQueue, tmp_path: Path):
    file = tmp_path / "jobs.sqlite"
    file.rename(tmp_path / "moved.sqlite")
    file.write_bytes(b"a journal of another service")
    with pytest.raises(StorageFailed, match="another file has taken the place"):
        await embedded.submit(spec())
    assert file.read_bytes() == b"a journal of another service"
    (tmp_path / "moved.sqlite").replace(file)
    await embedded.submit(spec())


async def test_journal_recovers_without_requests(
    embedded: SqliteJobQueue, monkeypatch: pytest.MonkeyPatch
):
    async def fail(*_: object) -> list[int]:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(table, "RECOVERY_PAUSE_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(embedded._journal.database, "commit", fail)
        with pytest.raises(StorageFailed):
            await embedded.submit(spec())
        assert "disk is full" in (embedded.problem or "")
        await asyncio.sleep(0.05)
        assert embedded.problem
    await poll_until(lambda: embedded.problem is None)


async def test_journal_check_finishes_no_job(embedded: SqliteJobQueue, tmp_path: Path):
    job = await embedded.submit(spec())
    await within(embedded.claim())
    await embedded.mark_started(job.id)
    await embedded.cancel(job.id)
    await embedded.close()
    await lock.check(tmp_path / "jobs.sqlite")
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as file:
        assert file.execute("SELECT state FROM jobs").fetchall() == [("running",)]


# --- the shared queue


async def test_claim_of_a_stopped_worker_is_dropped(shared: Jobs, monkeypatch: pytest.MonkeyPatch):
    job = await shared.submit(spec())
    await within(shared.claim())
    await shared.mark_started(job.id)
    await shared.cancel(job.id)
    row = shared._claims.pop(job.id).row

    async def fail(*_: object) -> None:
        is_writing.set()
        raise StorageFailed("the database cannot be reached.")

    is_writing = asyncio.Event()
    monkeypatch.setattr(shared, "_store_outcome", fail)
    accepting = asyncio.create_task(shared._accept_claim(row))
    await within(is_writing.wait())
    accepting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await accepting
    assert shared._claims == {}


async def test_requeued_job_starts_without_old_progress(shared: Jobs):
    job = await shared.submit(spec())
    for _ in range(2):
        await within(shared.claim())
        await shared.mark_started(job.id)
        await poll_until(lambda: shared._notifications.progress_of(job.id) == JobProgress())
        view = await shared.view(job.id)
        assert view
        assert (view.progress.step, view.eta_s) == (0, None)
        await shared.report_progress(job.id, JobProgress(stage="sample", step=5, steps=9))
        await poll_until(lambda: shared._notifications.progress_of(job.id).step == 5)
        await shared.requeue(job.id, "it died")
    await within(shared.claim())
    await shared.complete(job.id, EngineFailed("it broke."))


async def test_webhook_of_a_clock_that_was_set_back_is_due(queue: Jobs):
    """A year ahead, a webhook was postponed for a minute: it is due now, not in a year."""
    delivery = Delivery(webhook=Webhook(url="https://x.org", service_url="https://y.org"))
    jobs = [await queue.submit(spec(), delivery=delivery) for _ in range(2)]
    for job, due in zip(jobs, (365 * 86_400, 3_600), strict=True):
        await queue.cancel(job.id)
        await queue.record_webhook_attempt(job.id, time.time() + due, 1)
    assert [job.id for job, _ in await queue.claim_due_webhooks(5)] == [jobs[0].id]


@pytest.mark.parametrize("shift_s", [-40_000_000.0, 40_000_000.0])
async def test_eta_ignores_a_clock_that_was_set(
    embedded: SqliteJobQueue, monkeypatch: pytest.MonkeyPatch, shift_s: float
):
    running, waiting = [await embedded.submit(spec()) for _ in range(2)]
    await embedded.claim()
    await embedded.mark_started(running.id)
    await embedded.report_progress(running.id, JobProgress(stage="sample", step=1, steps=9))
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0 + shift_s)
    for job in (running, waiting):
        view = await embedded.view(job.id)
        assert view
        assert view.eta_s is not None
        assert 0 <= view.eta_s < 60
    if shift_s < 0:
        assert embedded.oldest_waiting_s == 0
    await embedded.complete(running.id, result_of(running.spec))
    assert 1 <= embedded.retry_after_s <= USUAL_SECONDS


async def test_shared_eta_is_never_negative(shared: Jobs, monkeypatch: pytest.MonkeyPatch):
    job = await shared.submit(spec())
    await within(shared.claim())
    await shared.mark_started(job.id)
    await shared.report_progress(job.id, JobProgress(stage="sample", step=1, steps=9))
    await poll_until(lambda: shared._notifications.progress_of(job.id).step == 1)
    monkeypatch.setattr(estimates, "time", SimpleNamespace(time=lambda: 1.0))
    view = await shared.view(job.id)
    assert view
    assert view.eta_s == 0
