"""Export of traces over OTLP, with a span for every request."""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span

from alphalayer.api.middleware.hosts import PROBES

_ADDRESSES = ("http.url", "http.target", "url.full")
"""Attributes of a request that may end with its query."""


def install(app: FastAPI) -> TracerProvider:
    """Trace every request except the probes.

    OpenTelemetry's own variables, such as `OTEL_EXPORTER_OTLP_ENDPOINT`, set the receiver.

    Returns:
        The provider for other spans. Its `shutdown` sends the remaining spans and blocks.
    """
    name = os.environ.get("OTEL_SERVICE_NAME", "alphalayer")
    provider = TracerProvider(
        resource=Resource.create({"service.name": name}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=provider,
        excluded_urls=",".join([*PROBES, "/metrics"]),
        exclude_spans=["receive", "send"],
        server_request_hook=_hide_query,
    )
    return provider


def _hide_query(span: Span, _: dict[str, Any]) -> None:
    """Remove the query from the attributes of a request, as it may hold a secret."""
    for name, value in dict(getattr(span, "attributes", None) or {}).items():
        if name in _ADDRESSES:
            span.set_attribute(name, str(value).partition("?")[0])
        elif name == "url.query":
            span.set_attribute(name, "")
