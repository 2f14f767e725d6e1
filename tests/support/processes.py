"""Child processes of a process, and suspended processes. Linux and macOS only."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


def children_of(pid: int) -> list[int]:
    """Return the ids of the child processes of a process."""
    result = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in result.stdout.split()]


@contextmanager
def suspended(pid: int) -> Iterator[None]:
    """Suspend a process and its children. They answer nothing and keep their connections."""
    pids = [pid, *children_of(pid)]
    for process_id in pids:
        os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        for process_id in pids:
            os.kill(process_id, signal.SIGCONT)
