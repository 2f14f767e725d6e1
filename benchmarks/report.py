"""What every benchmark writes: benchmarks/results/NAME-<date>.json with the command, the machine and its load before and after."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_LOAD_BEFORE = os.getloadavg()


def machine() -> str:
    """How many cores of which processor, and the Python."""
    names = [
        line.partition(": ")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}, Python {platform.python_version()}"


def write_report(name: str, report: dict[str, Any], path: Path | None = None) -> None:
    """Write what `benchmarks/NAME.py` found, there or at another path, with all that it was called with."""
    about = {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "machine": machine(),
        "load_of_the_machine": {"before": _LOAD_BEFORE, "after": os.getloadavg()},
    }
    path = path or RESULTS / f"{name.replace('_', '-')}-{date.today()}.json"
    path.write_text(json.dumps({**about, **report}, indent=1) + "\n")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
