"""The journal: every job in one SQL table, so that nothing accepted is lost. SQL only; knows nothing of who waits for what.

One schema in SQLite (one writer: the service that owns the file) and in PostgreSQL (many). It has a version; `open` brings an older one
up to date.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    event,
    false,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from alphalayer.core.errors import DatabaseAway, SetupFailed, StorageFailed
from alphalayer.core.job import Job, JobSpec, JobState, Submission
from alphalayer.core.request import GenerationRequest
from alphalayer.jobs.upgrades import upgrade_6_to_7
from alphalayer.observability.logging import log

metadata = MetaData()
jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("owner", String(100), nullable=False, server_default=""),
    Column("idempotency_key", String(200)),
    Column("created_at", Float, nullable=False, index=True),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("starts", Integer, nullable=False, server_default="0"),
    Column("spec", Text, nullable=False),
    Column("result", Text),
    Column("error", Text),
    Column("webhook_due", Float, index=True),
    Column("webhook_tries", Integer, nullable=False, server_default="0"),
    Column("queue_id", BigInteger),
    Column("digest", String(64)),
    Column("cancel_asked", Boolean, nullable=False, server_default=false()),
    Column("wanted_by", Integer, nullable=False, server_default="1"),
    Column("delivery", Text),
    Column("traceparent", String(64)),
    UniqueConstraint("owner", "idempotency_key"),
    Index("ix_jobs_state_created_at", "state", "created_at"),
)

OPEN = [JobState.QUEUED.value, JobState.RUNNING.value]
_CHANGING = ("state", "idempotency_key", "started_at", "finished_at", "starts", "result", "error")
ADD = {
    "sqlite": sqlite.insert(jobs).on_conflict_do_nothing(
        index_elements=["owner", "idempotency_key"]
    ),
    "postgresql": postgresql.insert(jobs).on_conflict_do_nothing(
        index_elements=["owner", "idempotency_key"]
    ),
}
"""Adds a row unless its owner has used the idempotency key before; by dialect."""
_SAVE = (
    update(jobs)
    .where(jobs.c.id == bindparam("job_id"), jobs.c.state.in_(OPEN))
    .values({name: bindparam(name) for name in (*_CHANGING, "webhook_due")})
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "ALTER TABLE jobs ADD COLUMN webhook_due FLOAT",
        "ALTER TABLE jobs ADD COLUMN webhook_tries INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX ix_jobs_webhook_due ON jobs (webhook_due)",
    ),
    ("ALTER TABLE jobs ADD COLUMN queue_id BIGINT",),
    ("ALTER TABLE jobs ADD COLUMN digest VARCHAR(64)",),
    (
        "ALTER TABLE jobs ADD COLUMN cancel_asked BOOLEAN NOT NULL DEFAULT FALSE",
        "CREATE INDEX ix_jobs_state_created_at ON jobs (state, created_at)",
        "DROP INDEX IF EXISTS ix_jobs_state",
    ),
    ("ALTER TABLE jobs ADD COLUMN wanted_by INTEGER NOT NULL DEFAULT 1",),
    (
        "ALTER TABLE jobs ADD COLUMN delivery TEXT",
        "ALTER TABLE jobs ADD COLUMN traceparent VARCHAR(64)",
    ),
)
"""SQL that takes version 1 to 2, 2 to 3 and so on; the table above is always the newest."""
VERSION = 1 + len(MIGRATIONS)

WITH_WEBHOOK = jobs.c.delivery.contains('"webhook":{')
"""Jobs whose end somebody is to be told. In a text of the request the quotes would be escaped."""

CLAIMED_S = 60.0
FORGOTTEN_AT_ONCE = 1000
"""Jobs that are removed before others may write."""
UNREACHABLE = (DBAPIError, PoolTimeout, OSError, TimeoutError, asyncio.TimeoutError)
"""What the database raises when it is away, hangs, is full or read-only."""
_DAMAGED = ("malformed", "not a database")
"""What SQLite says of a file that it cannot make sense of."""
_MEND = "Put its backup back, or move it away (its jobs are lost then): docs/guides/backup.md."


class Journal:
    """The table of jobs in one database."""

    def __init__(self, engine: AsyncEngine):
        self.engine = engine
        self._add = ADD[engine.dialect.name]
        self._pending: list[tuple[Any, dict[str, Any], asyncio.Future[int]]] = []
        self._writer: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, place: Path | str) -> Journal:
        """Open the file, or the database of a `postgresql://` address, and bring its schema up to date.

        Raises:
            SetupFailed: not a journal, from a newer version, not to be written, or not to be reached.
        """
        hint = "Check the folder's rights and space, or move the file away."
        try:
            if isinstance(place, Path):
                place.parent.mkdir(parents=True, exist_ok=True)
                file = URL.create("sqlite+aiosqlite", database=str(place))
                engine = patient = create_async_engine(file, hide_parameters=True)
                event.listen(engine.sync_engine, "connect", _tune)
            else:
                from alphalayer.jobs import connections

                engine, patient = (
                    connections.create_engine(place, connections.ANSWER_S),
                    connections.create_engine(place),
                )
                place = "in PostgreSQL"  # its address may hold a password in more than one place
                hint = "Check the address, and that PostgreSQL runs."
            try:
                async with patient.begin() as connection:
                    await _migrate(connection, place)
            finally:
                await patient.dispose()
        except (DBAPIError, OSError, sqlite3.Error) as error:
            cause = getattr(error, "orig", error)
            hint = _MEND if _is_damage(cause) else hint
            raise SetupFailed(
                f"the journal {place} cannot be opened: {cause}.", hint=hint
            ) from None
        return cls(engine)

    async def close(self) -> None:
        """Give the file back, once all is written."""
        if self._writer:
            await self._writer
        await self.engine.dispose()

    async def add(self, job: Job) -> Job:
        """Write a new job; the one that is there already if owner and idempotency key are known. Raises `StorageFailed`."""
        while not await self._write(self._add, row_of(job)):
            if same := await self.known(job):
                return same
        return job

    async def known(self, job: Job) -> Job | None:
        """The job that came with the same owner and idempotency key before, if it still has it. Raises `StorageFailed`."""
        if job.submission.idempotency_key is None:
            return None
        same = (jobs.c.owner == job.owner) & (
            jobs.c.idempotency_key == job.submission.idempotency_key
        )
        found = await self._read(select(jobs).where(same))
        return found[0] if found else None

    async def save(self, job: Job) -> bool:
        """Write what changed of a job that is not over in the journal; whether it was so. Raises `StorageFailed`."""
        row = row_of(job)
        changed = {name: row[name] for name in _CHANGING}
        changed["webhook_due"] = (
            job.finished_at if job.state.is_final and job.delivery.webhook else None
        )
        return await self._write(_SAVE, {**changed, "job_id": job.id}) > 0

    async def ask_to_cancel(self, job: Job) -> None:
        """Note that a job that runs is to stop, and its key. Raises `StorageFailed`."""
        asked = {"cancel_asked": True, "idempotency_key": job.submission.idempotency_key}
        await self._write(update(jobs).where(jobs.c.id == job.id).values(asked))

    async def get(self, job_id: str) -> Job | None:
        """The job of that id."""
        found = await self._read(select(jobs).where(jobs.c.id == job_id))
        return found[0] if found else None

    async def unfinished(self) -> list[Job]:
        """All jobs that are not over, oldest first."""
        return await self._read(
            select(jobs).where(jobs.c.state.in_(OPEN)).order_by(jobs.c.created_at)
        )

    async def unfinished_ids(self) -> set[str]:
        """The ids of all jobs that are not over. Raises `StorageFailed`."""
        return {
            row["id"] for row in await self._rows(select(jobs.c.id).where(jobs.c.state.in_(OPEN)))
        }

    async def list(
        self,
        owner: str | None = None,
        state: JobState | None = None,
        limit: int = 50,
        before: float | None = None,
    ) -> list[Job]:
        """Jobs, newest first, created before a time."""
        statement = select(jobs).order_by(jobs.c.created_at.desc()).limit(limit)
        if owner is not None:
            statement = statement.where(jobs.c.owner == owner)
        if state is not None:
            statement = statement.where(jobs.c.state == state.value)
        if before is not None:
            statement = statement.where(jobs.c.created_at < before)
        return await self._read(statement)

    async def delete_finished(self, finished_before: float) -> int:
        """Remove jobs that were over before a time; how many. In portions, between which others write."""
        old = select(jobs.c.id).where(
            jobs.c.finished_at < finished_before, jobs.c.webhook_due.is_(None)
        )
        some = jobs.delete().where(jobs.c.id.in_(old.limit(FORGOTTEN_AT_ONCE)))
        gone = portion = await self._write(some)
        while portion == FORGOTTEN_AT_ONCE:
            portion = await self._write(some)
            gone += portion
        return gone

    async def claim_webhooks(self, now: float, limit: int) -> list[tuple[Job, int]]:
        """Jobs that are over and whose receiver is to be told by now, with how often that was tried, the longest due first. For whoever
        claims them alone: they are due again after a minute. Raises `StorageFailed`."""
        chosen = (
            select(jobs.c.id)
            .where(jobs.c.webhook_due <= now)
            .order_by(jobs.c.webhook_due)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        claim = (
            update(jobs)
            .where(jobs.c.id.in_(chosen))
            .values(webhook_due=now + CLAIMED_S)
            .returning(jobs)
        )
        return [(job_of(row), int(row["webhook_tries"])) for row in await self._rows(claim)]

    async def record_webhook_attempt(self, job_id: str, due: float | None, tries: int) -> None:
        """Note a try, and when the next one is due; None: no more. Raises `StorageFailed`."""
        await self._write(
            update(jobs).where(jobs.c.id == job_id).values(webhook_due=due, webhook_tries=tries)
        )

    async def _write(self, statement: Any, values: dict[str, Any] | None = None) -> int:
        """Run a statement and commit it; how many rows it changed. What comes while a commit is at work shares the next one."""
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pending.append((statement, values or {}, done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._commit_pending())
        return await done

    async def _commit_pending(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                async with self.engine.begin() as connection:
                    counts = [
                        (await connection.execute(statement, values)).rowcount
                        for statement, values, _ in batch
                    ]
            except Exception as error:
                fault = self.fault(error) if isinstance(error, UNREACHABLE) else error
                for *_, done in batch:
                    if not done.done():
                        done.set_exception(fault)
                continue
            for (*_, done), count in zip(batch, counts, strict=True):
                if not done.done():
                    done.set_result(count)

    async def _read(self, statement: Any) -> list[Job]:
        return [job_of(row) for row in await self._rows(statement)]

    async def _rows(self, statement: Any) -> Sequence[Any]:
        try:
            async with self.engine.begin() as connection:
                return (await connection.execute(statement)).mappings().all()
        except UNREACHABLE as error:
            raise self.fault(error) from None

    def fault(self, error: Exception) -> StorageFailed:
        """An error of the database in the words of the service."""
        cause = getattr(error, "orig", None) or error
        if _is_damage(cause):
            return StorageFailed(f"the journal is damaged: {cause}.", hint=_MEND)
        if self.engine.dialect.name == "sqlite":
            hint = "Free some space and check the rights of the file."
            return StorageFailed(f"the journal cannot be written or read: {cause}.", hint=hint)
        hint = "Try again in a moment; if it stays away, check that PostgreSQL runs."
        return DatabaseAway(f"the database cannot be reached: {cause}.", hint=hint)


def _is_damage(cause: object) -> bool:
    return isinstance(cause, sqlite3.DatabaseError) and any(word in str(cause) for word in _DAMAGED)


def _tune(connection: Any, _record: object) -> None:
    """Write-ahead log, and a sync at each commit: an accepted job survives a power cut."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


