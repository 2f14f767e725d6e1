"""The log of a running service.

Ids lead from a request to its job. Prompts are logged only by a setting, keys and passwords never.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import asyncpg
import httpx
import pytest
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.exc import DBAPIError
from structlog.testing import capture_logs
from tests.support.serving import free_port, served, wait_until

from alphalayer.auth.api_keys import add_key
from alphalayer.core.errors import InvalidRequest, StorageFailed
from alphalayer.jobs.outcomes import record_outcome
from alphalayer.observability.logging import describe_error
from alphalayer.observability.metrics import Metrics

BODY = {"prompt": "a hidden wish", "steps": 1, "width": 64, "height": 64}
BROKEN = """
from alphalayer.jobs.sqlite import SqliteJobQueue
from tests.support import fake_service

async def submit(self, *_args, **_options):
    raise RuntimeError("an unexpected error")

SqliteJobQueue.submit = submit
fake_service.main()
"""
QUOTING = """
import sys
from pathlib import Path
from alphalayer.config import Settings
from alphalayer.observability.logging import configure_logging
from alphalayer.service.app import create_app
from alphalayer.service.uvicorn_server import Server, serve

folder, port = Path(sys.argv[1]), int(sys.argv[2])
settings = Settings(
    models_dir=folder / "models",
    outputs_dir=folder / "outputs",
    data_dir=folder / "data",
    port=port,
)
configure_logging(settings.log_level, settings.log_json)
app = create_app(settings, engine="tests.support.engines:create_quoting")
serve(Server(app, port=port, drain_s=0))
"""


@contextmanager
def serving(
    folder: Path, log: Path, *program: str, **environment: str
) -> Iterator[tuple[httpx.Client, str]]:
    """Run a service that logs into a file; yield a client and a key."""
    port, keys = free_port(), folder / "keys.json"
    secret = add_key(keys, "shop")
    variables = {"KEYS_FILE": str(keys), "API_AUTH": "ann:pass-word", **environment}
    settings = {f"ALPHALAYER_{name}": value for name, value in variables.items()}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [
                sys.executable,
                *(program or ("-m", "tests.support.fake_service")),
                str(folder),
                str(port),
                "0",
            ],
            env={**os.environ, **settings},
            stderr=errors,
        )
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30
        ) as client:
            wait_until(lambda: _is_ready(client), 30)
            yield client, secret
    finally:
        process.terminate()
        process.wait(30)


def serve_and_generate(folder: Path, **environment: str) -> tuple[list[dict[str, Any]], str]:
    """Generate an image through a service that logs JSON.

    Returns:
        The lines of its log, and the key that was used.
    """
    log = folder / "log"
    with serving(folder, log, LOG_JSON="true", **environment) as (client, secret):
        headers = {"X-API-Key": secret, "X-Request-ID": "order-77"}
        answer = client.post("/alpha/v1/txt2img", json=BODY, headers=headers)
        assert answer.headers["x-request-id"] == "order-77"
        job = client.post("/alpha/v1/jobs", json=BODY, headers=headers).json()
        assert client.get(job["url"], headers=headers).status_code == 200  # polling is not logged
        strange = client.get("/alpha/v1/file/no.png", headers={"X-Request-ID": "two words"})
        assert len(strange.headers["x-request-id"]) == 16
        assert (
            client.post("/alpha/v1/txt2img", json=BODY, auth=("ann", "wrong-word")).status_code
            == 401
        )
    return [json.loads(line) for line in log.read_text().splitlines()], secret


@pytest.mark.parametrize("as_json", [False, True])
def test_unexpected_error_is_logged_once_without_secrets(tmp_path, as_json):
    log = tmp_path / "log"
    with serving(tmp_path, log, "-c", BROKEN, LOG_JSON=str(as_json).lower()) as (client, secret):
        headers = {
            "X-API-Key": secret,
            "Authorization": "Bearer other-secret",
            "X-Request-ID": "order-78",
        }
        answer = client.post("/alpha/v1/txt2img", json=BODY, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (500, "engine_failed")
        assert answer.headers["x-request-id"] == "order-78"
    text = log.read_text()
    assert len(text.splitlines()) < 100
    assert text.count("RuntimeError: an unexpected error") == 1
    assert "in submit" in text
    lines_of_request = [line for line in text.splitlines() if "order-78" in line]
    assert len(lines_of_request) == 2, "the error and the request"
    assert "500" in lines_of_request[1]
    for word in ("a hidden wish", secret, "pass-word", "other-secret"):
        assert word not in text


class Receiver(BaseHTTPRequestHandler):
    """A receiver that accepts traces, and no webhooks."""

    traces: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":
            self.traces.append(body)
        self.send_response(200 if self.path == "/v1/traces" else 500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_debug_log_and_traces_hold_no_secret(tmp_path, monkeypatch):
    """Send requests that succeed and fail, with a secret in each part of them."""
    log = tmp_path / "log"
    prompt = {"prompt": "secret-prompt", "negative_prompt": "secret-negative"}
    body = {**BODY, **prompt}
    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.server_port}")
    environment = {
        "LOG_LEVEL": "debug",
        "TRACING": "true",
        "WEBHOOK_SECRET": "secret-of-webhooks",
        "WEBHOOK_ALLOW_PRIVATE": "true",
    }
    with serving(tmp_path, log, "-c", QUOTING, **environment) as (client, key):
        client.headers.update({"X-API-Key": key, "Accept": "application/json, text/event-stream"})

        numbers = itertools.count()

        def submit(**changes: Any) -> int:
            keyed = {"Idempotency-Key": f"secret-idempotency-{next(numbers)}"}
            return client.post(
                "/alpha/v1/jobs?token=secret-query", json={**body, **changes}, headers=keyed
            ).status_code

        path = "secret-path?token=secret-token"
        url = f"http://127.0.0.1:{receiver.server_port}/{path}"
        assert submit(webhook_url=url) == 202
        assert submit(webhook_url=f"http://127.0.0.1:1/{path}") == 202
        assert submit(webhook_url=f"ftp://127.0.0.1/{path}") == 422
        assert submit(steps="secret-steps") == 422
        assert submit(prompt="wrong secret-prompt") == 202
        assert client.get("/alpha/v1/models", headers={"X-API-Key": "secret-guess"}).status_code
        arguments = {**prompt, "width": "secret-width"}
        call = {"name": "draw_transparent_picture", "arguments": arguments}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
        assert "isError" in client.post("/mcp/", json=message).text
        with closing(sqlite3.connect(tmp_path / "data" / "jobs.sqlite")) as journal:
            journal.execute("ALTER TABLE jobs RENAME TO away")
            assert submit() == 507
            journal.execute("ALTER TABLE away RENAME TO jobs")
        assert submit(prompt="boom secret-prompt") == 202
        wait_until(lambda: "Error calling tool" in log.read_text())
        wait_until(lambda: "int_parsing" in log.read_text())
        wait_until(lambda: log.read_text().count("webhook.retried") == 2)
        wait_until(lambda: "job.failed" in log.read_text())
    receiver.shutdown()
    receiver.server_close()
    lines = log.read_text().splitlines()
    assert [line for line in lines if "secret" in line] == []
    assert [line for line in lines if key in line] == []
    traces = b"".join(Receiver.traces)
    assert b"/alpha/v1/jobs" in traces
    assert b"invalid_request" in traces
    assert re.findall(rb"[ -~]*secret[ -~]*", traces) == []


def test_logs_of_libraries_begin_at_warning(tmp_path):
    """Check loggers with levels and handlers of their own."""
    program = """
