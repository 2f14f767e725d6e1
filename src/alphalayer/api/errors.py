"""Errors over HTTP: problem details (RFC 9457) with the codes of `alphalayer.core.errors`.

Each dialect renders a problem in its own form, see `alphalayer.api.dialect`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from alphalayer.core import validation
from alphalayer.core.errors import (
    AlphalayerError,
    Busy,
    DatabaseAway,
    InvalidRequest,
    RateLimited,
    Stopping,
)

STATUSES = {
    "invalid_request": 422,
    "model_not_found": 404,
    "corrupt_file": 503,
    "unsupported_family": 422,
    "pickle_refused": 422,
    "model_unusable": 503,
    "layerdiffuse_missing": 503,
    "out_of_memory": 507,
    "cancelled": 409,
    "queue_full": 429,
    "rate_limited": 429,
    "busy": 429,
    "stopping": 503,
    "file_not_found": 404,
    "job_not_found": 404,
    "storage_failed": 507,
    "database_away": 503,
    "engine_failed": 500,
    "setup_failed": 500,
    "unauthorized": 401,
    "forbidden": 403,
    "host_unknown": 421,
    "origin_refused": 403,
    "not_implemented": 501,
}
"""HTTP status of each code."""
_PHRASES = {413: "Content Too Large", 414: "URI Too Long", 422: "Unprocessable Content"}
"""Phrases of RFC 9110 that Python before 3.13 writes differently."""
_FRAMEWORK_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_encoding",
    422: "invalid_request",
    503: "overloaded",
}
"""Codes of the errors that the framework raises."""
MAX_QUOTED = 2000
"""Most characters of a text in a problem. It may quote a part of the request."""


def _title(status: int) -> str:
    """Return the phrase of an HTTP status (RFC 9457, section 4.2.1)."""
    return _PHRASES.get(status) or HTTPStatus(status).phrase


def _cut(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…"


class Problem(BaseModel):
    """Problem details of an error."""

    type: Annotated[str, Field(description="Problem type of RFC 9457.")] = "about:blank"
    title: Annotated[str, Field(description="Phrase of the HTTP status.")]
    status: Annotated[int, Field(description="HTTP status.")]
    detail: Annotated[str, Field(description="Cause of the error.")]
    code: Annotated[str, Field(description="Stable code for programs.")]
    hint: Annotated[str, Field(description="Next step.")] = ""
    field: Annotated[str | None, Field(description="Wrong field, with its name as sent.")] = None

    @classmethod
    def of(cls, error: AlphalayerError) -> Problem:
        """Return the problem that describes an error."""
        status = STATUSES.get(error.code, 500)
        return cls(
            title=_title(status),
            status=status,
            detail=_cut(error.describe()),
            code=error.code,
            hint=_cut(error.hint),
            field=error.field and _cut(error.field),
        )

    @classmethod
    def of_status(cls, status: int, code: str, detail: str, hint: str = "") -> Problem:
        """Return the problem of an HTTP status without an exception."""
        return cls(title=_title(status), status=status, detail=detail, code=code, hint=hint)

    @classmethod
    def of_http(cls, error: HTTPException) -> Problem:
        """Return the problem that describes an error of the framework."""
        if error.status_code == 400:
            return cls.of(
                InvalidRequest(
                    "the body cannot be read as JSON in UTF-8.", hint=validation.DESCRIBED
                )
            )
        allowed = (error.headers or {}).get("Allow", "").replace(", ", " or ")
        detail, hint = {
            404: ("there is no such path.", "All paths are described at /docs."),
            405: ("this path does not take that method.", f"Use {allowed}; see /docs."),
        }.get(error.status_code, (str(error.detail), ""))
        return cls(
            title=_title(error.status_code),
            status=error.status_code,
            detail=detail,
            code=_FRAMEWORK_CODES.get(error.status_code, "http_error"),
            hint=hint,
        )


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": _title(status),
        "content": {
            "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
        },
    }
    for status in (401, 403, 404, 409, 413, 421, 422, 429, 500, 503, 507)
}
"""Error responses of a route, for the OpenAPI document."""
INTERNAL_ERROR = Problem(
    title=_title(500),
    status=500,
    detail="an internal error; the log has the details.",
    code="engine_failed",
)
"""Problem of an unexpected exception."""


class ErrorResponse(JSONResponse):
    """Error as JSON. Text quoted from a request may be invalid Unicode."""

    def render(self, content: Any) -> bytes:
        """Return the body, with a question mark for each half of a surrogate pair."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(
            errors="replace"
        )


