"""Connections to PostgreSQL, made in one way for all: an address means the same everywhere, and nobody waits for ever.

What may stand in an address is asyncpg's to say: `?sslmode=require` and what else PostgreSQL's own programs know.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

CONNECT_S = 10
ANSWER_S = 20.0
"""A statement without answer for so long has failed: the server hangs, or nobody is at the other end."""
PLACES, PLACE_S = 5, 10.0
"""Connections at most, each for one transaction at a time, and how long to wait for one when all are at work."""


async def connect(url: str, answer_s: float | None = None) -> Any:
    """An asyncpg connection. Raises `ConnectionError`, whatever the reason is why there is none."""
    try:
        return await asyncpg.connect(url, timeout=CONNECT_S, command_timeout=answer_s)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncio.TimeoutError) as error:
        raise ConnectionError(str(error) or f"no answer for {CONNECT_S} seconds") from error
    except ValueError:
        # the error quotes what stands in the place of the port, which may be a piece of the password
        reason = "its address cannot be read; write postgresql://user:password@host:port/database, with % codes for / : @ ? #"
        raise ConnectionError(reason) from None


def create_engine(url: str, answer_s: float | None = None) -> AsyncEngine:
    """An engine for statements that may take `answer_s` seconds each; without it, as long as they like."""
    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=partial(connect, url, answer_s),
        pool_pre_ping=True,
        pool_size=PLACES,
        max_overflow=0,
        pool_timeout=PLACE_S,
        hide_parameters=True,
    )
