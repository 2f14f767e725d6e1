"""Admission of clients, before anything of a request's body is read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.responses import StreamingResponse

from alphalayer.api.request_body import LimitedRoute
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


def _calls(dependant: Dependant) -> Iterator[object]:
    """Yield all dependencies: the router's first, then the endpoint's."""
    for part in dependant.dependencies:
        yield part.call
        yield from _calls(part)
