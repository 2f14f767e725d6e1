"""The serverless worker with the loop of the SDK and a job API like that of Runpod.

Another test uses the local server of the SDK.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from tests.support.serving import free_port, wait_until

from alphalayer.api.native.layers import LayersRequest
from alphalayer.config import Settings
from alphalayer.core.errors import InvalidRequest
from alphalayer.engine.fake import FakeEngine
from alphalayer.images import codecs
from alphalayer.integrations import runpod as serverless
from alphalayer.integrations.runpod import Handler

pytestmark = pytest.mark.skipif(not find_spec("runpod"), reason="needs runpod")
START = """
from alphalayer.integrations.runpod import Handler
import runpod
from alphalayer.config import Settings

handler = Handler(Settings(device='cpu'), 'alphalayer.engine.fake:create_engine')
runpod.serverless.start({'handler': handler})
"""


class JobApi:
    """A job API like that of Runpod, which keeps the progress and the results."""

    def __init__(self, jobs: list[dict[str, Any]]):
        self.waiting = list(jobs)
        self.progress: list[Any] = []
        self.results: dict[str, Any] = {}
        jobs_api = self

        class Api(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if "job-take" in self.path and jobs_api.waiting:
                    body, status = json.dumps(jobs_api.waiting.pop(0)).encode(), 200
                else:
                    body, status = b"", 204 if "job-take" in self.path else 200
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if body.get("status") == "IN_PROGRESS":
                    jobs_api.progress.append(body["output"])
                else:
                    jobs_api.results[self.headers["X-Request-ID"]] = body
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def worker(
    folder: Path, *flags: str, start: str = START, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", start, *flags],
            cwd=folder,
            env={**os.environ, "RUNPOD_SKIP_GPU_CHECK": "true", **environment},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def test_serverless_worker_returns_images_and_errors(tmp_path):
    small = {"width": 64, "height": 64, "steps": 3}
    # a transparent image
    image = codecs.encode(np.full((64, 64, 4), 99, np.uint8))
    glass = {"image": base64.b64encode(image).decode()}
    jobs = JobApi(
        [
            {"id": "good", "input": {"prompt": "an apple", "batch_size": 2, **small}},
            {"id": "one", "input": {"prompt": "an apple", **small}},
            {"id": "wrong", "input": {"prompt": "an apple", "steps": 0}},
            {
                "id": "changed",
                "input": {"prompt": "x", "task": "img2img", **glass, **small},
            },
            {"id": "layers", "input": {"prompt": "x", "task": "layers", **small}},
            {"id": "odd", "input": {"prompt": "x", "task": "odd"}},
            {"id": "large", "input": {"prompt": "an apple", "n_iter": 8, "batch_size": 8, **small}},
        ]
    )
    environment = {
        "RUNPOD_WEBHOOK_GET_JOB": f"{jobs.address}/job-take/$ID",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{jobs.address}/job-done/$RUNPOD_POD_ID/$ID",
        "RUNPOD_WEBHOOK_PING": f"{jobs.address}/ping",
        "RUNPOD_POD_ID": "pod",
        "RUNPOD_AI_API_KEY": "key",
    }
    with worker(
        tmp_path,
        start=f"import alphalayer.integrations.runpod as s; s.MAX_RESULT_BYTES = 20_000; {START}",
        **environment,
    ):
        wait_until(lambda: len(jobs.results) == 7, 60)
    jobs.server.shutdown()
    jobs.server.server_close()
    answer = jobs.results["good"]["output"]
    assert len(answer["images"]) == 2
    image, parameters = codecs.decode(base64.b64decode(answer["base64"]))
    assert image.shape == (64, 64, 4)
    assert "Seed: 12345" in (parameters or "")
    assert json.loads(answer["info"])["all_seeds"] == [12345, 12346]
    assert {"step": 1, "steps": 3} in jobs.progress
    one = jobs.results["one"]["output"]
    assert codecs.decode(base64.b64decode(one["base64"]))[0].shape == (64, 64, 4)
    assert "images" not in one
    assert "base64" in jobs.results["changed"]["output"]
    roles = [image["role"] for image in jobs.results["layers"]["output"]["images"]]
    assert roles == ["background", "foreground", "blended", "composite"]
    assert list((tmp_path / "outputs").iterdir()) == []
    assert json.loads(jobs.results["odd"]["error"])["field"] == "task"
    problem = json.loads(jobs.results["wrong"]["error"])
    assert (problem["code"], problem["field"]) == ("invalid_request", "steps")
    problem = json.loads(jobs.results["large"]["error"])
    assert problem["code"] == "result_too_large"
    assert "ALPHALAYER_STORAGE" in problem["hint"]


def test_serverless_sdk_server_renders_the_test_input(tmp_path):
    port = free_port()
    body = json.loads((Path(__file__).parents[2] / "deploy/runpod/test_input.json").read_text())
    body["input"] |= {"width": 64, "height": 64}
    with worker(
        tmp_path, "--rp_serve_api", "--rp_api_port", str(port), "--rp_api_host", "127.0.0.1"
    ):
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: _answers(address), 60)
        answer = httpx.post(f"{address}/runsync", json=body, timeout=60, trust_env=False).json()
    assert codecs.decode(base64.b64decode(answer["output"]["base64"]))[0].shape == (64, 64, 4)


class BrokenEngine(FakeEngine):
    """A GPU that no longer works."""

    def render(self, tasks: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure")


def create_broken(_options: Any) -> BrokenEngine:
    return BrokenEngine()


def test_serverless_broken_gpu_refreshes_the_worker(tmp_path):
    settings = Settings(device="cpu", outputs_dir=tmp_path, models_dir=tmp_path)
    handler = Handler(settings, "tests.integration.test_serverless:create_broken")
    answer = asyncio.run(handler({"id": "job", "input": {"prompt": "an apple"}}))
    assert answer["refresh_worker"] is True
    assert json.loads(answer["error"])["code"] == "engine_failed"


def make_handler(folder: Path) -> Handler:
    settings = Settings(device="cpu", outputs_dir=folder / "outputs", models_dir=folder)
    return Handler(settings, "alphalayer.engine.fake:create_engine")


@pytest.mark.parametrize(
    ("sent", "field"),
    [("abc", "input"), ([1], "input"), ({"task": []}, "task"), ({"task": {}}, "task")],
)
def test_serverless_input_of_a_wrong_type_is_named(tmp_path: Path, sent: Any, field: str):
    answer = asyncio.run(make_handler(tmp_path)({"id": "job", "input": sent}))
    assert set(answer) == {"error"}
    problem = json.loads(answer["error"])
    assert (problem["code"], problem["field"]) == ("invalid_request", field)


def test_serverless_refused_request_leaves_no_input(tmp_path: Path):
    image = codecs.encode(np.full((64, 64, 4), 255, np.uint8))
    body = {"task": "img2img", "prompt": "x", "image": base64.b64encode(image).decode()}
    answer = asyncio.run(make_handler(tmp_path)({"id": "job", "input": body}))
    assert json.loads(answer["error"])["code"] == "invalid_request"
    assert not list(tmp_path.rglob("input_*"))


def test_serverless_layers_are_those_of_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = SimpleNamespace(family="sd15")
    monkeypatch.setattr(serverless, "resolve_model", lambda *_: entry)
    contexts: list[str] = []

    def to_spec(_request: Any, context: Any) -> Any:
        contexts.append(context.family)
        raise InvalidRequest("enough.")

    monkeypatch.setattr(LayersRequest, "to_spec", to_spec)
    asyncio.run(make_handler(tmp_path)({"id": "job", "input": {"task": "layers", "prompt": "x"}}))
    assert contexts == ["sd15"]


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