import logging
from alphalayer.observability.logging import configure_logging

early = logging.getLogger("early")
early.addHandler(logging.StreamHandler())
early.propagate, early.level = False, logging.DEBUG
configure_logging("debug", as_json=True)
late = logging.getLogger("late")
late.setLevel(logging.DEBUG)
for name in ("early", "late", "httpx", "uvicorn.error", "alphalayer.engine"):
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logging.getLogger(name).log(level, f"{name} {level}")
import threading
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise ValueError("the last line")
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 1
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    events = [line["event"] for line in lines]
    assert events[:-2] == [
        "early 30",
        "late 30",
        "httpx 30",
        "uvicorn.error 20",
        "uvicorn.error 30",
        "alphalayer.engine 10",
        "alphalayer.engine 20",
        "alphalayer.engine 30",
    ]
    assert events[-2:] == ["uncaught error"] * 2
    assert "ZeroDivisionError: division by zero" in lines[-2]["exception"]
    assert lines[-1]["exception"].endswith("ValueError: the last line")


def test_errors_that_quote_values_are_described_without_them():
    fields = {"C": "23505", "M": "duplicate key", "D": "Key (idempotency_key)=(secret) exists."}
    duplicate = asyncpg.PostgresError.new(fields)
    assert "secret" in str(duplicate)
    unreadable = asyncpg.PostgresError.new({"C": "22P02", "M": 'invalid input: "secret"'})
    stopping = asyncpg.PostgresError.new({"C": "57P01", "M": "shutting down", "D": "secret"})
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(dict[str, int]).validate_python({"width": "secret"})
    errors = [
        duplicate,
        DBAPIError("INSERT", {}, duplicate),
        unreadable,
        stopping,
        caught.value,
        InvalidRequest('"secret" is too long.', field="prompt"),
        StorageFailed("the disk is full."),
    ]
    assert [describe_error(error) for error in errors] == [
        "SQLSTATE 23505",
        "SQLSTATE 23505",
        "SQLSTATE 22P02",
        "shutting down",
        "width: int_parsing",
        "field prompt",
        "the disk is full.",
    ]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_log_ids_connect_a_request_to_its_job(tmp_path, log_prompts):
    lines, secret = serve_and_generate(tmp_path, LOG_PROMPTS=str(log_prompts).lower())
    by_event: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_event.setdefault(line["event"], []).append(line)
    accepted, done = by_event["job.accepted"][0], by_event["job.done"][0]
    assert (accepted["request"], accepted["owner"], accepted["job"]) == (
        "order-77",
        "shop",
        done["job"],
    )
    assert done["engine"] == "cpu"
    completed = next(
        line for line in by_event["request.completed"] if line["request"] == "order-77"
    )
    assert (completed["method"], completed["path"], completed["status"]) == (
        "POST",
        "/alpha/v1/txt2img",
        200,
    )
    assert {
        line["method"] for line in by_event["request.completed"] if "/jobs" in line["path"]
    } == {"POST"}
    assert by_event["engine.ready"][0]["device"] == "discs, no device"
    everything = json.dumps(lines)
    assert ("a hidden wish" in everything) == log_prompts
    for word in (secret, "pass-word", "wrong-word"):
        assert word not in everything


