"""The journal: all jobs in one SQL table of SQLite or PostgreSQL.

SQLite has one writer, the service that owns the file. PostgreSQL has many.
The schema has a version. `Journal.open` migrates an older one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sqlite3
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    false,
    func,
    literal_column,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from alphalayer.core.errors import DatabaseAway, SetupFailed, StorageFailed
from alphalayer.core.job import Job, JobSpec, JobState, Submission
from alphalayer.core.request import GenerationRequest
from alphalayer.jobs import journal_file
from alphalayer.jobs.databases import Database, SqliteDatabase, Statement
from alphalayer.jobs.journal_file import RESTORE
from alphalayer.jobs.upgrades import upgrade_6_to_7
from alphalayer.observability.background import retry_until_success
from alphalayer.observability.logging import describe_error, log

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

client_options = Table(
    "client_options",
    metadata,
    Column("owner", String(100), primary_key=True),
    Column("name", String(50), primary_key=True),
    Column("value", Text, nullable=False),
)
"""Options of each client as JSON. Without keys, the owner is ""."""

OPEN = [JobState.QUEUED.value, JobState.RUNNING.value]
_CHANGING = (
    "state",
    "idempotency_key",
    "started_at",
    "finished_at",
    "starts",
    "result",
    "error",
    "webhook_due",
)
_FIXED = ("id", "owner", "created_at", "spec", "digest", "delivery", "traceparent")
ADD = {
    "sqlite": sqlite.insert(jobs)
    .values({name: bindparam(name) for name in (*_FIXED, *_CHANGING)})
    .on_conflict_do_nothing(index_elements=["owner", "idempotency_key"]),
    "postgresql": postgresql.insert(jobs).on_conflict_do_nothing(
        index_elements=["owner", "idempotency_key"]
    ),
}
"""Statements that insert a row unless its owner has used the key before, by dialect."""
SET_OPTION = {
    name: dialect.insert(client_options)
    .values({column: bindparam(column) for column in ("owner", "name", "value")})
    .on_conflict_do_update(index_elements=["owner", "name"], set_={"value": bindparam("value")})
    for name, dialect in (("sqlite", sqlite), ("postgresql", postgresql))
}
"""Statements that insert or replace an option, by dialect."""
_SAVE = (
    update(jobs)
    .where(
        jobs.c.id == bindparam("job_id"),
        jobs.c.state.in_([literal_column(f"'{state}'") for state in OPEN]),
    )
    .values({name: bindparam(name) for name in _CHANGING})
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
    (
        "CREATE TABLE client_options (owner VARCHAR(100) NOT NULL, name VARCHAR(50) NOT NULL, "
        "value TEXT NOT NULL, PRIMARY KEY (owner, name))",
    ),
)
"""SQL of each migration from version 1 on. `jobs` has the newest version."""
VERSION = 1 + len(MIGRATIONS)

WITH_WEBHOOK = jobs.c.delivery.contains('"webhook":{')
"""Selects jobs with a webhook. In a text of the request the quotes would be escaped."""
_INPUT = re.compile(r"input_[0-9a-f]{64}\.png")

WEBHOOK_CLAIM_S = 60.0
WEBHOOK_HORIZON_S = 86_400.0
"""Longer than each pause before a retry. A later time was set by a clock that was wrong."""
RECOVERY_PAUSE_S = 1.0
"""Seconds between two attempts to write after an error of the journal's file."""
DELETE_BATCH = 1000
"""Jobs that are deleted in one transaction, so that other writers get their turn."""
UNREACHABLE = (DBAPIError, sqlite3.Error, PoolTimeout, OSError, TimeoutError, asyncio.TimeoutError)
"""Errors of a database that is unreachable, hangs, is full or read-only."""
_DAMAGED = ("malformed", "not a database")
"""Words in SQLite's messages about a damaged file."""


