"""Reports of benchmarks: benchmarks/results/NAME-<date>.json.

A report has the command, the machine, and its load before and after.
"""

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
    """Return the number of cores, the processor and the version of Python."""
    names = [
        line.partition(": ")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    processor = names[0] if names else platform.machine()
    return f"{os.cpu_count()} x {processor}, Python {platform.python_version()}"


def write_report(name: str, report: dict[str, Any], path: Path | None = None) -> None:
    """Write the report of `benchmarks/NAME.py`, by default below benchmarks/results."""
    header = {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "machine": machine(),
        "load_of_the_machine": {"before": _LOAD_BEFORE, "after": os.getloadavg()},
    }
    path = path or RESULTS / f"{name.replace('_', '-')}-{date.today()}.json"
    path.write_text(json.dumps({**header, **report}, indent=1) + "\n")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
