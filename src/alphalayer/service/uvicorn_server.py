"""HTTP server: uvicorn with an early shutdown notice to the application."""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import Any

import uvicorn

KEEP_ALIVE_S = 75
"""Longer than proxies keep idle connections (Nginx: 60 s).

If the server closed first, the proxy could send a request on a closed connection.
"""
ANSWER_S = 5
"""Seconds after the deadline of the jobs to send the last responses."""
FAILED = 3
"""Exit code after a failed start, the same as uvicorn's."""


class Server(uvicorn.Server):
    """Server of an application with an `alphalayer.api.shutdown.Shutdown` in its state.

    The application learns of the shutdown at once, and not after its connections are closed.
    """

    def __init__(self, app: Any, *, host: str = "127.0.0.1", port: int, drain_s: int):
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            lifespan="on",
            log_config=None,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=drain_s + ANSWER_S,
        )
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin the shutdown of the service, then close the connections."""
        self._app.state.shutdown.begin()
        await super().shutdown(sockets)


def serve(server: Server) -> None:
    """Serve until a signal. Exit the process if the application cannot start."""
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(FAILED)
