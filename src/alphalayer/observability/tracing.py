"""Traces (OpenTelemetry): a job's way from the HTTP request over the queue to the stages of its drawing, across processes and machines.

Only the API of OpenTelemetry is needed here, and it does nothing by itself; `alphalayer.service.otlp` has the rest.
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
)
from opentelemetry.trace import set_span_in_context as within
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_HEADERS = TraceContextTextMapPropagator()


class JobTrace:
    """One run of a job: a span of its own, from when it was accepted, and in it one for each stage in turn."""

    def __init__(
        self,
        tracer: Tracer,
        parent: str | None,
        accepted_at: float,
        attributes: Mapping[str, str | int],
    ):
        began = int(accepted_at * 1e9)
        around = _HEADERS.extract({"traceparent": parent}, Context()) if parent else Context()
        self._tracer = tracer
        self._job = tracer.start_span(
            "job", around, SpanKind.CONSUMER, attributes, start_time=began
        )
        self._inside = within(self._job, Context())
        self._name = "queue"
        self._stage = tracer.start_span("queue", self._inside, start_time=began)

    def stage(self, name: str) -> None:
        """The job is in this stage now; nothing happens if it was before."""
        if name != self._name:
            now = time.time_ns()
            self._stage.end(now)
            self._name = name
            self._stage = self._tracer.start_span(name, self._inside, start_time=now)

    def end(self, problem: str | None = None) -> None:
        """The run is over; `problem` says why there is no picture."""
        if problem:
            self._job.set_status(Status(StatusCode.ERROR, problem))
        now = time.time_ns()
        self._stage.end(now)
        self._job.end(now)


class Traces:
    """Makes the spans of one service."""

    def __init__(self, provider: TracerProvider | None = None):
        self._tracer = (provider or NoOpTracerProvider()).get_tracer("alphalayer")

    def follow(
        self,
        parent: str | None,
        accepted_at: float,
        attributes: Mapping[str, str | int] | None = None,
    ) -> JobTrace:
        """Follow a job that was accepted at a Unix time (seconds) in a request that `here` has named."""
        return JobTrace(self._tracer, parent, accepted_at, attributes or {})


def here() -> str | None:
    """The request that is being answered, as a W3C `traceparent`; None where nothing is traced."""
    headers: dict[str, str] = {}
    _HEADERS.inject(headers)
    return headers.get("traceparent")
