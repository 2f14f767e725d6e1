"""Traces of jobs with OpenTelemetry, from the HTTP request to the stages of the engine.

This module needs only OpenTelemetry's API, which does nothing by itself.
`alphalayer.service.otlp` exports the traces.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.trace import (
    NoOpTracerProvider,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    TracerProvider,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_HEADERS = TraceContextTextMapPropagator()


class JobTrace:
    """Spans of one run of a job: one for the job and one for each stage."""

    def __init__(
        self,
        tracer: Tracer,
        parent: str | None,
        accepted_at: float,
        attributes: Mapping[str, str | int],
    ):
        began_ns = int(accepted_at * 1e9)
        context = _HEADERS.extract({"traceparent": parent}, Context()) if parent else Context()
        self._tracer = tracer
        self._job = tracer.start_span(
            "job", context, SpanKind.CONSUMER, attributes, start_time=began_ns
        )
        self._job_context = set_span_in_context(self._job, Context())
        self._name = "queue"
        self._stage = tracer.start_span("queue", self._job_context, start_time=began_ns)

    def stage(self, name: str) -> None:
        """Begin a stage, unless the job is in it already."""
        if name != self._name:
            now = time.time_ns()
            self._stage.end(now)
            self._name = name
            self._stage = self._tracer.start_span(name, self._job_context, start_time=now)

    def end(self, problem: str | None = None) -> None:
        """End the run. `problem` is the reason if it failed."""
        if problem:
            self._job.set_status(Status(StatusCode.ERROR, problem))
        now = time.time_ns()
        self._stage.end(now)
        self._job.end(now)


class Traces:
    """Traces of one service."""

    def __init__(self, provider: TracerProvider | None = None):
        self._tracer = (provider or NoOpTracerProvider()).get_tracer("alphalayer")

    def follow(
        self,
        parent: str | None,
        accepted_at: float,
        attributes: Mapping[str, str | int] | None = None,
    ) -> JobTrace:
        """Begin the trace of a job.

        Args:
            parent: W3C `traceparent` of its request.
            accepted_at: Unix seconds.
            attributes: Attributes of the job's span.
        """
        return JobTrace(self._tracer, parent, accepted_at, attributes or {})


def current_traceparent() -> str | None:
    """Return the W3C `traceparent` of the current request, or None without tracing."""
    headers: dict[str, str] = {}
    _HEADERS.inject(headers)
    return headers.get("traceparent")
