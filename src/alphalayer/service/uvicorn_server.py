"""HTTP server: uvicorn with an early shutdown notice to the application."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from dataclasses import replace
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import Receive, Scope, Send

from alphalayer.api.errors import find_renderer
from alphalayer.api.middleware.security_headers import SecurityHeaders
from alphalayer.observability.logging import log
from alphalayer.service.connections import (
    BUSY,
    BUSY_HEADERS,
    SPARE_CONNECTIONS,
    ConnectionLimits,
    LimitedProtocol,
    enforce_limits,
)

KEEP_ALIVE_S = 75
"""Longer than proxies keep idle connections (Nginx: 60 s).

If the server closed first, the proxy could send a request on a closed connection.
"""
ANSWER_S = 5
"""Seconds after the deadline of the jobs to send the last responses."""
OTHER_FILES = 256
"""Open files besides connections: engines, database, images."""
MIN_CONNECTIONS = 64
"""Connections to accept even if the limit of open files seems too low for them."""
FILE_LIMITS = (65_536, 10_240, 4096)
"""Limits of open files to try. macOS refuses what is over its own limit (10,240 by default)."""
FAILED = 3
"""Exit code after a failed start, the same as uvicorn's."""


class Server(uvicorn.Server):
    """Server of an application with an `alphalayer.api.shutdown.Shutdown` in its state.

    The application learns of the shutdown at once, and not after its connections are closed.
    """

    def __init__(
        self,
        app: Any,
        *,
        host: str = "127.0.0.1",
        port: int,
        drain_s: int,
        limits: ConnectionLimits = ConnectionLimits(),
    ):
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            lifespan="on",
            http="httptools",
            ws="none",
            log_config=None,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=drain_s + ANSWER_S,
        )
        super().__init__(config)
        self._app = app
        self._limits = limits

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application and listen, with limits of the connections."""
        limits = replace(self._limits, connections=fit_files(self._limits.connections))
        protocol = partial(LimitedProtocol, limits=limits, busy=SecurityHeaders(self._answer_busy))
        self.config.http_protocol_class = cast(Any, protocol)
        await super().startup(sockets)
        self._checks = asyncio.create_task(enforce_limits(self.server_state.connections, limits))

    async def _answer_busy(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 503 in the form of the dialect."""
        scope["app"] = self._app
        await find_renderer(scope)(BUSY, BUSY_HEADERS)(scope, receive, send)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin the shutdown of the service, then close the connections."""
        self._app.state.shutdown.begin()
        await super().shutdown(sockets)


def fit_files(connections: int) -> int:
    """Return how many connections the limit of open files allows.

    Args:
        connections: Most connections.
    """
    if sys.platform == "win32":
        return connections  # sockets are not files there
    others = OTHER_FILES + SPARE_CONNECTIONS
    fitting = max(MIN_CONNECTIONS, _raise_file_limit(connections + others) - others)
    if fitting >= connections:
        return connections
    hint = "Raise the limit of open files (ulimit -n), or lower max_connections."
    log.warning("connections.limited", limit=fitting, max_connections=connections, hint=hint)
    return fitting


def _raise_file_limit(needed: int) -> int:
    """Raise the limit of open files, if possible to `needed`, and return it."""
    import resource

    unlimited = resource.RLIM_INFINITY
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    current, allowed = (sys.maxsize if limit == unlimited else limit for limit in (soft, hard))
    for limit in (max(needed, FILE_LIMITS[0]), *FILE_LIMITS[1:]):
        raised = min(limit, allowed)
        if raised <= current:
            break
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            return raised
    return current


def serve(server: Server) -> None:
    """Serve until a signal. Exit the process if the application cannot start."""
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(FAILED)
