"""One log line for each request, and a request id in all lines and in `X-Request-ID`.

Unexpected exceptions are caught here: logged once and answered, both with the id.
"""

from __future__ import annotations

import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from alphalayer.api.errors import INTERNAL_ERROR, find_renderer
from alphalayer.api.middleware.hosts import PROBES
from alphalayer.observability.logging import log

HEADER = "X-Request-ID"
_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
_POLLED = re.compile(
    rf".*({'|'.join(PROBES)}|/metrics|/sdapi/v1/progress|/alpha/v1/jobs/[0-9a-f]+)"
)
"""Paths that clients poll."""


class RequestLog:
    """ASGI middleware that logs requests.

    It keeps a client's `X-Request-ID` that is a plain word. Probes and polls have level debug.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request with its id and log the response."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        sent_id = Headers(scope=scope).get(HEADER, "")
        request_id = sent_id if _ID.fullmatch(sent_id) else secrets.token_hex(8)
        render_error = find_renderer(scope)
        start, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with bound_contextvars(request=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:
                log.error("request.failed", path=scope["path"], exc_info=error)
                if not status:
                    response = render_error(INTERNAL_ERROR, {})
                    await response(scope, receive, send_with_id)
            finally:
                is_poll = scope["method"] == "GET" and _POLLED.fullmatch(scope["path"])
                level = log.debug if is_poll else log.info
                seconds = round(time.perf_counter() - start, 4)
                level(
                    "request.completed",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    seconds=seconds,
                )
