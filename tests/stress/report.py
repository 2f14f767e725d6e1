"""Reports of the stress tests: command, machine and result, as JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any


def write_report(name: str, result: dict[str, Any], file: Path | None) -> None:
    """Print a report, and write it to a file if there is one.

    Args:
        name: Name of the test in `tests.stress`.
        result: What the test was and what it showed.
        file: The file for the report.
    """
    header = {
        "command": shlex.join(["python", "-m", f"tests.stress.{name}", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}",
    }
    text = json.dumps({**header, **result}, indent=1)
    print(text)
    if file:
        file.write_text(text + "\n")
