"""A service with the fake engine in a process, for tests that kill it.

`python -m tests.support.fake_service FOLDER PORT STEP_S [QUEUE_LIMIT]`. With REAL_ENGINE=1 in the
environment, it generates with the embedded model.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from alphalayer.config import Settings
from alphalayer.observability.logging import configure_logging
from alphalayer.service.app import create_app
from alphalayer.service.connections import ConnectionLimits
from alphalayer.service.uvicorn_server import Server, serve
from tests.support.serving import FAKE

PROGRAM = """
import gc

gc.disable()
from tests.support import fake_service

gc.enable()
fake_service.main()
"""
"""A start takes a sixth less time without garbage collections, which free no import."""


def start(
    folder: Path,
    port: int,
    step_s: float,
    queue_limit: int = 200,
    environment: dict[str, str] | None = None,
    host: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start a service; `host` is a prefix that runs a command on another host."""
    arguments = [str(folder), str(port), str(step_s), str(queue_limit)]
    with (folder / "service.log").open("ab") as log:
        command = [*host, sys.executable, "-c", PROGRAM, *arguments]
        return subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **(environment or {})}
        )


def main() -> None:
    folder, port, step_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    settings = Settings(
        models_dir=folder / "models",
        outputs_dir=folder / "outputs",
        data_dir=folder / "data",
        port=port,
        device="cpu",
        queue_limit=int(sys.argv[4]) if len(sys.argv) > 4 else 200,
    )
    configure_logging(settings.log_level, settings.log_json)
    # without the MCP tool, which no test of such a process calls, a start takes a third less time
    sys.modules["fastmcp"] = None  # type: ignore[assignment]
    fake = {"engine": FAKE, "engine_options": {"step_s": step_s}}
    app = create_app(settings, **({} if os.environ.get("REAL_ENGINE") else fake))
    limits = ConnectionLimits(
        connections=settings.max_connections, upload_s=settings.upload_timeout_s
    )
    serve(Server(app, port=port, drain_s=settings.drain_s, limits=limits))


if __name__ == "__main__":
    main()
