"""Every route of every dialect, right and wrong, held against recorded answers as a whole: `golden/*.json`.

An entry is a request, and the status, type and body of its answer; what differs from run to run is masked. `{id}` and `{filename}` in
a path are those of the last answer that had one, `until` is a state that is waited for, `anonymous` leaves the password out.
A new route: write its requests into the file. A change that is meant: `ALPHALAYER_GOLDEN=write pytest tests/contract/test_golden.py`
records all answers again; read the difference before it is committed.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.contract.masks import masked
from tests.support.serving import put_model, served

GOLDEN = Path(__file__).parent / "golden"
PREFIXES = {"native": "/alpha/v1/", "a1111": "/sdapi/v1/", "openai": "/v1/"}
MAY_WRITE = os.environ.get("ALPHALAYER_GOLDEN") == "write"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = put_model(tmp_path_factory.mktemp("service"))
    (folder / "models" / "Lora").mkdir()
    (folder / "models" / "Lora" / "shiny.safetensors").write_bytes(b"")
    with served(folder, api_auth="ann:secret") as client:
        yield client


class Player:
    """Sends the requests of a file in their order."""

    def __init__(self, client: httpx.Client):
        self._client = client
        self._seen = {"id": "", "filename": ""}

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Status, type and masked body."""
        path = asked["path"].format(**self._seen) if "{" in asked["path"] else asked["path"]
        auth = None if asked.get("anonymous") else ("ann", "secret")
        content = {"json": asked["json"]} if "json" in asked else {"content": asked.get("content")}
        for _ in range(600):
            got = self._client.request(
                asked["method"], path, auth=auth, headers=asked.get("headers"), **content
            )
            kind = got.headers.get("content-type", "").partition(";")[0]
            body = self._read(got, kind)
            if "until" not in asked or body["state"] == asked["until"]:
                break
            time.sleep(0.05)
        self._remember(body)
        return {"status": got.status_code, "type": kind, "body": masked(body)}

    def _read(self, got: httpx.Response, kind: str) -> Any:
        if kind == "text/event-stream":
            return [
                _event(each) for each in got.text.strip().split("\n\n") if not each.startswith(":")
            ]
        return got.json() if kind.endswith("json") else f"<{kind}>"

    def _remember(self, body: Any) -> None:
        for name in self._seen if isinstance(body, dict) else ():
            if isinstance(body.get(name), str):
                self._seen[name] = body[name]


def _event(block: str) -> dict[str, Any]:
    fields = dict(line.split(": ", 1) for line in block.splitlines())
    return {**fields, "data": json.loads(fields["data"])}


@pytest.mark.parametrize("dialect", ["native", "a1111", "openai", "mcp"])
def test_answers_are_as_recorded(client: httpx.Client, dialect: str):
    if dialect == "mcp":
        pytest.importorskip("fastmcp")
    file = GOLDEN / f"{dialect}.json"
    entries, player = json.loads(file.read_text()), Player(client)
    found = [
        {"request": each["request"], "answer": player.answer(each["request"])} for each in entries
    ]
    if MAY_WRITE:
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    for got, recorded in zip(found, entries, strict=True):
        assert got == recorded or MAY_WRITE, got["request"]


@pytest.mark.parametrize("dialect", PREFIXES)
def test_every_route_is_recorded_right_and_wrong(client: httpx.Client, dialect: str):
    entries = json.loads((GOLDEN / f"{dialect}.json").read_text())
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method in methods if path.startswith(PREFIXES[dialect]) else ():
            route = re.compile(re.sub(r"\{\w+\}", "[^/]+", path) + r"(\?.*)?")
            mine = [each for each in entries if route.fullmatch(each["request"]["path"])]
            statuses = [
                each["answer"]["status"]
                for each in mine
                if each["request"]["method"] == method.upper()
            ]
            assert any(status >= 400 for status in statuses), f"no error of {method} {path}"
            assert 501 in statuses or any(status < 400 for status in statuses), (
                f"no success of {method} {path}"
            )
