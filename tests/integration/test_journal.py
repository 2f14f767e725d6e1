"""The journal's schema: an older one is brought up to date, as a whole or not at all."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import structlog.testing

from alphalayer.core.errors import SetupFailed
from alphalayer.core.job import Job
from alphalayer.jobs import table
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.jobs.table import MIGRATIONS, VERSION, jobs

LATER = (
    "webhook_due",
    "webhook_tries",
    "queue_id",
    "digest",
    "cancel_asked",
    "wanted_by",
    "delivery",
    "traceparent",
)


def first_version(file: Path) -> None:
    """A journal as the first version wrote it, with one job that waits."""
    first = [column for column in jobs.columns.keys() if column not in LATER]  # noqa: SIM118
    with closing(sqlite3.connect(file)) as old, old:
        old.execute(
            "CREATE TABLE jobs (id VARCHAR(32) PRIMARY KEY, state VARCHAR(16) NOT NULL, "
            "owner VARCHAR(100) NOT NULL DEFAULT '', idempotency_key VARCHAR(200), "
            "created_at FLOAT NOT NULL, started_at FLOAT, finished_at FLOAT, "
            "starts INTEGER NOT NULL DEFAULT 0, spec TEXT NOT NULL, result TEXT, error TEXT, "
            "UNIQUE (owner, idempotency_key))"
        )
        spec = json.dumps({"generation": {"prompt": "an old apple"}})
        values = ("a" * 24, "queued", "", None, 1.0, None, None, 0, spec, None, None)
        old.execute(
            f"INSERT INTO jobs ({', '.join(first)}) VALUES ({', '.join('?' * len(first))})", values
        )
        old.execute("PRAGMA user_version = 1")


async def test_a_journal_of_the_first_version_is_brought_up_to_date(tmp_path: Path):
    file = tmp_path / "jobs.sqlite"
    first_version(file)
    with structlog.testing.capture_logs() as logs:
        job_queue = await SqliteJobQueue.open(file, 10)
    assert [(line["event"], line["from_version"]) for line in logs] == [("journal.migrated", 1)]
    job: Job = await job_queue.claim()
    assert job.spec.generation.prompt == "an old apple"
    assert await job_queue.claim_due_webhooks(5) == []
    await job_queue.close()
    with closing(sqlite3.connect(file)) as now, now:
        assert now.execute("PRAGMA user_version").fetchone() == (VERSION,)


async def test_a_migration_that_breaks_off_has_changed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "jobs.sqlite"
    first_version(file)
    with monkeypatch.context() as broken:
        broken.setattr(
            table, "MIGRATIONS", (MIGRATIONS[0], ("SELECT no_such_function()",), *MIGRATIONS[2:])
        )
        with pytest.raises(SetupFailed, match="no_such_function"):
            await SqliteJobQueue.open(file, 10)
    with closing(sqlite3.connect(file)) as now, now:
        columns = {row[1] for row in now.execute("PRAGMA table_info(jobs)")}
        assert not columns & set(LATER)
        assert now.execute("PRAGMA user_version").fetchone() == (1,)
    job_queue = await SqliteJobQueue.open(file, 10)
    assert (await job_queue.claim()).spec.generation.prompt == "an old apple"
    await job_queue.close()


async def test_a_folder_may_be_called_as_it_likes(tmp_path: Path):
    file = tmp_path / "a?b" / "c%20d" / "jobs.sqlite"
    await (await SqliteJobQueue.open(file, 10)).close()
    assert {each.name for each in file.parent.iterdir()} >= {"jobs.sqlite", "jobs.sqlite.lock"}
