"""GPUs of this machine, and the environment that shows an engine process one of them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from itertools import takewhile


def engine_environments(device: str) -> dict[str, dict[str, str]]:
    """Return the environment of each engine process by its name.

    There is one process a GPU, which sees that GPU alone, and one process without GPUs.

    Args:
        device: The setting of that name.
    """
    if device not in ("auto", "cuda"):
        return {device: {}}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = _list_gpus() if visible is None else _split(visible)
    # CUDA hides all GPUs from a -1 on
    gpus = takewhile(lambda number: number != "-1", numbers)
    return {f"gpu{gpu}": {"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus} or {"cpu": {}}


def _split(numbers: str) -> list[str]:
    """Return the entries of a list with commas."""
    return [number.strip() for number in numbers.split(",") if number.strip()]


def _list_gpus() -> list[str]:
    """Return the driver's GPU numbers. Partitions of a GPU (MIG) do not count."""
    if not shutil.which("nvidia-smi"):
        return []
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        output = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False
        ).stdout
        return re.findall(r"^GPU (\d+):", output, re.MULTILINE)
    return []