class Journal:
    """Table of jobs in one database."""

    def __init__(self, database: Database):
        self.database = database
        self._add = database.prepare(ADD[database.name])
        self._save = database.prepare(_SAVE)
        self._set_option = database.prepare(SET_OPTION[database.name])
        self._pending: list[tuple[Statement, asyncio.Future[int]]] = []
        self._writer: asyncio.Task[None] | None = None
        self.problem: str | None = None
        """Why the last write failed, until one succeeds."""
        self._recovery: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, location: Path | str) -> Journal:
        """Open a journal and migrate its schema.

        Args:
            location: A file, or the `postgresql://` address of a database.

        Raises:
            SetupFailed: It is no journal, is from a newer version, is not writable or cannot be
                reached.
        """
        hint = "Check the folder's rights and space, or move the file away."
        database: Database
        try:
            if isinstance(location, Path):
                journal_file.prepare(location)
                database = SqliteDatabase(location)
            else:
                from alphalayer.jobs import connections

                database = connections.PostgresDatabase(location)
                location = "in PostgreSQL"  # its address may hold a password
                hint = "Check the address, and that PostgreSQL runs."
            async with contextlib.AsyncExitStack() as undo:
                undo.push_async_callback(database.close)
                await database.migrate(partial(_migrate, location))
                undo.pop_all()
        except (DBAPIError, OSError, sqlite3.Error) as error:
            cause = getattr(error, "orig", error)
            hint = RESTORE if _is_damage(cause) else hint
            raise SetupFailed(
                f"the journal {location} cannot be opened: {cause}.", hint=hint
            ) from None
        return cls(database)

    async def close(self) -> None:
        """Close the database after all pending writes."""
        if self._recovery:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
        if self._writer:
            await self._writer
        await self.database.close()

    async def add(self, job: Job) -> Job:
        """Store a new job.

        Returns:
            The job, or the earlier one with the same owner and idempotency key.

        Raises:
            StorageFailed: The journal cannot be read or written.
        """
        while not await self._write(self._add, row_of(job)):
            if earlier := await self.find_repeated(job):
                return earlier
        return job

    async def find_repeated(self, job: Job) -> Job | None:
        """Return the earlier job with the same owner and idempotency key.

        Raises:
            StorageFailed: The journal cannot be read.
        """
        if job.submission.idempotency_key is None:
            return None
        same = (jobs.c.owner == job.owner) & (
            jobs.c.idempotency_key == job.submission.idempotency_key
        )
        matches = await self._read(select(jobs).where(same))
        return matches[0] if matches else None

    async def save(self, job: Job) -> bool:
        """Store the changes of a job that is unfinished in the journal.

        Returns:
            Whether it was unfinished.

        Raises:
            StorageFailed: The journal cannot be written.
        """
        changed = _changes_of(job)
        return await self._write(self._save, {**changed, "job_id": job.id}) > 0

    async def request_cancel(self, job: Job) -> None:
        """Store the cancel request of a running job, and its key.

        Raises:
            StorageFailed: The journal cannot be written.
        """
        changes = {"cancel_asked": True, "idempotency_key": job.submission.idempotency_key}
        await self._write(update(jobs).where(jobs.c.id == job.id).values(changes))

    async def get(self, job_id: str) -> Job | None:
        """Return the job of an id, or None."""
        matches = await self._read(select(jobs).where(jobs.c.id == job_id))
        return matches[0] if matches else None

    async def unfinished(self) -> list[Job]:
        """Return all unfinished jobs, oldest first."""
        return await self._read(
            select(jobs).where(jobs.c.state.in_(OPEN)).order_by(jobs.c.created_at)
        )

    async def unfinished_ids(self) -> set[str]:
        """Return the ids of all unfinished jobs. Raises `StorageFailed`."""
        rows = await self._rows(select(jobs.c.id).where(jobs.c.state.in_(OPEN)))
        return {row["id"] for row in rows}

    async def input_names(self) -> set[str]:
        """Return the names of the input images of all unfinished jobs.

        A name in a prompt counts too, which keeps a file longer than necessary.

        Raises:
            StorageFailed: The journal cannot be read.
        """
        named = jobs.c.spec.contains("input_", autoescape=True)
        rows = await self._rows(select(jobs.c.spec).where(jobs.c.state.in_(OPEN), named))
        return {name for row in rows for name in _INPUT.findall(row["spec"])}

    async def list(
        self,
        owner: str | None = None,
        state: JobState | None = None,
        limit: int = 50,
        before: float | None = None,
    ) -> list[Job]:
        """Return jobs created before a time, newest first."""
        statement = select(jobs).order_by(jobs.c.created_at.desc()).limit(limit)
        if owner is not None:
            statement = statement.where(jobs.c.owner == owner)
        if state is not None:
            statement = statement.where(jobs.c.state == state.value)
        if before is not None:
            statement = statement.where(jobs.c.created_at < before)
        return await self._read(statement)

    async def count_finished(self) -> int:
        """Return the number of finished jobs. Raises `StorageFailed`."""
        rows = await self._rows(select(func.count().label("count")).where(jobs.c.finished_at > 0))
        return rows[0]["count"]

    async def delete_finished(self, finished_before: float, at_most: int) -> int:
        """Delete jobs that finished before a time, the oldest first, in batches.

        Args:
            finished_before: Unix seconds.
            at_most: Maximum number of jobs.

        Returns:
            The number of deleted jobs.
        """
        old = (
            select(jobs.c.id)
            .where(jobs.c.finished_at < finished_before, jobs.c.webhook_due.is_(None))
            .order_by(jobs.c.finished_at)
        )
        deleted = 0
        while deleted < at_most:
            size = min(DELETE_BATCH, at_most - deleted)
            count = await self._write(jobs.delete().where(jobs.c.id.in_(old.limit(size))))
            deleted += count
            if count < size:
                break
        return deleted

    async def claim_webhooks(self, now: float, limit: int) -> list[tuple[Job, int]]:
        """Claim finished jobs whose webhook is due, the longest due first.

        They are due again after a minute.

        Args:
            now: Unix seconds.
            limit: Maximum number of jobs.

        Returns:
            Each job and the number of attempts so far.

        Raises:
            StorageFailed: The journal cannot be read or written.
        """
        due_jobs = (
            select(jobs.c.id)
            .where(or_(jobs.c.webhook_due <= now, jobs.c.webhook_due > now + WEBHOOK_HORIZON_S))
            .order_by(jobs.c.webhook_due)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        claim = (
            update(jobs)
            .where(jobs.c.id.in_(due_jobs))
            .values(webhook_due=now + WEBHOOK_CLAIM_S)
            .returning(jobs)
        )
        return [(job_of(row), int(row["webhook_tries"])) for row in await self._rows(claim)]

    async def record_webhook_attempt(self, job_id: str, due: float | None, tries: int) -> None:
        """Store an attempt and the time of the next one. Raises `StorageFailed`."""
        await self._write(
            update(jobs).where(jobs.c.id == job_id).values(webhook_due=due, webhook_tries=tries)
        )

    async def load_options(self, owner: str) -> dict[str, Any]:
        """Return the options of a client. Raises `StorageFailed`."""
        rows = await self._rows(select(client_options).where(client_options.c.owner == owner))
        return {row["name"]: json.loads(row["value"]) for row in rows}

    async def save_options(self, owner: str, options: Mapping[str, Any]) -> None:
        """Store options of a client. Raises `StorageFailed`."""
        for name, value in options.items():
            row = {"owner": owner, "name": name, "value": json.dumps(value)}
            await self._write(self._set_option, row)

    async def _write(self, statement: Any, values: dict[str, Any] | None = None) -> int:
        """Run and commit a statement. Return the number of changed rows.

        Statements that arrive during a commit share the next one.
        """
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pending.append(((statement, values or {}), done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._commit_pending())
        return await done

    async def _commit_pending(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                counts = await self.database.commit([statement for statement, _ in batch])
            except Exception as error:
                if isinstance(error, UNREACHABLE):
                    error = self.to_storage_error(error)
                    self._note_problem(error)
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
                continue
            self.problem = None
            for (_, done), count in zip(batch, counts, strict=True):
                if not done.done():
                    done.set_result(count)

    def _note_problem(self, error: StorageFailed) -> None:
        """Remember an error until a write succeeds, and try to write until then.

        Without that, a service that gets no requests would never count as ready again.
        """
        self.problem = error.message
        if self.database.name == "sqlite" and (self._recovery is None or self._recovery.done()):
            self._recovery = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        """Write the version of the schema, which is there, until it succeeds."""
        async for attempt in retry_until_success(
            StorageFailed, lambda _error: None, RECOVERY_PAUSE_S
        ):
            with attempt:
                if self.problem:
                    await self._write(text(f"PRAGMA user_version = {VERSION}"))

    async def _read(self, statement: Any) -> list[Job]:
        return [job_of(row) for row in await self._rows(statement)]

    async def _rows(self, statement: Any) -> Sequence[Any]:
        try:
            return await self.database.rows(statement)
        except UNREACHABLE as error:
            raise self.to_storage_error(error) from None

    def to_storage_error(self, error: Exception) -> StorageFailed:
        """Return the error of the service for an error of the database."""
        cause = describe_error(error)
        if _is_damage(error):
            return StorageFailed(f"the journal is damaged: {cause}.", hint=RESTORE)
        if self.database.name == "sqlite":
            hint = "Free some space and check the rights of the file."
            return StorageFailed(f"the journal cannot be written or read: {cause}.", hint=hint)
        hint = "Try again later, or check that PostgreSQL runs."
        return DatabaseAway(f"the database cannot be reached: {cause}.", hint=hint)


def _is_damage(error: Exception) -> bool:
    cause = getattr(error, "orig", None) or error
    return isinstance(cause, sqlite3.DatabaseError) and any(word in str(cause) for word in _DAMAGED)


def _migrate(location: Path | str, connection: Connection) -> None:
    """Create or migrate the tables within the transaction of the connection."""
    shared = connection.dialect.name == "postgresql"
    if shared:
        # several services may start at once, and the first one migrates
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('alphalayer'))"))
        connection.execute(
            text("CREATE TABLE IF NOT EXISTS alphalayer_version (version INTEGER NOT NULL)")
        )
    else:
        # the driver begins a transaction before changes of rows, but not of tables
        connection.execute(text("BEGIN IMMEDIATE"))
    query = "SELECT max(version) FROM alphalayer_version" if shared else "PRAGMA user_version"
    version = connection.execute(text(query)).scalar_one() or 0
    if version > VERSION:
        raise SetupFailed(
            f"the journal {location} has version {version}; this Alphalayer supports {VERSION}.",
            hint="Update Alphalayer, or move the journal away.",
        )
    if version == VERSION:
        return
    if version == 0:
        metadata.create_all(connection)
    for step in MIGRATIONS[version - 1 :] if version else ():
        for statement in step:
            connection.execute(text(statement))
    if 0 < version < 7:
        _upgrade_rows(connection)
    if version:
        log.warning(
            "journal.migrated", journal=str(location), from_version=version, to_version=VERSION
        )
    command = "INSERT INTO alphalayer_version VALUES ({})" if shared else "PRAGMA user_version = {}"
    connection.execute(text(command.format(VERSION)))


def _upgrade_rows(connection: Connection) -> None:
    """Convert the rows of version 6. An unreadable row stays, and its job fails."""
    rows = connection.execute(select(jobs.c.id, jobs.c.spec, jobs.c.result)).mappings().all()
    for row in rows:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            changed = upgrade_6_to_7(dict(row))
            connection.execute(update(jobs).where(jobs.c.id == row["id"]).values(changed))


def row_of(job: Job) -> dict[str, Any]:
    """Return the job as a row of the table.

    Without defaults: the version before reads requests that use none of its later fields. So a
    default that changes needs a migration.
    """
    return {
        **_changes_of(job),
        "id": job.id,
        "created_at": job.created_at,
        **dict(job.submission),
        "spec": job.spec.model_dump_json(exclude_defaults=True),
        "delivery": job.delivery.model_dump_json(),
    }


def _changes_of(job: Job) -> dict[str, Any]:
    """Return the columns of a job that change during its life."""
    is_due = job.state.is_final and job.delivery.webhook
    return {
        "state": job.state.value,
        "idempotency_key": job.submission.idempotency_key,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "starts": job.starts,
        "result": job.result.model_dump_json(exclude_none=True) if job.result else None,
        "error": json.dumps(job.error) if job.error else None,
        "webhook_due": job.finished_at if is_due else None,
    }


def job_of(row: Any) -> Job:
    """Return the job of a row. A row that cannot be read becomes a failed job."""
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
            hint="Submit the request again.",
        )
        return Job.model_validate(
            {
                "id": row["id"],
                "created_at": row["created_at"],
                "submission": fields["submission"],
                "spec": _UNREADABLE,
                "state": "failed",
                "finished_at": row["finished_at"] or time.time(),
                "error": problem.to_dict(),
            }
        )


_UNREADABLE = JobSpec(generation=GenerationRequest(prompt="unreadable"))
