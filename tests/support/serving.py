"""Real services for tests: the application on a port, in a thread, with its engine process."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from alphalayer.config import Settings
from alphalayer.core.modes import DECODER_FILES, ENCODER_FILES, MODES
from alphalayer.service.app import create_app
from alphalayer.service.connections import ConnectionLimits
from alphalayer.service.uvicorn_server import Server
from alphalayer.worker.supervisor import Supervisor

FAKE = "alphalayer.engine.fake:create_engine"


def free_port(*offsets: int) -> int:
    """Return a free port; the ports at `offsets` above it are free, too.

    It is outside the system's ephemeral range, so that a restarted server finds it free again.
    """
    while True:
        port = random.SystemRandom().randrange(11_000, 32_000 - max(offsets, default=0))
        if all(_is_free(port + offset) for offset in (0, *offsets)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def answers(address: str, path: str = "/ping") -> bool:
    """Return whether a service answers 200; at `/ping`, that it can generate."""
    try:
        return httpx.get(f"{address}{path}", trust_env=False, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def served(
    folder: Path,
    *,
    engine: str | None = FAKE,
    engine_options: dict[str, Any] | None = None,
    wait_ready: bool = True,
    limits: ConnectionLimits = ConnectionLimits(),
    **settings: Any,
) -> Iterator[httpx.Client]:
    """Run a service that keeps its files in `folder`; yield a client for it.

    Without an engine, no engine process is started, and jobs wait in the queue.
    `client.app` is its application, `client.server` its server.
    """
    port = free_port()
    values = {
        "models_dir": folder / "models",
        "embeddings_dir": folder / "embeddings",
        "outputs_dir": folder / "outputs",
        "data_dir": folder / "data",
        "port": port,
        "device": "cpu",
        "drain_s": 5,
        **settings,
    }
    app = create_app(Settings(**values), engine=engine or FAKE, engine_options=engine_options)
    server = Server(app, port=port, drain_s=values["drain_s"], limits=limits)
    thread = threading.Thread(target=server.run, daemon=True)
    without_engine = patch.object(Supervisor, "_run_process", _run_no_process)
    with (
        nullcontext() if engine else without_engine,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client,
    ):
        thread.start()
        wait_until(lambda: server.started)
        # an unknown path makes FastAPI build all routes, which must not happen in two threads
        assert client.get("/no-such-path").status_code == 404
        if engine and wait_ready:
            wait_until(lambda: client.get("/ping").status_code == 200, 30)
        client.app, client.server = app, server  # type: ignore[attr-defined]
        try:
            yield client
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the service did not stop"


async def _run_no_process(_supervisor: Supervisor) -> str:
    await asyncio.Event().wait()
    return ""


@contextmanager
def serve_handler(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a server with a handler; yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


NO_TENSORS = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file."""


def put_model(folder: Path) -> Path:
    """Add a model "apples" and LayerDiffuse, with empty weights for the fake engine."""
    # not at the top: it imports torch, which a service in a process of its own must not have
    from alphalayer.engine.families.configs import SHIPPED

    model = folder / "models" / "Stable-diffusion" / "apples"
    shutil.copytree(SHIPPED, model)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (model / part / "model.safetensors").write_bytes(NO_TENSORS)
    layers = folder / "models" / "layer_model"
    layers.mkdir(exist_ok=True)
    files = [mode.files for mode in MODES.values()] + [*DECODER_FILES.values()]
    for names in filter(None, [*files, *ENCODER_FILES.values()]):
        (layers / names[0]).write_bytes(NO_TENSORS)
    return folder


def put_lora(folder: Path) -> Path:
    """Add an empty LoRA "style", which the fake engine does not read."""
    loras = folder / "models" / "Lora"
    loras.mkdir(parents=True)
    (loras / "style.safetensors").touch()
    return folder


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    """Poll until a condition holds; fail after `timeout_s` seconds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