class ProblemResponse(ErrorResponse):
    """Problem as `application/problem+json`."""

    media_type = "application/problem+json"


ErrorRenderer = Callable[[Problem, Mapping[str, str]], ErrorResponse]
"""Function of a problem and HTTP headers that returns the response of a dialect."""


def render_problem(problem: Problem, headers: Mapping[str, str]) -> ErrorResponse:
    """Return the response of the native API and of paths outside the dialects."""
    return ProblemResponse(problem.model_dump(), problem.status, dict(headers))


def find_renderer(scope: Scope) -> ErrorRenderer:
    """Return the error renderer of the dialect that a request addresses.

    Call it before the request is passed on: a mounted application changes the scope.
    """
    # without the prefix of a proxy
    path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
    renderers: Mapping[str, ErrorRenderer] = scope["app"].state.error_renderers
    return next(
        (render for prefix, render in renderers.items() if path.startswith(f"{prefix}/")),
        render_problem,
    )


async def send_error(
    error: AlphalayerError | HTTPException, scope: Scope, receive: Receive, send: Send
) -> None:
    """Send an error of a middleware, outside of the exception handlers."""
    if isinstance(error, AlphalayerError):
        response = find_renderer(scope)(Problem.of(error), {})
    else:
        response = find_renderer(scope)(Problem.of_http(error), error.headers or {})
    await response(scope, receive, send)


def install(app: FastAPI, renderers: Mapping[str, ErrorRenderer]) -> None:
    """Render the errors of an application.

    Args:
        app: The application.
        renderers: How errors below a path prefix are rendered, by prefix.
    """
    app.state.error_renderers = renderers
    app.add_exception_handler(AlphalayerError, _render_error)
    app.add_exception_handler(RequestValidationError, _render_validation_error)
    app.add_exception_handler(HTTPException, _render_http_error)


async def _render_error(request: Request, error: Exception) -> ErrorResponse:
    assert isinstance(error, AlphalayerError)
    headers: dict[str, str] = dict(getattr(error, "headers", {}))
    if STATUSES.get(error.code) == 429:
        request.app.state.service.metrics.refused.labels(error.code).inc()
    if isinstance(error, RateLimited | Busy | Stopping | DatabaseAway):
        headers["Retry-After"] = str(error.retry_after_s)
    elif error.code == "queue_full":
        headers["Retry-After"] = str(request.app.state.service.job_queue.retry_after_s)
    return find_renderer(request.scope)(Problem.of(error), headers)


async def _render_validation_error(request: Request, error: Exception) -> ErrorResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    invalid = first_error(first)
    if first["loc"] == ("body",) and first["type"] != "json_invalid":
        if isinstance(error.body, bytes):  # unparsed, because Content-Type names no JSON
            invalid = _wrong_content_type(request)
        elif isinstance(error.body, str):
            invalid = InvalidRequest(
                "the body is a JSON text, not an object.",
                hint="It was encoded twice: send the object itself.",
            )
    return find_renderer(request.scope)(Problem.of(invalid), {})


async def _render_http_error(request: Request, error: Exception) -> ErrorResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        error.headers = {"Allow": ", ".join(_allowed_methods(request))}
    return find_renderer(request.scope)(Problem.of_http(error), error.headers or {})


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of the request's path.

    The router itself names the methods of the first matching route only.
    """
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


def _wrong_content_type(request: Request) -> InvalidRequest:
    """Return the error of a body whose Content-Type is missing or names no JSON."""
    content_type = request.headers.get("content-type")
    return InvalidRequest(
        f'"{content_type}" is not application/json.'
        if content_type
        else "it is missing, so the body is not read as JSON.",
        hint="Send Content-Type: application/json.",
        field="Content-Type",
    )


def first_error(details: Any) -> InvalidRequest:
    """Return the error for an entry of `ValidationError.errors()`.

    Args:
        details: The entry. Its `loc` begins with the part of the request, such as "body".
    """
    part, *names = (str(name) for name in details["loc"])
    message = validation.describe_validation_error(details)
    if details["type"] == "json_invalid":
        reason = details.get("ctx", {}).get("error", "")
        message, names = f"the body is not valid JSON: {reason}", []
    elif not names:
        message = f"the {part}: {message}"
    return InvalidRequest(f"{message}.", hint=validation.DESCRIBED, field=".".join(names) or None)
