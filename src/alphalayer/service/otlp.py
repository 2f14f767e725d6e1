"""Traces leave the service here: a span for every request, and all spans sent off over OTLP."""

from __future__ import annotations

import os

from fastapi import FastAPI
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

PROBES = "livez,readyz,ping,metrics"


def install(app: FastAPI) -> TracerProvider:
    """Give every request but the probes' a span. Where spans go is said by OpenTelemetry's own variables (`OTEL_EXPORTER_OTLP_ENDPOINT`).

    The provider is for spans of one's own; its `shutdown` sends what is left and blocks for as long as that takes.
    """
    name = os.environ.get("OTEL_SERVICE_NAME", "alphalayer")
    provider = TracerProvider(
        resource=Resource.create({"service.name": name}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=provider, excluded_urls=PROBES, exclude_spans=["receive", "send"]
    )
    return provider
