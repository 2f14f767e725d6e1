"""Real services for tests: the ASGI application on a real port, with its engine process, in a thread of its own."""

from __future__ import annotations

import random
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from alphalayer.config import Settings
from alphalayer.engine.families.configs import SHIPPED
from alphalayer.service.app import create_app
from alphalayer.service.uvicorn_server import Server

FAKE = "alphalayer.engine.fake:create_engine"


def free_port(*also: int) -> int:
    """A port that nobody has, nor those so much above it.

    Not one of those that the system hands out by itself, so that a server which is killed finds it free when it comes back.
    """
    while True:
        port = random.SystemRandom().randrange(11_000, 32_000 - max(also, default=0))
        if all(_is_free(port + each) for each in (0, *also)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def answers(address: str, path: str = "/ping") -> bool:
    """Whether a service is there and answers 200; at `/ping`, that it can draw."""
    try:
        return httpx.get(f"{address}{path}", trust_env=False, timeout=10).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def served(
    folder: Path,
    *,
    engine: str = FAKE,
    engine_options: dict[str, Any] | None = None,
    wait_ready: bool = True,
    **settings: Any,
) -> Iterator[httpx.Client]:
    """A service that keeps everything in `folder`; yields a client with its base URL. The server is in `client.server`."""
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
    app = create_app(Settings(**values), engine=engine, engine_options=engine_options)
    server = Server(app, port=port, drain_s=values["drain_s"])
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        wait_until(lambda: server.started)
        if wait_ready:
            wait_until(lambda: client.get("/ping").status_code == 200, 30)
        client.app = app  # type: ignore[attr-defined]
        try:
            yield client
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the service did not stop"


def put_model(folder: Path) -> Path:
    """A model "apples" that can be listed and chosen, with weights by name only; the fake engine reads none."""
    model = folder / "models" / "Stable-diffusion" / "apples"
    shutil.copytree(SHIPPED, model)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (model / part / "model.safetensors").touch()
    return folder


def put_lora(folder: Path) -> Path:
    """A LoRA "style" that can be named; the fake engine does not read it."""
    loras = folder / "models" / "Lora"
    loras.mkdir(parents=True)
    (loras / "style.safetensors").touch()
    return folder


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    """Poll until a condition holds; fails after a time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
