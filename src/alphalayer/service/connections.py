"""HTTP connections with limits of size, time and number.

uvicorn and its parsers have no limits of their own: a client could send a head of any size, never
complete a request, never read a response, or open any number of connections.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import httptools
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from alphalayer.api.errors import Problem, render_problem
from alphalayer.api.middleware.hosts import PROBES
from alphalayer.api.middleware.security_headers import add_headers
from alphalayer.observability.logging import log

MAX_HEAD_BYTES = 32_768
"""Largest URL, and largest sum of the headers of a request."""
MAX_HEADERS = 100
MAX_PIPELINED = 8
"""Most requests of a connection that wait for the response before theirs."""
MAX_FRAMING_BYTES = 65_536
"""Bytes by which the chunk headers and trailers of a body may exceed its content."""
MIN_PACE = 4096
"""Bytes per second that a client must send of a body, and read of a response."""
SPARE_CONNECTIONS = 64
"""Connections over the limit, for probes."""
CLOSED_TOGETHER = 32
"""Connections to close at once when there are too many."""
BUSY = Problem.of_status(
    503, "overloaded", "too many connections are open.", hint="Try again in a second."
)
BUSY_HEADERS = {"Retry-After": "1", "Connection": "close"}
_INVALID = Problem.of_status(400, "bad_request", "the request is not valid HTTP/1.1.")
_TOO_SLOW = Problem.of_status(
    408, "request_timeout", "the request did not arrive in time.", hint="Send it again."
)


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of connections.

    Attributes:
        connections: Most connections. Over it, only probes are answered.
        head_s: Seconds in which the head of a request must arrive.
        upload_s: Longest pause of a body. Less than `MIN_PACE` counts as a part of a pause.
        stall_s: Seconds after which a client that does not read is disconnected.
        linger_s: Seconds that the rest of a refused request is read and discarded.
        interval_s: Seconds between two checks of all connections.
    """

    connections: int = 2000
    head_s: float = 10
    upload_s: float = 120
    stall_s: float = 30
    linger_s: float = 10
    interval_s: float = 1


