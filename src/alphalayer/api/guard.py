"""Admission of clients, before anything of a request's body is read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute


@dataclass(frozen=True)
class Admitted:
    """Dependency of a route whose clients need a key. Its value is the name of the client."""

    async def __call__(self, request: Request) -> str:
        """Return the name of the client, "" if the service has no keys."""
        return request.state.client


User = Annotated[str, Depends(Admitted())]
"""Name of the client, see `Authenticator.admit`."""


class GuardedRoute(APIRoute):
    """Route that admits its client first.

    FastAPI reads and parses the body before it calls dependencies. A client without a key could
    thus make the service parse any body.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route, with the admission before it."""
        handle = super().get_route_handler()
        needs = [part.call for part in self.dependant.dependencies]
        if not any(isinstance(need, Admitted) for need in needs):
            return handle

        async def admit_first(request: Request) -> Response:
            authenticator = request.app.state.service.authenticator
            request.state.client = authenticator.admit(request)
            return await handle(request)

        return admit_first
