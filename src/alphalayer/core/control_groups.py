"""Limits of the control groups that this process is in: CPUs and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many CPUs the control groups allow, or None without a limit.

    Args:
        root: Root of the file system.

    Source:
        The Linux kernel's documentation of control groups: `cpu.max` in version 2,
        `cpu.cfs_quota_us` in version 1.
    """
    return min(filter(None, map(_read_quota, _folders(root, "cpu"))), default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the bytes that the control groups allow, or None without a limit.

    Args:
        root: Root of the file system.

    Source:
        The Linux kernel's documentation of control groups: `memory.max` in version 2,
        `memory.limit_in_bytes` in version 1, which is nearly 2**63 without a limit.
    """
    return min(filter(None, map(_read_memory, _folders(root, "memory"))), default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the groups with a controller, each with its parents.

    In a container the path may be that on the host. Its parent is then the container's own group.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            parts = Path(path).parts[1:]
            for length in range(len(parts) + 1):
                yield root.joinpath("sys/fs/cgroup", controllers, *parts[:length])


def _read_quota(folder: Path) -> float | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        # missing files, and "max"
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            return int(quota) / int(period) if int(quota) > 0 else None
    return None


def _read_memory(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        # missing files, and "max"
        with contextlib.suppress(OSError, ValueError):
            return int((folder / name).read_text())
    return None
