"""Errors on the wire, from one table of HTTP statuses: problem details (RFC 9457) with the stable codes of `alphalayer.core.errors`,
and the same in the shapes of the foreign dialects."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from alphalayer.core import validation
from alphalayer.core.errors import (
    AlphalayerError,
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
    "stopping": 503,
    "file_not_found": 404,
    "job_not_found": 404,
    "storage_failed": 507,
    "database_away": 503,
    "engine_failed": 500,
    "setup_failed": 500,
    "unauthorized": 401,
    "not_implemented": 501,
}


_PHRASES = {413: "Content Too Large", 422: "Unprocessable Content"}
"""Phrases of RFC 9110 that Python before 3.13 writes differently."""
PASSING = ("queue_full", "rate_limited", "stopping", "storage_failed", "database_away")
"""What may be gone at the next try. OpenAI's clients would ask again by themselves after any 409 and 5xx, and a request that takes an
engine down would do so each time."""
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
"""Codes of the errors that the framework itself answers."""


def _title(status: int) -> str:
    """Return the phrase of an HTTP status (RFC 9457, section 4.2.1)."""
    return _PHRASES.get(status) or HTTPStatus(status).phrase


class Problem(BaseModel):
    """What every error answers."""

    type: Annotated[str, Field(description="As RFC 9457 has it.")] = "about:blank"
    title: Annotated[str, Field(description="The status in words.")]
    status: Annotated[int, Field(description="The HTTP status.")]
    detail: Annotated[str, Field(description="What happened and why.")]
    code: Annotated[str, Field(description="Stable, for programs.")]
    hint: Annotated[str, Field(description="What to do next.")] = ""
    field: Annotated[str | None, Field(description="The field that is wrong, as it was sent.")] = (
        None
    )

    @classmethod
    def of(cls, error: AlphalayerError) -> Problem:
        """The problem that an error is."""
        status = STATUSES.get(error.code, 500)
        return cls(
            title=_title(status),
            status=status,
            detail=error.describe(),
            code=error.code,
            hint=error.hint,
            field=error.field,
        )


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": _title(status),
        "content": {
            "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
        },
    }
    for status in (401, 404, 409, 413, 422, 429, 500, 503, 507)
}
"""The error answers of a route, for the API's description."""


class ErrorResponse(JSONResponse):
    """An error as JSON; what it quotes of a request need not be Unicode."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(
            errors="replace"
        )


class ProblemResponse(ErrorResponse):
    """A problem as `application/problem+json`."""

    media_type = "application/problem+json"


def openai_error(problem: Problem) -> dict[str, Any]:
    """The body of an error as OpenAI's clients read it."""
    kind = {429: "rate_limit_error"}.get(
        problem.status, "server_error" if problem.status >= 500 else "invalid_request_error"
    )
    message = f"{problem.detail} {problem.hint}".strip()
    return {
        "error": {"message": message, "type": kind, "param": problem.field, "code": problem.code}
    }


def respond(path: str, problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    """The answer that a problem is to a request for this path: each dialect has its own shape."""
    headers = dict(headers or {})
    if path.startswith("/sdapi/"):
        return ErrorResponse(
            {"detail": f"{problem.detail} {problem.hint}".strip()}, problem.status, headers
        )
    if path.startswith("/v1/"):
        if problem.code not in PASSING:
            headers["x-should-retry"] = "false"
        return ErrorResponse(
            openai_error(problem), 400 if problem.status == 422 else problem.status, headers
        )
    return ProblemResponse(problem.model_dump(), problem.status, headers)


def http_problem(error: HTTPException, path: str = "") -> JSONResponse:
    """The answer to an error of the framework itself."""
    if error.status_code == 400:
        unreadable = InvalidRequest(
            "the body cannot be read as JSON in UTF-8.", hint=validation.DESCRIBED
        )
        return respond(path, Problem.of(unreadable))
    allowed = (error.headers or {}).get("Allow", "").replace(", ", " or ")
    detail, hint = {
        404: ("there is no such path.", "All paths are described at /docs."),
        405: ("this path does not take that method.", f"Use {allowed}; see /docs."),
    }.get(error.status_code, (str(error.detail), ""))
    problem = Problem(
        title=_title(error.status_code),
        status=error.status_code,
        detail=detail,
        code=CODES.get(error.status_code, "http_error"),
        hint=hint,
    )
    return respond(path, problem, dict(error.headers or {}))


def internal_error(path: str) -> JSONResponse:
    """The answer where something broke that nobody thought of."""
    problem = Problem(
        title=_title(500),
        status=500,
        detail="an internal_error error; the log has the details.",
        code="engine_failed",
    )
    return respond(path, problem)


def install(app: FastAPI) -> None:
    """Answer every foreseen error of this application as a problem."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, AlphalayerError)
        headers: dict[str, str] = dict(getattr(error, "headers", {}))
        if STATUSES.get(error.code) == 429:
            request.app.state.service.metrics.refused.labels(error.code).inc()
        if isinstance(error, RateLimited | Stopping | DatabaseAway):
            headers["Retry-After"] = str(error.retry_after_s)
        elif error.code == "queue_full":
            headers["Retry-After"] = str(request.app.state.service.job_queue.retry_after_s)
        return respond(path_of(request.scope), Problem.of(error), headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        fault = first_error(first)
        if first["loc"] == ("body",) and first["type"] != "json_invalid":
            if isinstance(error.body, bytes):  # as it came: its header names another type
                fault = _not_json(request)
            elif isinstance(error.body, str):
                fault = InvalidRequest(
                    "the body is a JSON text, not an object.",
                    hint="It was made JSON twice: send the object itself.",
                )
        return respond(path_of(request.scope), Problem.of(fault))

    async def plain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            error.headers = {"Allow": ", ".join(_allowed(request))}
        return http_problem(error, path_of(request.scope))

    app.add_exception_handler(AlphalayerError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)


def _allowed(request: Request) -> list[str]:
    """The methods of the request's path; the router itself names those of the first route alone."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


def path_of(scope: Scope) -> str:
    """The path as routes see it, without a prefix of a proxy."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _not_json(request: Request) -> InvalidRequest:
    """A body that was not taken for JSON."""
    kind = request.headers.get("content-type")
    return InvalidRequest(
        f'"{kind}" is not application/json.'
        if kind
        else "it is missing, so the body is not taken for JSON.",
        hint="Send Content-Type: application/json.",
        field="Content-Type",
    )


def first_error(first: Any) -> InvalidRequest:
    """What pydantic found wrong in a request, in the service's words; `loc` begins with where the field was sent."""
    place = [str(part) for part in first["loc"][1:]]
    message = (
        validation.describe_validation_error(first)
        if place
        else f"the {first['loc'][0]}: {validation.describe_validation_error(first)}"
    )
    if first["type"] == "json_invalid":
        message, place = f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}", []
    return InvalidRequest(message + ".", hint=validation.DESCRIBED, field=".".join(place) or None)
