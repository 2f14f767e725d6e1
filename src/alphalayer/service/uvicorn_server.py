"""The HTTP server: uvicorn, which tells the application at once that it is to end, not only once every connection is closed."""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import Any

import uvicorn

KEEP_ALIVE_S = 75
"""Longer than proxies keep idle connections (Nginx: 60 s): who closes first must be the one that sends the next request."""
ANSWER_S = 5
"""After the deadline of the jobs, time to send those who waited their answer."""
FAILED = 3
"""Exit code when the application did not start, as uvicorn's own."""


class Server(uvicorn.Server):
    """Serves an application that has an `alphalayer.api.shutdown.Shutdown` in its state."""

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
        """Let the service end, then the connections."""
        self._app.state.shutdown.begin()
        await super().shutdown(sockets)


def serve(server: Server) -> None:
    """Serve until a signal; ends the process if the application cannot start."""
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(FAILED)
