"""Admission of clients, before anything of a request's body is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as RequestScope

from alphalayer.api.request_body import (
    JSON_BYTES,
    JsonRequest,
    LimitedRoute,
    check_declared,
    count_received,
)
from alphalayer.auth.api_keys import Scope

EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True)
class Admitted:
    """Dependency of a route whose clients need a key. Its value is the name of the client.

    Where a router and its endpoint both have one, that of the endpoint counts. A router states
    its own: a route does not know the dependencies of `include_router`.
    """

    scope: Scope
    """Scope that the key needs."""
    is_work: bool = False
    """Whether the request counts as a submission or conversion in the rate of the key."""

    async def __call__(self, request: Request) -> str:
        """Return the name of the client, "" if the service has no keys."""
        return request.state.client


Reader = Annotated[str, Depends(Admitted("read"))]
"""Name of a client that reads."""
Converter = Annotated[str, Depends(Admitted("read", is_work=True))]
"""Name of a client that has the service decode or encode images."""
Generator = Annotated[str, Depends(Admitted("generate"))]
"""Name of a client that changes its own jobs or options."""
Submitter = Annotated[str, Depends(Admitted("generate", is_work=True))]
"""Name of a client that submits a job."""


class GuardedRoute(LimitedRoute):
    """Route that admits its client first.

    FastAPI reads and parses the body before it calls dependencies. A client without a key could
    thus make the service parse any body.
    """

    @property
    def admission(self) -> Admitted | None:
        """Return what the route requires of its clients; None: it is open to all."""
        calls = [call for call in _calls(self.dependant) if isinstance(call, Admitted)]
        return calls[-1] if calls else None

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route, with the admission before it."""
        handle, admission = super().get_route_handler(), self.admission
        if admission is None:
            return handle

        async def admit_first(request: Request) -> Response:
            authenticator = request.app.state.service.authenticator
            key = authenticator.admit(request, admission.scope, is_work=admission.is_work)
            request.state.client = key.name if key else ""
            response = await handle(request)
            # other answers end by themselves, and half of one would look complete
            is_endless = response.media_type == EVENT_STREAM
            if key and is_endless and isinstance(response, StreamingResponse):
                response.body_iterator = authenticator.while_accepted(
                    key, admission.scope, response.body_iterator
                )
            return response

        return admit_first


class GuardedApp:
    """ASGI application that admits its clients first and gets bodies within the limits of JSON.

    Args:
        app: The application. Its bodies are JSON without images.
        scope: Scope that every request needs.
    """

    def __init__(self, app: ASGIApp, scope: Scope):
        self._app = app
        self._scope: Scope = scope

    async def __call__(self, scope: RequestScope, receive: Receive, send: Send) -> None:
        """Forward an admitted request with its whole body.

        Raises:
            AlphalayerError: The client is not admitted, see `Authenticator.admit`.
            HTTPException: The body is beyond a limit.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = JsonRequest(scope, count_received(receive, JSON_BYTES))
        scope["app"].state.service.authenticator.admit(request, self._scope)
        check_declared(scope, JSON_BYTES)
        body = await request.body()
        with contextlib.suppress(ValueError):  # the application answers what is not JSON
            await request.json()
        messages: list[Message] = [{"type": "http.request", "body": body}]

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, receive_again, send)


def _calls(dependant: Dependant) -> Iterator[object]:
    """Yield all dependencies: the router's first, then the endpoint's."""
    for part in dependant.dependencies:
        yield part.call
        yield from _calls(part)
