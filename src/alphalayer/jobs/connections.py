"""Connections to PostgreSQL with time limits.

asyncpg parses the address, for example with `?sslmode=require`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import Connection, Executable
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.sql.expression import UpdateBase

from alphalayer.jobs.databases import Statement

CONNECT_S = 10
STATEMENT_S = 20.0
"""Seconds after which a statement without a response has failed."""
POOL_SIZE, POOL_WAIT_S = 5, 10.0
"""Maximum number of connections, and the seconds to wait for a free one."""


async def connect(url: str, statement_s: float | None = None) -> Any:
    """Return a new asyncpg connection.

    Args:
        url: Address of the database.
        statement_s: Time limit of each statement in seconds. None: no limit.

    Raises:
        ConnectionError: The connection cannot be made, for whatever reason.
    """
    try:
        return await asyncpg.connect(url, timeout=CONNECT_S, command_timeout=statement_s)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncio.TimeoutError) as error:
        raise ConnectionError(str(error) or f"no response for {CONNECT_S} seconds") from error
    except ValueError:
        # the error quotes the port, which may be a piece of the password
        raise ConnectionError(
            "its address cannot be read. Write postgresql://user:password@host:port/database, "
            "with % codes for / : @ ? #"
        ) from None


def create_engine(url: str, statement_s: float | None = None) -> AsyncEngine:
    """Return an engine whose statements have a time limit; see `connect`."""
    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=partial(connect, url, statement_s),
        pool_pre_ping=True,
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_timeout=POOL_WAIT_S,
        hide_parameters=True,
    )


class PostgresDatabase:
    """Implementation of `alphalayer.jobs.databases.Database` on a PostgreSQL server."""

    name = "postgresql"

    def __init__(self, url: str):
        self._url = url
        self.engine: AsyncEngine = create_engine(url, STATEMENT_S)

    def prepare(self, statement: UpdateBase) -> Executable | str:
        """Return the statement as it is; see the protocol."""
        return statement

    async def migrate(self, migrate: Callable[[Connection], None]) -> None:
        """Call a function in a transaction without a time limit; see the protocol."""
        engine = create_engine(self._url)
        try:
            async with engine.begin() as connection:
                await connection.run_sync(migrate)
        finally:
            await engine.dispose()

    async def commit(self, statements: Sequence[Statement]) -> list[int]:
        """Run statements in one transaction; see the protocol."""
        async with self.engine.begin() as connection:
            return [
                (await connection.execute(statement, values)).rowcount
                for statement, values in statements
                if not isinstance(statement, str)
            ]

    async def rows(self, statement: Any) -> Sequence[Any]:
        """Run a statement in a transaction; see the protocol."""
        async with self.engine.begin() as connection:
            return (await connection.execute(statement)).mappings().all()

    async def close(self) -> None:
        """Close all connections."""
        await self.engine.dispose()
