"""Number of torch's CPU threads, and how they wait. Does not import torch."""

from __future__ import annotations

import os
from pathlib import Path

from alphalayer.core.control_groups import cpu_quota

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
