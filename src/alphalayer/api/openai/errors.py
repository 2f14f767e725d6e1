"""Errors in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from alphalayer.api.errors import ErrorResponse, Problem


class ErrorBody(BaseModel):
    """An error. `param` names the field."""

    message: Annotated[str, Field(description="What happened, and what to do.")]
    type: Annotated[str, Field(description="Kind of the error, by its status.")]
    param: Annotated[str | None, Field(description="The wrong field.")]
    code: Annotated[str, Field(description="Stable code for programs.")]


class ErrorAnswer(BaseModel):
    """An error response."""

    error: Annotated[ErrorBody, Field(description="The error.")]


RETRIED = (
    "queue_full",
    "rate_limited",
    "busy",
    "stopping",
    "storage_failed",
    "database_away",
    "overloaded",
)
"""Codes of errors that a client may retry.

OpenAI's clients retry after every 409 and 5xx. A request that crashes an engine must not be
retried.
"""


def error_body(problem: Problem) -> dict[str, Any]:
    """Return the JSON of an error in OpenAI's form."""
    kind = {429: "rate_limit_error"}.get(
        problem.status, "server_error" if problem.status >= 500 else "invalid_request_error"
    )
    message = f"{problem.detail} {problem.hint}".strip()
    return {
        "error": {"message": message, "type": kind, "param": problem.field, "code": problem.code}
    }


def render_error(problem: Problem, headers: Mapping[str, str]) -> ErrorResponse:
    """Return the response for an error; wrong fields and missing features have 400."""
    retry = {} if problem.code in RETRIED else {"x-should-retry": "false"}
    if problem.status in (422, 501):
        problem = problem.model_copy(update={"status": 400})
    return ErrorResponse(error_body(problem), problem.status, {**headers, **retry})
