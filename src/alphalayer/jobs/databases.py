"""Database of the journal: the interface, and the SQLite file.

`alphalayer.jobs.connections` has PostgreSQL, whose packages are an extra.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Connection, Executable, create_engine, event
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import URL
from sqlalchemy.sql.expression import UpdateBase

from alphalayer.jobs.journal_file import JournalFile

Statement = tuple[Executable | str, dict[str, Any]]
"""A statement, as it is or prepared, and the values of its parameters."""


class Database(Protocol):
    """Database with one table of jobs."""

    name: str
    """Name of its dialect: "sqlite" or "postgresql"."""

    def prepare(self, statement: UpdateBase) -> Executable | str:
        """Return a statement for `commit` in the form that costs least to run."""
        ...

    async def migrate(self, migrate: Callable[[Connection], None]) -> None:
        """Call a function in a transaction without a time limit."""
        ...

    async def commit(self, statements: Sequence[Statement]) -> list[int]:
        """Run statements in one transaction. Return the number of rows that each changed."""
        ...

    async def rows(self, statement: Any) -> Sequence[Any]:
        """Run a statement in a transaction. Return its rows as mappings."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class SqliteDatabase:
    """SQLite file. One thread writes and another one reads, so that no read waits for a sync.

    A transaction is one call in a thread. The asynchronous driver needs six for the same, which
    cost more than the database itself.
    """

    name = "sqlite"

    def __init__(self, file: Path):
        """Open an existing file. The mode keeps SQLite from creating one that was removed."""
        url = URL.create(
            "sqlite", database=file.absolute().as_uri(), query={"mode": "rw", "uri": "true"}
        )
        self._engine = create_engine(url, hide_parameters=True)
        event.listen(self._engine, "connect", _configure)
        self._file = JournalFile(file)
        self.on_removed: Callable[[], object] = lambda: None
        """Function that is called before a removed file is restored."""
        self._connection: Connection | None = None
        """Connection of the thread that writes."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="journal-read")

    def prepare(self, statement: UpdateBase) -> Executable | str:
        """Return the SQL of a statement. It runs in half the time of the statement."""
        return str(statement.compile(dialect=sqlite.dialect(paramstyle="named")))

    async def migrate(self, migrate: Callable[[Connection], None]) -> None:
        """Call a function in a transaction; see the protocol."""

        def run() -> None:
            self._connection = self._engine.connect()
            with self._connection.begin():
                migrate(self._connection)

        await asyncio.get_running_loop().run_in_executor(self._writer, run)

    async def commit(self, statements: Sequence[Statement]) -> list[int]:
        """Run statements in one transaction; see the protocol."""
        return await asyncio.get_running_loop().run_in_executor(
            self._writer, self._commit, statements
        )

    def _commit(self, statements: Sequence[Statement]) -> list[int]:
        if self._connection and not self._file.is_in_place:
            self._restore(self._connection)
        self._connection = self._connection or self._engine.connect()
        with self._connection.begin():
            driver = self._connection.connection.cursor()
            return [
                (
                    driver.execute(statement, values)
                    if isinstance(statement, str)
                    else self._connection.execute(statement, values)
                ).rowcount
                for statement, values in statements
            ]

    def _restore(self, connection: Connection) -> None:
        """Write a removed file again and open it. Raises `OSError`, `sqlite3.Error`."""
        self.on_removed()
        driver: Any = connection.connection.driver_connection
        self._file.restore(driver)
        connection.close()
        self._connection = None
        self._engine.dispose()

    async def rows(self, statement: Any) -> Sequence[Any]:
        """Run a statement in a transaction; see the protocol."""

        def run() -> Sequence[Any]:
            with self._engine.begin() as connection:
                return connection.execute(statement).mappings().all()

        return await asyncio.get_running_loop().run_in_executor(self._reader, run)

    async def close(self) -> None:
        """Close all connections and end the threads."""
        for executor in (self._writer, self._reader):
            await asyncio.to_thread(executor.shutdown)
        if self._connection:
            self._connection.close()
        self._engine.dispose()


def _configure(connection: Any, _record: object) -> None:
    """Set a write-ahead log and a sync at each commit: jobs survive a power cut."""
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
