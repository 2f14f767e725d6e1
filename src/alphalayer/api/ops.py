"""Routes for operators: probes and metrics."""

from __future__ import annotations

from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from alphalayer.api.deps import Service, ServiceDep
from alphalayer.api.guard import Admitted, GuardedRoute

router = APIRouter(tags=["Operation"], route_class=GuardedRoute)


@router.head("/livez", include_in_schema=False)
@router.get("/livez", summary="Liveness probe")
async def livez() -> dict[str, str]:
    """Return 200 while the service runs, whatever the state of the GPU."""
    return {"status": "alive"}


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="Readiness probe",
    responses={503: {"description": "Not ready. The body has the reason."}},
)
async def readyz(service: ServiceDep, response: Response) -> dict[str, Any]:
    """Return 200 if an engine and a model are ready, else 503 with the reason."""
    readiness = await _read_readiness(service)
    if not readiness["ready"]:
        response.status_code = 503
    return readiness


@router.head("/ping", include_in_schema=False)
@router.get(
    "/ping",
    summary="Load balancer probe",
    response_class=PlainTextResponse,
    responses={
        204: {"description": "Still starting."},
        503: {"description": "Not ready. The body has the reason."},
    },
)
async def ping(service: ServiceDep) -> Response:
    """Return 200 if ready, 204 while an engine starts, else 503 with the reason."""
    readiness = await _read_readiness(service)
    if readiness["ready"]:
        return PlainTextResponse("ready")
    if "problem" in readiness:
        return PlainTextResponse(readiness["problem"], 503)
    return Response(status_code=204)


async def _read_readiness(service: Service) -> dict[str, Any]:
    """Return the readiness. It reads the models folder in a thread of the probes.

    The threads of plain routes may all wait for a slow disk.
    """
    return await to_thread.run_sync(service.readiness, limiter=service.probes)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=PlainTextResponse,
    dependencies=[Depends(Admitted("metrics"))],
)
async def metrics(service: ServiceDep) -> Response:
    """Return metrics of the queue, jobs, stages and engine processes."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
