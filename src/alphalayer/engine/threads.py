"""Number of torch's CPU threads, and how they wait. Does not import torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables with which a user decides how threads wait."""
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables with which a user decides how many threads there are."""


def configure_threads(root: Path = Path("/")) -> None:
    """Set the variables of OpenMP that the user has not set.

    OpenMP reads them when torch is imported.

    Threads sleep while they wait for each other. By default they spin, and so take the core
    that the awaited thread needs if other processes are busy.
    There are at most as many threads as the container has CPUs. A thread beyond its quota stops
    all others at their next common point.

    Args:
        root: Root of the file system.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    quota = cpu_quota(root)
    # without a quota torch counts the cores itself, and each physical core once
    if (
        quota is not None
        and quota < len(os.sched_getaffinity(0))
        and not any(name in os.environ for name in COUNTS)
    ):
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many CPUs the control groups allow, or None without a limit.

    Args:
        root: Root of the file system.

    Source:
        The Linux kernel's documentation of control groups: `cpu.max` in version 2,
        `cpu.cfs_quota_us` in version 1.
    """
    return min(filter(None, map(_read_quota, _control_groups(root))), default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups with CPU limits, each with its parents.

    In a container the path may be that on the host. Its parent is then the container's own group.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
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
