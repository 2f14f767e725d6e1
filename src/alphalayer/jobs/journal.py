"""The journal: every job in one SQL table, so that nothing accepted is lost. SQL only; knows nothing of who waits for what.

The schema has a version; `open` brings an older file up to date. One writer at a time: the service that owns the file.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    bindparam,
    event,
    select,
    text,
    update,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from alphalayer.errors import SetupFailed, StorageFailed
from alphalayer.job import Job, JobState

metadata = MetaData()
jobs = Table(
    "jobs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("state", String(16), nullable=False, index=True),
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
    UniqueConstraint("owner", "idempotency_key"),
)

_OPEN = [JobState.QUEUED.value, JobState.RUNNING.value]
_CHANGING = ("state", "started_at", "finished_at", "starts", "result", "error")
_ADD = insert(jobs).on_conflict_do_nothing(index_elements=["owner", "idempotency_key"])
_SAVE = (
    update(jobs)
    .where(jobs.c.id == bindparam("job_id"), jobs.c.state.in_(_OPEN))
    .values({name: bindparam(name) for name in (*_CHANGING, "webhook_due")})
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "ALTER TABLE jobs ADD COLUMN webhook_due FLOAT",
        "ALTER TABLE jobs ADD COLUMN webhook_tries INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX ix_jobs_webhook_due ON jobs (webhook_due)",
    ),
)
"""SQL that takes version 1 to 2, 2 to 3 and so on; the table above is always the newest."""
VERSION = 1 + len(MIGRATIONS)


class Journal:
    """The table of jobs in one SQLite file."""

    def __init__(self, engine: AsyncEngine):
        self._engine = engine
        self._pending: list[tuple[Any, dict[str, Any], asyncio.Future[int]]] = []
        self._writer: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, file: Path) -> Journal:
        """Open or make the file and bring its schema up to date.

        Raises:
            SetupFailed: not a journal, from a newer version, or not to be written.
        """
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
            event.listen(engine.sync_engine, "connect", _tune)
            async with engine.begin() as connection:
                await _migrate(connection, file)
        except (DBAPIError, OSError, sqlite3.Error) as error:
            cause = getattr(error, "orig", error)
            raise SetupFailed(
                f"the journal {file} cannot be opened: {cause}.",
                hint="Check the folder's rights and space, or move the file away.",
            ) from None
        return cls(engine)

    async def close(self) -> None:
        """Give the file back, once all is written."""
        if self._writer:
            await self._writer
        await self._engine.dispose()

    async def add(self, job: Job) -> Job:
        """Write a new job; the one that is there already if owner and idempotency key are known. Raises `StorageFailed`."""
        if await self._write(_ADD, _row(job)):
            return job
        same = (jobs.c.owner == job.owner) & (jobs.c.idempotency_key == job.idempotency_key)
        return (await self._read(select(jobs).where(same)))[0]

    async def save(self, job: Job) -> bool:
        """Write what changed of a job that is not over in the journal; whether it was so. Raises `StorageFailed`."""
        row = _row(job)
        changed = {name: row[name] for name in _CHANGING}
        changed["webhook_due"] = job.finished_at if job.state.is_final and job.spec.webhook else None
        return await self._write(_SAVE, {**changed, "job_id": job.id}) > 0

    async def get(self, job_id: str) -> Job | None:
        """The job of that id."""
        found = await self._read(select(jobs).where(jobs.c.id == job_id))
        return found[0] if found else None

    async def unfinished(self) -> list[Job]:
        """All jobs that are not over, oldest first."""
        return await self._read(select(jobs).where(jobs.c.state.in_(_OPEN)).order_by(jobs.c.created_at))

    async def list(
        self, owner: str | None = None, state: JobState | None = None, limit: int = 50, before: float | None = None
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

    async def forget(self, finished_before: float) -> int:
        """Remove jobs that were over before a time; how many."""
        return await self._write(
            jobs.delete().where(jobs.c.finished_at < finished_before, jobs.c.webhook_due.is_(None))
        )

    async def owed_webhooks(self, now: float, limit: int) -> list[tuple[Job, int]]:
        """Jobs that are over and whose receiver is to be told by now, with how often that was tried; the longest due first."""
        statement = select(jobs).where(jobs.c.webhook_due <= now).order_by(jobs.c.webhook_due).limit(limit)
        async with self._engine.connect() as connection:
            rows = (await connection.execute(statement)).mappings().all()
        return [(_job(row), int(row["webhook_tries"])) for row in rows]

    async def webhook_told(self, job_id: str, due: float | None, tries: int) -> None:
        """Note a try, and when the next one is due; None: no more. Raises `StorageFailed`."""
        await self._write(update(jobs).where(jobs.c.id == job_id).values(webhook_due=due, webhook_tries=tries))

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
                async with self._engine.begin() as connection:
                    counts = [(await connection.execute(statement, values)).rowcount for statement, values, _ in batch]
            except Exception as error:
                fault = _not_written(error) if isinstance(error, DBAPIError) else error
                for *_, done in batch:
                    if not done.done():
                        done.set_exception(fault)
                continue
            for (*_, done), count in zip(batch, counts, strict=True):
                if not done.done():
                    done.set_result(count)

    async def _read(self, statement: Any) -> list[Job]:
        async with self._engine.connect() as connection:
            return [_job(row) for row in (await connection.execute(statement)).mappings()]


def _not_written(error: DBAPIError) -> StorageFailed:
    hint = "Free some space and check the rights of the file."
    return StorageFailed(f"the journal cannot be written: {error.orig}.", hint=hint)


def _tune(connection: Any, _record: object) -> None:
    """Write-ahead log, and a sync at each commit: an accepted job survives a power cut."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


async def _migrate(connection: AsyncConnection, file: Path) -> None:
    version = int((await connection.execute(text("PRAGMA user_version"))).scalar_one())
    if version > VERSION:
        raise SetupFailed(
            f"the journal {file} is of version {version}; this Alphalayer knows {VERSION}.",
            hint="Update Alphalayer, or move the file away.",
        )
    if version == 0:
        await connection.run_sync(metadata.create_all)
    for step in MIGRATIONS[version - 1 :] if version else ():
        for statement in step:
            await connection.execute(text(statement))
    await connection.execute(text(f"PRAGMA user_version = {VERSION}"))


def _row(job: Job) -> dict[str, Any]:
    row = job.model_dump(
        include={"id", "owner", "idempotency_key", "created_at", "started_at", "finished_at", "starts"}
    )
    return {
        **row,
        "state": job.state.value,
        "spec": job.spec.model_dump_json(),
        "result": job.result.model_dump_json() if job.result else None,
        "error": json.dumps(job.error) if job.error else None,
    }


def _job(row: Any) -> Job:
    fields = {name: each for name, each in row.items() if not name.startswith("webhook_")}
    for name in ("spec", "result", "error"):
        fields[name] = json.loads(fields[name]) if fields[name] else None
    return Job.model_validate(fields)