async def _migrate(connection: AsyncConnection, place: Path | str) -> None:
    shared = connection.dialect.name == "postgresql"
    if shared:
        # many may start at once: the first one does the work
        await connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('alphalayer'))"))
        await connection.execute(
            text("CREATE TABLE IF NOT EXISTS alphalayer_version (version INTEGER NOT NULL)")
        )
    else:
        # by itself the driver begins a transaction only before rows are changed, not before tables are
        await connection.execute(text("BEGIN IMMEDIATE"))
    ask = "SELECT max(version) FROM alphalayer_version" if shared else "PRAGMA user_version"
    version = (await connection.execute(text(ask))).scalar_one() or 0
    if version > VERSION:
        raise SetupFailed(
            f"the journal {place} is of version {version}; this Alphalayer knows {VERSION}.",
            hint="Update Alphalayer, or move the journal away.",
        )
    if version == VERSION:
        return
    if version == 0:
        await connection.run_sync(metadata.create_all)
    for step in MIGRATIONS[version - 1 :] if version else ():
        for statement in step:
            await connection.execute(text(statement))
    if 0 < version < 7:
        await _upgrade_rows(connection)
    if version:
        log.warning(
            "journal.migrated", journal=str(place), from_version=version, to_version=VERSION
        )
    note = "INSERT INTO alphalayer_version VALUES ({})" if shared else "PRAGMA user_version = {}"
    await connection.execute(text(note.format(VERSION)))


