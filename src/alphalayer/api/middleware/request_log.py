"""One log line a request, and an id that stands in every line written on its way and in the answer's `X-Request-ID`.

What nobody foresaw ends here, so that it is logged once, with the id, and answered with it.
"""

from __future__ import annotations

import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from alphalayer.api import errors
from alphalayer.observability.logging import log

HEADER = "X-Request-ID"
_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
_WATCHING = re.compile(r".*/(livez|readyz|ping|metrics|sdapi/v1/progress|alpha/v1/jobs/[0-9a-f]+)")
"""What is asked again and again."""


class RequestLog:
    """ASGI middleware. A client's own `X-Request-ID` is kept if it is a plain word; probes and polls are logged at
    debug level."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the request its id and log how it was answered."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(8)
        start, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with bound_contextvars(request=request_id):
            try:
                await self._app(scope, receive, answer)
            except Exception as error:
                log.error("request.failed", path=scope["path"], exc_info=error)
                if not status:
                    await errors.internal_error(scope["path"])(scope, receive, answer)
            finally:
                is_watching = scope["method"] == "GET" and _WATCHING.fullmatch(scope["path"])
                level = log.debug if is_watching else log.info
                seconds = round(time.perf_counter() - start, 4)
                level(
                    "request.completed",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    seconds=seconds,
                )
