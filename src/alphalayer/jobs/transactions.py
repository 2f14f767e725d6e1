"""Transactions over the table of jobs and PgQueuer's queue together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

import asyncpg
from pgqueuer import Queries
from sqlalchemy import func, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from alphalayer.jobs.connections import PostgresDatabase
from alphalayer.jobs.table import UNREACHABLE, Journal

IDLE_S = 15
"""Seconds without a statement after which the server ends a transaction.

Without a limit, a worker that was cut off would keep rows locked.
"""
SLOW_S = 3.0
"""Seconds for the start of a transaction that count as an outage of the database."""


class Transactions:
    """Callable that begins a transaction, with the time of the last outage.

    The creation counts as an outage, because no transaction has succeeded yet.
    """

    def __init__(self, journal: Journal):
        assert isinstance(journal.database, PostgresDatabase)
        self._journal = journal
        self._engine = journal.database.engine
        self._outage_at = time.monotonic()

    @property
    def healthy_s(self) -> float:
        """Return the seconds since the last outage."""
        return time.monotonic() - self._outage_at

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncGenerator[tuple[AsyncConnection, Queries]]:
        """Yield a connection and PgQueuer's queries on it. Commit at the end.

        Raises:
            StorageFailed: The database cannot be reached.
        """
        began_at = time.monotonic()
        try:
            async with self._engine.begin() as connection:
                # comes first, as the driver's statements of PgQueuer open no transaction
                await connection.execute(
                    select(
                        func.set_config("idle_in_transaction_session_timeout", f"{IDLE_S}s", true())
                    )
                )
                raw: Any = (await connection.get_raw_connection()).driver_connection
                if time.monotonic() - began_at > SLOW_S:
                    self._outage_at = time.monotonic()
                yield connection, Queries.from_asyncpg_connection(raw)
        except (*UNREACHABLE, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            self._outage_at = time.monotonic()
            raise self._journal.to_storage_error(error) from None