@pytest.mark.parametrize(
    ("settings", "warnings", "logged"),
    [
        ({}, [], {"page": "http://127.0.0.1:7861/", "docs": "http://127.0.0.1:7861/docs"}),
        ({"host": "0.0.0.0"}, ["auth.disabled"], {"page": "http://localhost:7861/"}),
        ({"host": "::1"}, [], {"page": "http://[::1]:7861/"}),
        ({"host": "::", "api_auth": "ann:pass-word"}, [], {"page": "http://localhost:7861/"}),
        (
            {"host": "0.0.0.0", "role": "worker"},
            [],
            {"livez": "http://localhost:7861/livez", "page": None},
        ),
        ({"keys_file": "keys.json"}, ["auth.no_keys"], {}),
    ],
)
def test_service_start_logs_its_address_and_access(
    tmp_path, monkeypatch, request, settings, warnings, logged
):
    monkeypatch.chdir(tmp_path)
    Path("keys.json").write_text("[]")
    if "role" in settings:
        settings = {**settings, "database": request.getfixturevalue("postgres").fresh_database()}
    with capture_logs() as logs, served(tmp_path, engine=None, **{"port": 7861, **settings}):
        pass
    assert [line["event"] for line in logs if line["event"].startswith("auth.")] == warnings
    serving = next(line for line in logs if line["event"] == "service.started")
    assert {name: serving.get(name) for name in logged} == logged


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ping").status_code == 200
    except httpx.TransportError:
        return False


def test_invalid_prompt_is_logged_by_its_field_only():
    with capture_logs() as lines:
        record_outcome(
            Metrics(),
            "0123",
            InvalidRequest('the attention weight of "my secret" is too high.', field="prompt"),
        )
    assert lines == [
        {
            "event": "job.failed",
            "log_level": "warning",
            "job": "0123",
            "code": "invalid_request",
            "field": "prompt",
        }
    ]