class _Phase(Enum):
    """Part of a request that a connection expects next."""

    IDLE = 0
    HEAD = 1
    BODY = 2


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol on httptools, with the limits of this module.

    Args:
        limits: The limits.
        busy: Application that answers when there are too many connections.
        arguments: Arguments of uvicorn.
    """

    parser: Any  # None after the connection is closed

    def __init__(self, *, limits: ConnectionLimits, busy: ASGIApp, **arguments: Any):
        super().__init__(**arguments)
        self._limits, self._busy, self._normal_app = limits, busy, self.app
        self._phase, self._since = _Phase.HEAD, self.loop.time()
        self._has_begun = False
        self._is_over = False  # no further request is read
        self._is_spare = False
        self._refusal = _INVALID
        self._head_bytes = self._body_bytes = 0
        self._fed_bytes = 0  # of the current phase, after its first read
        self._raw_bytes = 0  # that a body after an ignored upgrade lacks
        self._write_mark: tuple[float, int] | None = None
        self._cycles: list[RequestResponseCycle] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Add the connection. If there are too many, close others or this one."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify all requests of the connection, not only the newest one."""
        self.pipeline.clear()
        for cycle in self._unfinished():
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse data. Check what the parser holds back until it is complete."""
        if self._raw_bytes:
            self._receive_raw(data)
        if self._is_over:
            return
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.HEAD)
            self._has_begun = False
        self._fed_bytes += len(data)
        try:
            self.parser.feed_data(data)
            self._check_fed()
        except httptools.HttpParserUpgrade as upgrade:
            # answered as if no other protocol was requested
            self.cycle.keep_alive = False
            self._is_over = True
            self._receive_raw(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._send_refusal()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._enter(_Phase.HEAD)
        self._has_begun = True
        self._head_bytes = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Add a part of the URL."""
        super().on_url(url)
        if len(self.url) > MAX_HEAD_BYTES:
            self._refuse(414, "uri_too_long", f"the URL is longer than {MAX_HEAD_BYTES} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header. Trailers, which follow the body, are ignored."""
        if self._phase is _Phase.BODY:
            return
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse_headers()

    def on_headers_complete(self) -> None:
        """Start or queue a request."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._refuse(505, "http_version", f"HTTP {version} is not supported. Use HTTP/1.1.")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (version == "1.1" and not hosts):
            self._refuse(400, "bad_request", f"the request has {hosts} Host headers; send one.")
        self._cycles = self._unfinished()
        if len(self._cycles) > MAX_PIPELINED:
            self._refuse(400, "bad_request", "too many requests are pipelined.")
        is_refused = self._is_spare and self.url.partition(b"?")[0].decode("latin-1") not in PROBES
        self.app = cast(Any, self._busy if is_refused else self._normal_app)
        super().on_headers_complete()
        self._cycles.append(self.cycle)
        self._enter(_Phase.BODY)

    def on_body(self, body: bytes) -> None:
        """Add a part of the body."""
        self._body_bytes += len(body)
        if not self._is_answered():
            self._since = min(self._since + len(body) / MIN_PACE, self.loop.time())
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request, unless the parser left out its body.

        It does so if the request names another protocol, which is ignored.
        """
        if self.parser.should_upgrade():
            length = dict(self.headers).get(b"content-length", b"0")
            self._raw_bytes = int(length) if length.isdigit() else 0
        if not self._raw_bytes:
            self._enter(_Phase.IDLE)
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the next request of the connection."""
        super().on_response_complete()
        self._since = self.loop.time()

    def resume_writing(self) -> None:
        """Continue a response, because the client has read."""
        super().resume_writing()
        self._write_mark = None

    def enforce(self, now: float) -> None:
        """Close the connection if its client is too slow.

        Args:
            now: Time of the event loop.
        """
        if self._is_stalled(now):
            self.transport.abort()
        elif self.flow.read_paused:
            self._since = now  # the service does not read, so the client cannot send
        elif now - self._since > self._allowed_s():
            if self._is_over or not self._has_begun or self._is_answered():
                self.transport.close()
            else:
                self._refusal = _TOO_SLOW
                self._send_refusal()

    @property
    def is_waiting(self) -> bool:
        """Return whether the connection is open and no request of it is complete."""
        is_body = self._phase is _Phase.BODY and not self._is_over
        return not (is_body or self.transport.is_closing() or self._unfinished())

    @property
    def rank(self) -> tuple[bool, float]:
        """Return the rank in which waiting connections are closed, the lowest first."""
        return self._phase is _Phase.IDLE, self._since

    def _allowed_s(self) -> float:
        """Return how long the connection may remain as it is."""
        if self._phase is _Phase.HEAD and not self._is_over:
            return self._limits.head_s
        is_read = self._raw_bytes or not self._is_over
        if self._phase is _Phase.BODY and is_read and not self._is_answered():
            return self._limits.upload_s
        if self._unfinished() or not (self._is_over or self._phase is _Phase.BODY):
            return float("inf")  # it generates, or is idle, which uvicorn limits
        return self._limits.linger_s

    def _is_answered(self) -> bool:
        """Return whether the newest request was answered before its body arrived."""
        return self._phase is _Phase.BODY and self.cycle.response_complete

    def _is_stalled(self, now: float) -> bool:
        """Return whether the client reads more slowly than allowed."""
        size = self.transport.get_write_buffer_size()
        if not size or self._write_mark is None:
            self._write_mark = (now, size) if size else None
            return False
        start, size_before = self._write_mark
        if now - start < self._limits.stall_s:
            return False
        self._write_mark = (now, size)
        return size_before - size < MIN_PACE * (now - start)

    def _enter(self, phase: _Phase) -> None:
        self._phase, self._since, self._fed_bytes = phase, self.loop.time(), 0

    def _unfinished(self) -> list[RequestResponseCycle]:
        """Return the requests without a complete response, oldest first."""
        return [
            cycle
            for cycle in self._cycles
            if not cycle.response_complete and not cycle.disconnected
        ]

    def _receive_raw(self, data: bytes) -> None:
        """Receive a part of a body that the parser left out."""
        body = data[: self._raw_bytes]
        self._raw_bytes -= len(body)
        if body:
            self.on_body(body)
        if not self._raw_bytes and self._phase is _Phase.BODY:
            self._enter(_Phase.IDLE)
            super().on_message_complete()

    def _check_fed(self) -> None:
        if self._phase is _Phase.HEAD and self._fed_bytes > 2 * MAX_HEAD_BYTES:
            self._refuse_headers()
        if self._phase is _Phase.BODY and (
            self._fed_bytes > MAX_FRAMING_BYTES + 2 * self._body_bytes
        ):
            self._refuse(400, "bad_request", "the chunks of the body are too small.")

    def _refuse_headers(self) -> None:
        self._refuse(
            431,
            "headers_too_large",
            f"the headers are more than {MAX_HEADERS} or {MAX_HEAD_BYTES} bytes.",
        )

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """Stop the parser, which then reports an error.

        Raises:
            HttpParserError: Always.
        """
        self._refusal = Problem.of_status(status, code, detail)
        raise httptools.HttpParserError(detail)

    def _send_refusal(self) -> None:
        """Answer an invalid request after the requests before it, then close."""
        self._is_over = True
        unfinished = self._unfinished()
        if self._phase is _Phase.BODY and self.cycle in unfinished:
            # its application must not wait for the rest
            unfinished.pop()
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.pipeline = type(self.pipeline)(
                pair for pair in self.pipeline if pair[0] is not self.cycle
            )
            if self.cycle.response_started and not unfinished:
                self.transport.close()
                return
        if unfinished:
            unfinished[-1].keep_alive = False
            return
        self._enter(_Phase.IDLE)
        self.transport.write(_as_response(self._refusal))
        if self.transport.can_write_eof():
            # closed a little later: a client that still sends could not read the response
            self.transport.write_eof()
        else:
            self.transport.close()

    def _make_room(self) -> None:
        """Close connections that wait, idle ones last.

        A client that opens many connections must not end those that others keep alive.
        Without any that waits, this one is spare, or closed.
        """
        others = [
            connection
            for connection in cast(Iterable[LimitedProtocol], self.connections)
            if not connection.transport.is_closing() and connection is not self
        ]
        waiting = [connection for connection in others if connection.is_waiting]
        closed = heapq.nsmallest(CLOSED_TOGETHER, waiting, key=lambda waits: waits.rank)
        for connection in closed:
            connection.transport.abort()
        kept = len(others) - len(closed)
        self._is_spare = kept >= self._limits.connections
        if kept >= self._limits.connections + SPARE_CONNECTIONS:
            self.transport.abort()


async def enforce_limits(connections: Iterable[Any], limits: ConnectionLimits) -> None:
    """Check all connections, again and again."""
    loop, was_full = asyncio.get_running_loop(), False
    while True:
        await asyncio.sleep(limits.interval_s)
        current = cast(list[LimitedProtocol], list(connections))
        is_full = len(current) > limits.connections
        if is_full and not was_full:
            log.warning("connections.full", open=len(current), limit=limits.connections)
        was_full = is_full
        for number, connection in enumerate(current):
            connection.enforce(loop.time())
            if number % CLOSED_TOGETHER == 0:
                await asyncio.sleep(0)  # a crowd of refusals must not delay requests


def _as_response(problem: Problem) -> bytes:
    """Return a problem as an HTTP response after which the connection is closed."""
    response = render_problem(problem, {"Connection": "close"})
    add_headers(response.headers, problem.status)
    status = b"HTTP/1.1 %d %s" % (problem.status, problem.title.encode())
    headers = [b"%s: %s" % pair for pair in response.raw_headers]
    return b"\r\n".join([status, *headers, b"", bytes(response.body)])
