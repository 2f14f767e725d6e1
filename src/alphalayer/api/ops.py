"""For operators and their machines: is it alive, is it ready."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from alphalayer.api.deps import ServiceDep, User

router = APIRouter(tags=["Operation"])


@router.get("/livez", summary="Is the process alive?")
async def livez() -> dict[str, str]:
    """Answers as long as the service runs; says nothing of the GPU."""
    return {"status": "alive"}


@router.get(
    "/readyz",
    summary="Can it draw?",
    responses={503: {"description": "Not now; the body says why."}},
)
def readyz(service: ServiceDep, response: Response) -> dict[str, Any]:
    """200 when an engine is ready and there is a model to draw with, else 503 with the reason."""
    # in a thread, for it reads the models folder
    ready = service.readiness()
    if not ready["ready"]:
        response.status_code = 503
    return ready


@router.get(
    "/ping",
    summary="For load balancers",
    response_class=PlainTextResponse,
    responses={
        204: {"description": "Still starting."},
        503: {"description": "Not now; the body says why."},
    },
)
def ping(service: ServiceDep) -> Response:
    """200 where `/readyz` says 200, 204 while an engine starts, else 503 with the reason."""
    ready = service.readiness()
    if ready["ready"]:
        return PlainTextResponse("ready")
    return (
        PlainTextResponse(ready["problem"], 503)
        if "problem" in ready
        else Response(status_code=204)
    )


@router.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse)
async def metrics(service: ServiceDep, _user: User) -> Response:
    """Queue, jobs by outcome, seconds by stage, engine processes."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
