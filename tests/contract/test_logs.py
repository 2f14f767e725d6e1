"""The log of a running service.

Ids lead from a request to its job. Prompts are logged only by a setting, keys and passwords never.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs
from tests.support.serving import free_port, served, wait_until

from alphalayer.auth.api_keys import add_key
from alphalayer.core.errors import InvalidRequest
from alphalayer.jobs.outcomes import record_outcome
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
    with capture_logs() as logs, served(tmp_path, **{"port": 7861, **settings}):
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
