"""A fake engine that waits for a file, and fails if the file contains "broken"."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from alphalayer.core.errors import SetupFailed
from alphalayer.engine.fake import FakeEngine


def create_engine(options: dict[str, Any]) -> FakeEngine:
    """Wait for the file `gate` of the options, then create the engine."""
    gate = Path(options["gate"])
    while not gate.exists():
        time.sleep(0.02)
    if gate.read_text() == "broken":
        raise SetupFailed("the card is gone.", hint="Put it back.")
    return FakeEngine()
