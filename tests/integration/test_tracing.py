"""A trace over processes: the client's span, the API pod's request, the worker's job and stages."""

from __future__ import annotations

import gzip
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from tests.stress.pods import Node
from tests.support.servers import Postgres
from tests.support.serving import served, wait_until


class Collector:
    """A collector of spans over OTLP."""

    def __init__(self):
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    assert any(
                        a.key == "service.name" and a.value.string_value
                        for a in resource.resource.attributes
                    )
                    collector.spans += [
                        span for scope in resource.scope_spans for span in scope.spans
                    ]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }

    def span_named(self, name: str) -> Span:
        """Return the only span with a name."""
        spans = [span for span in self.spans if span.name == name]
        assert len(spans) == 1, [span.name for span in self.spans]
        return spans[0]

    def has(self, *names: str) -> bool:
        """Return whether spans of all these names have arrived."""
        return set(names) <= {span.name for span in self.spans}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    threading.Thread(target=collector.server.serve_forever, daemon=True).start()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def test_trace_spans_client_request_job_and_worker_stages(
    tmp_path: Path, collector: Collector, postgres: Postgres
):
    database = postgres.fresh_database()
    environment = {
        **collector.environment,
        "ALPHALAYER_TRACING": "true",
        "ALPHALAYER_DATABASE": database,
    }
    nodes = [Node(tmp_path / role, role, environment) for role in ("api", "worker")]
    try:
        wait_until(lambda: all(node.answers() for node in nodes), 60)
        trace_id, parent = secrets.token_hex(16), secrets.token_hex(8)
        answer = httpx.post(
            f"{nodes[0].address}/alpha/v1/txt2img",
            json={"prompt": "a fox", "width": 64, "height": 64},
            headers={"traceparent": f"00-{trace_id}-{parent}-01"},
            timeout=60,
            trust_env=False,
        )
        assert answer.status_code == 200
        wait_until(
            lambda: collector.has("POST /alpha/v1/txt2img", "job", "queue", "sample", "store"), 20
        )
    finally:
        for node in nodes:
            node.stop()
    request, job = collector.span_named("POST /alpha/v1/txt2img"), collector.span_named("job")
    assert {span.trace_id.hex() for span in collector.spans} == {trace_id}
    assert request.parent_span_id.hex() == parent
    assert job.parent_span_id == request.span_id
    stages = [collector.span_named(name) for name in ("queue", "sent", "start", "sample", "store")]
    for before, after in pairwise(stages):
        assert before.parent_span_id == after.parent_span_id == job.span_id
        assert before.end_time_unix_nano == after.start_time_unix_nano
    # the pod and the worker have one clock here
    assert request.start_time_unix_nano < stages[0].start_time_unix_nano == job.start_time_unix_nano
    assert stages[-1].end_time_unix_nano == job.end_time_unix_nano
    # the worker ends its span after the outcome is written, which may be after the response
    assert stages[-1].start_time_unix_nano < request.end_time_unix_nano
    assert not any("ping" in span.name for span in collector.spans)


def test_failed_job_sets_the_error_status_of_its_span(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
):
    for name, value in collector.environment.items():
        monkeypatch.setenv(name, value)
    with served(tmp_path, tracing=True) as client:
        outputs = tmp_path / "outputs"
        outputs.rmdir()
        outputs.write_text("in the way")
        answer = client.post(
            "/alpha/v1/txt2img", json={"prompt": "a fox", "width": 64, "height": 64}
        )
        assert answer.status_code == 507
    # all spans are sent before the service is gone
    job = collector.span_named("job")
    assert job.status.code == Status.STATUS_CODE_ERROR
    assert job.status.message in answer.json()["detail"]
