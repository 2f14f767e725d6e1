"""Time and number of connections, without a network and with a clock of their own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs
from uvicorn import Config
from uvicorn.server import ServerState

from alphalayer.service import uvicorn_server
from alphalayer.service.connections import MIN_PACE, ConnectionLimits, LimitedProtocol

LIMITS = ConnectionLimits(connections=3, upload_s=10)
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


class Clock:
    """The running event loop, with a time that tests set."""

    def __init__(self):
        self.now = 0.0

    def time(self) -> float:
        """Return the time of the test."""
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio.get_running_loop(), name)


class Transport(asyncio.Transport):
    """A connection of a client that reads everything."""

    def __init__(self):
        super().__init__()
        self.sent = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def answer_whole_body(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request after its body, without one at once."""
    while scope["method"] == "POST" and (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def connect(clock: Clock) -> Callable[[], LimitedProtocol]:
    """Return a function that opens a connection of one server."""
    config, state = Config(answer_whole_body, log_config=None), ServerState()

    def open_connection() -> LimitedProtocol:
        connection = LimitedProtocol(
            limits=LIMITS,
            busy=answer_whole_body,
            config=config,
            server_state=state,
            app_state={},
            _loop=clock,
        )
        connection.connection_made(Transport())
        return connection

    return open_connection


def upload(connection: LimitedProtocol, clock: Clock, sizes: list[int], pause_s: float) -> bool:
    """Send the parts of a body with pauses. Return whether the connection stays open."""
    connection.data_received(POST)
    for size in sizes:
        clock.now += pause_s
        connection.enforce(clock.now)
        connection.data_received(b"%x\r\n%s\r\n" % (size, bytes(size)))
    return not connection.transport.is_closing()


async def test_slow_upload_at_pace_may_take_longer_than_a_pause(
    connect: Callable[[], LimitedProtocol], clock: Clock
):
    assert upload(connect(), clock, [10 * MIN_PACE] * 5, 9)
    assert upload(connect(), clock, [MIN_PACE + 1] * 100, 1)


async def test_upload_below_pace_or_after_a_pause_is_closed(
    connect: Callable[[], LimitedProtocol], clock: Clock
):
    below_pace, paused = connect(), connect()
    assert not upload(below_pace, clock, [MIN_PACE // 2] * 25, 1)
    assert below_pace.transport.sent.startswith(b"HTTP/1.1 408 ")  # type: ignore[attr-defined]
    # what was sent before does not lengthen the pause
    assert not upload(paused, clock, [1_000_000, 1], 11)


async def test_rest_of_an_answered_body_does_not_keep_a_connection(
    connect: Callable[[], LimitedProtocol], clock: Clock
):
    connection = connect()
    connection.data_received(POST)
    connection.cycle.response_complete = True
    for _ in range(15):
        clock.now += 1
        connection.data_received(b"%x\r\n%s\r\n" % (MIN_PACE * 2, bytes(MIN_PACE * 2)))
        connection.enforce(clock.now)
    assert connection.transport.is_closing()


async def test_half_sent_requests_are_closed_before_idle_connections(
    connect: Callable[[], LimitedProtocol], clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("alphalayer.service.connections.CLOSED_TOGETHER", 1)
    idle = connect()
    idle.data_received(LIVEZ)
    await asyncio.gather(*idle.tasks)
    assert idle.transport.sent.startswith(b"HTTP/1.1 200 ")  # type: ignore[attr-defined]
    opened: list[LimitedProtocol] = []
    for seconds in range(1, 6):
        clock.now = float(seconds)
        opened.append(connect())
        opened[-1].data_received(LIVEZ[:-2])
    assert not idle.transport.is_closing()
    assert [connection.transport.is_closing() for connection in opened] == [True] * 3 + [False] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="sockets are not files there")
@pytest.mark.parametrize(
    ("soft", "hard", "highest", "requested", "connections"),
    [
        (1024, 500_000, 500_000, 2000, 2000),
        (1024, 500_000, 500_000, 100_000, 100_000),
        (256, -1, 12_000, 2000, 2000),
        (256, -1, 12_000, 20_000, 9920),
        (256, -1, 5000, 20_000, 3776),
        (256, -1, 256, 2000, 64),
        (256, 256, 256, 20, 20),
        (-1, -1, 256, 2000, 2000),
    ],
    ids=["linux", "many", "macos", "macos many", "macos low", "fixed", "few", "unlimited"],
)
def test_connections_fit_the_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch,
    soft: int,
    hard: int,
    highest: int,
    requested: int,
    connections: int,
):
    """Refuse soft limits over `highest`, as macOS does below the hard limit."""
    import resource

    def set_limit(_kind: int, limits: tuple[int, int]) -> None:
        if not 0 <= limits[0] <= highest:
            raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(resource, "getrlimit", {resource.RLIMIT_NOFILE: (soft, hard)}.get)
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    with capture_logs() as lines:
        assert uvicorn_server.fit_files(requested) == connections
    assert [line["limit"] for line in lines] == [connections] * (connections < requested)
