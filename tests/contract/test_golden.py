"""Recorded answers of every route of every dialect, with and without errors: `golden/*.json`.

A key is the method, the route and the case. A value is the request, and the status, type and
body of its answer. `tests.contract.masks` replaces what differs between runs. A request has:

    path        where it differs from the route; `{job_id}` and `{filename}` come from the last
                answer that had one
    json        or `content`, and `headers`
    until       the state of the job to wait for
    anonymous   true to send no password

The cases of a file run in their order. To add a case, write its key and request, and record it:
`ALPHALAYER_GOLDEN=write pytest tests/contract/test_golden.py`. That renews all answers; review
the difference.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.contract.masks import masked
from tests.support.serving import put_model, served

from alphalayer.service.app import DIALECTS

GOLDEN = Path(__file__).parent / "golden"
IS_RECORDING = os.environ.get("ALPHALAYER_GOLDEN") == "write"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"a key occurs twice in {[key for key, _ in pairs]}"
    return dict(pairs)


CASES = {
    file.stem: json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    for file in sorted(GOLDEN.glob("*.json"))
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = put_model(tmp_path_factory.mktemp("service"))
    (folder / "models" / "Lora").mkdir()
    (folder / "models" / "Lora" / "shiny.safetensors").write_bytes(b"")
    with served(folder, api_auth="ann:secret") as client:
        yield client


@pytest.fixture(scope="module")
def play(client: httpx.Client) -> Callable[[str], dict[str, Any]]:
    """Return a function that plays a dialect once and returns its answers by key."""
    return cache(lambda dialect: _play(client, dialect))


def _play(client: httpx.Client, dialect: str) -> dict[str, Any]:
    cases, player = CASES[dialect], Player(client)
    answers = {key: player.play(key, case["request"]) for key, case in cases.items()}
    if IS_RECORDING:
        for key, case in cases.items():
            case["answer"] = answers[key]
        text = json.dumps(cases, indent=1, ensure_ascii=False) + "\n"
        (GOLDEN / f"{dialect}.json").write_text(text, encoding="utf-8")
    return answers


class Player:
    """Sender of recorded requests, which remembers the names in the answers."""

    def __init__(self, client: httpx.Client):
        self._client = client
        self._names = {"job_id": "", "filename": ""}

    def play(self, key: str, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the status, type and masked body of its answer."""
        method, route = key.partition(": ")[0].split()
        path = request.get("path", route).format(**self._names)
        auth = None if request.get("anonymous") else ("ann", "secret")
        options = {
            name: request[name] for name in ("json", "content", "headers") if name in request
        }
        for _ in range(600):
            response = self._client.request(method, path, auth=auth, **options)
            kind = response.headers.get("content-type", "").partition(";")[0]
            body = _read_body(response, kind)
            if "until" not in request or body["state"] == request["until"]:
                break
            time.sleep(0.05)
        self._remember(body)
        return {"status": response.status_code, "type": kind, "body": masked(body)}

    def _remember(self, body: Any) -> None:
        fields = body if isinstance(body, dict) else {}
        for name, field in (("job_id", "id"), ("filename", "filename")):
            if isinstance(fields.get(field), str):
                self._names[name] = fields[field]


def _read_body(response: httpx.Response, kind: str) -> Any:
    if kind == "text/event-stream":
        blocks = response.text.strip().split("\n\n")
        return [_parse_event(block) for block in blocks if not block.startswith(":")]
    return response.json() if kind.endswith("json") else f"<{kind}>"


def _parse_event(block: str) -> dict[str, Any]:
    fields = dict(line.split(": ", 1) for line in block.splitlines())
    return {**fields, "data": json.loads(fields["data"])}


@pytest.mark.parametrize(
    ("dialect", "key"),
    [pytest.param(dialect, key, id=key) for dialect, cases in CASES.items() for key in cases],
)
def test_answer_is_as_recorded(play: Callable[[str], dict[str, Any]], dialect: str, key: str):
    if dialect == "mcp":
        pytest.importorskip("fastmcp")
    assert play(dialect)[key] == CASES[dialect][key]["answer"]


def test_every_route_has_a_success_and_an_error(client: httpx.Client):
    cases = {key: case for dialect in CASES.values() for key, case in dialect.items()}
    prefixes = tuple(f"{dialect.prefix}/" for dialect in DIALECTS)
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method in methods if path.startswith(prefixes) else ():
            route = f"{method.upper()} {path}"
            statuses = [
                case["answer"]["status"]
                for key, case in cases.items()
                if key.startswith(f"{route}: ")
            ]
            assert any(status >= 400 for status in statuses), f"no error of {route}"
            is_missing = f"{route}: not available" in cases
            assert is_missing or any(status < 400 for status in statuses), f"no success of {route}"
