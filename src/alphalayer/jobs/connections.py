"""Connections to PostgreSQL with time limits.

asyncpg parses the address, for example with `?sslmode=require`.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

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
