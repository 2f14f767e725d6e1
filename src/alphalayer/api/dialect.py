"""Dialect: an HTTP API with its own paths, field names and errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import APIRouter

from alphalayer.api.errors import ErrorRenderer, render_problem


@dataclass(frozen=True)
class Dialect:
    """HTTP API for one kind of client.

    A dialect is one module that exports `DIALECT`. `DIALECTS` of `alphalayer.service.app` lists
    them.

    Attributes:
        prefix: Start of its paths, without a slash at the end.
        router: Its routes, with authentication where they need it.
        render_error: Function that returns the response for a problem.
        field_names: Its names of fields, by the names of `GenerationRequest` and `JobSpec`, where
            they differ.
    """

    prefix: str
    router: APIRouter
    render_error: ErrorRenderer = render_problem
    field_names: Mapping[str, str] = field(default_factory=dict[str, str])