async def _upgrade_rows(connection: AsyncConnection) -> None:
    """Rewrite the rows of version 6; one that cannot be read stays, and fails when it is read."""
    rows = (
        (await connection.execute(select(jobs.c.id, jobs.c.spec, jobs.c.result))).mappings().all()
    )
    for row in rows:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            changed = upgrade_6_to_7(dict(row))
            await connection.execute(update(jobs).where(jobs.c.id == row["id"]).values(changed))


def row_of(job: Job) -> dict[str, Any]:
    """Return the job as a row of the table."""
    return {
        **job.model_dump(include={"id", "created_at", "started_at", "finished_at", "starts"}),
        **job.submission.model_dump(),
        "state": job.state.value,
        "spec": job.spec.model_dump_json(),
        "delivery": job.delivery.model_dump_json(),
        "result": job.result.model_dump_json() if job.result else None,
        "error": json.dumps(job.error) if job.error else None,
    }


def job_of(row: Any) -> Job:
    """The job of a row of the table; one that cannot be read any more is a failed job."""
    fields = {name: value for name, value in row.items() if name in Job.model_fields}
    fields["submission"] = {name: row[name] for name in Submission.model_fields}
    try:
        for name in ("spec", "delivery", "result", "error"):
            fields[name] = json.loads(fields[name]) if fields[name] else None
        return Job.model_validate(fields)
    except ValueError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:3])
        problem = StorageFailed(
            f"its entry in the journal cannot be read any more ({reason}).",
            hint="Ask for the picture again.",
        )
        kept = {
            "id": row["id"],
            "created_at": row["created_at"],
            "submission": fields["submission"],
        }
        over = {
            "state": "failed",
            "finished_at": row["finished_at"] or time.time(),
            "error": problem.to_dict(),
        }
        return Job.model_validate({**kept, **over, "spec": _UNREADABLE})


_UNREADABLE = JobSpec(generation=GenerationRequest(prompt="unreadable"))
