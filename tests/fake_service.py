"""A service with the fake engine as a process of its own, for tests that kill it: `python -m tests.fake_service FOLDER PORT STEP_S`."""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn

from alphalayer.app import create_app
from alphalayer.config import Settings


def main() -> None:
    folder, port, step_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    settings = Settings(
        models_dir=folder / "models", outputs_dir=folder / "outputs", data_dir=folder / "data", port=port, device="cpu"
    )
    app = create_app(settings, engine="alphalayer.engine.fake:create_engine", engine_options={"step_s": step_s})
    uvicorn.run(app, port=port, log_config=None, proxy_headers=False)


if __name__ == "__main__":
    main()
