"""The start line of AUTOMATIC1111 and Forge, as `launch.py` passes it on, over real HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
from tests.support.serving import free_port, wait_until


def test_serve_as_before_answers_the_routes_of_forge(tmp_path: Path):
    port = free_port()
    flags = ["--nowebui", "--api", "--listen", "--port", str(port), "--cors-allow-origins", "*"]
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("ALPHALAYER_")
    }
    # an address before --listen stays
    environment = {
        **inherited,
        "COMMANDLINE_ARGS": "--server-name 127.0.0.1 --xformers --always-cpu",
    }
    command = [sys.executable, "-m", "alphalayer", "serve-as-before", *flags]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            wait_until(lambda: _answers(client), 60)
            models = client.get("/sdapi/v1/sd-models", headers={"Origin": "https://example.com"})
            assert models.status_code == 200
            assert models.headers["access-control-allow-origin"] == "*"
            assert {"title", "model_name", "hash", "sha256", "filename", "config"} <= models.json()[
                0
            ].keys()
            assert client.get("/docs").status_code == 200
            assert client.get("/readyz").json()["engines"].keys() == {"cpu"}
        assert "warning: --xformers has no effect here" in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(30)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/livez").status_code == 200
    except httpx.TransportError:
        return False
