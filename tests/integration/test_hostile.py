"""Short form of `tests.stress.hostile`: each attack once, in small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.stress import hostile

SCALE = 0.01
SLOW = {"half_sent_requests", "malformed_requests"}
"""Attacks that wait for time limits. `test_http_limits.py` has them with short limits."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_hostile_requests_and_files_are_refused(tmp_path: Path):
    outcomes = hostile.run(tmp_path, SCALE, skipped=SLOW)
    assert {name: outcome.failures for name, outcome in outcomes.items() if outcome.failures} == {}
    assert sum(outcome.tried for outcome in outcomes.values()) > 500
    assert max(outcome.memory_mb for outcome in outcomes.values()) < hostile.MEMORY_MB
