"""Every route names the scope that it requires, or is one of the few that need no key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from fastapi import APIRouter, Depends

from alphalayer.api.guard import Admitted, GuardedRoute, Reader
from alphalayer.config import Settings
from alphalayer.service.app import create_app

OPEN = {
    "/",
    "/alpha/v1/file/{filename}",
    "/alpha/v1/jobs/{job_id}/layers.{kind}",
    "/docs",
    "/docs/assets",
    "/livez",
    "/mcp",  # mounted: `GuardedApp` requires the scope "generate"
    "/openapi.json",
    "/ping",
    "/playground",
    "/readyz",
}
ADMIN = {f"/sdapi/v1/refresh-{what}" for what in ("checkpoints", "embeddings", "loras", "vae")}
GENERATE = {
    ("POST", "/alpha/v1/txt2img"),
    ("POST", "/alpha/v1/img2img"),
    ("POST", "/alpha/v1/layers"),
    ("POST", "/alpha/v1/jobs"),
    ("POST", "/alpha/v1/jobs/img2img"),
    ("POST", "/alpha/v1/jobs/layers"),
    ("DELETE", "/alpha/v1/jobs/{job_id}"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("POST", "/v1/images/variations"),
} | {
    ("POST", f"/sdapi/v1/{name}")
    for name in (
        "txt2img",
        "img2img",
        "extra-single-image",
        "extra-batch-images",
        "interrogate",
        "options",
        "interrupt",
        "skip",
        "reload-checkpoint",
        "unload-checkpoint",
    )
}
WORK = {
    "/alpha/v1/txt2img",
    "/alpha/v1/img2img",
    "/alpha/v1/layers",
    "/alpha/v1/jobs",
    "/alpha/v1/jobs/img2img",
    "/alpha/v1/jobs/layers",
    "/alpha/v1/convert/{filename}",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
    "/sdapi/v1/extra-single-image",
    "/sdapi/v1/extra-batch-images",
    "/sdapi/v1/png-info",
    "/v1/images/generations",
    "/v1/images/edits",
}


def walk(routes: Sequence[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and route of all routes, also of included routers."""
    for route in routes:
        if (included := getattr(route, "original_router", None)) is not None:
            yield from walk(included.routes, prefix + route.include_context.prefix)
        else:
            yield prefix + route.path, route


@pytest.fixture(scope="module")
def routes(tmp_path_factory) -> list[tuple[str, Any]]:
    folder = tmp_path_factory.mktemp("routes")
    app = create_app(Settings(outputs_dir=folder, data_dir=folder))
    return list(walk(app.routes))


def test_route_names_its_scope_or_is_open(routes):
    assert len(routes) > 50
    for path, route in routes:
        admission = getattr(route, "admission", None)
        assert (admission is None) == (path in OPEN), path


def test_route_requires_the_scope_of_its_effect(routes):
    scopes = {
        (method, path): route.admission
        for path, route in routes
        if getattr(route, "admission", None)
        for method in route.methods
    }
    assert {path for (_, path), need in scopes.items() if need.scope == "admin"} == ADMIN
    assert {path for (_, path), need in scopes.items() if need.scope == "metrics"} == {"/metrics"}
    assert {route for route, need in scopes.items() if need.scope == "generate"} == GENERATE
    for (method, path), need in scopes.items():
        if method not in ("GET", "HEAD") and path not in ADMIN:
            assert need.scope == "generate" or path == "/sdapi/v1/png-info", path
    assert {path for (_, path), need in scopes.items() if need.is_work} == WORK


def test_guard_endpoint_scope_replaces_that_of_its_router():
    router = APIRouter(dependencies=[Depends(Admitted("read"))], route_class=GuardedRoute)

    async def inner(user: Reader) -> None: ...

    @router.post("/own", dependencies=[Depends(Admitted("admin"))])
    async def own() -> None: ...

    @router.post("/inherited")
    async def inherited() -> None: ...

    nested = APIRouter(route_class=GuardedRoute)

    @nested.get("/nested", dependencies=[Depends(inner)])
    async def through() -> None: ...

    scopes = [route.admission.scope for route in (*router.routes, *nested.routes)]  # type: ignore[attr-defined]
    assert scopes == ["admin", "read", "read"]
