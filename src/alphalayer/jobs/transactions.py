"""One transaction over the table of jobs and PgQueuer's queue, so that both tell the same."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

import asyncpg
from pgqueuer import Queries
from sqlalchemy import func, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from alphalayer.jobs.table import UNREACHABLE, Journal

SILENT_S = 15
"""A transaction in which nothing is said for so long is ended by the server: whoever was cut off in it would keep rows locked."""
SLOW_S = 3.0
"""A transaction that takes so long to begin shows that the database was not there for others either."""


class Transactions:
    """Called, it begins a transaction. Remembers when that went wrong last; a new one has not seen it go well yet."""

    def __init__(self, journal: Journal):
        self._journal = journal
        self._trouble_at = time.monotonic()

    @property
    def well_for_s(self) -> float:
        """Seconds for which the database was there whenever it was asked."""
        return time.monotonic() - self._trouble_at

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncGenerator[tuple[AsyncConnection, Queries]]:
        """A connection and PgQueuer's queries on it; committed at the end. Raises `StorageFailed`."""
        asked_at = time.monotonic()
        try:
            async with self._journal.engine.begin() as connection:
                # goes first: the driver's own statements, which PgQueuer uses, do not open a transaction
                await connection.execute(
                    select(
                        func.set_config(
                            "idle_in_transaction_session_timeout", f"{SILENT_S}s", true()
                        )
                    )
                )
                raw: Any = (await connection.get_raw_connection()).driver_connection
                if time.monotonic() - asked_at > SLOW_S:
                    self._trouble_at = time.monotonic()
                yield connection, Queries.from_asyncpg_connection(raw)
        except (*UNREACHABLE, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            self._trouble_at = time.monotonic()
            raise self._journal.fault(error) from None
