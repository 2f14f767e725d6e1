"""The short form of `tests.stress.kills`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from tests.stress import kills


@pytest.mark.skipif(sys.platform == "win32" or not shutil.which("pgrep"), reason="needs kill -9 and pgrep")
def test_no_accepted_job_is_lost_or_done_twice(tmp_path: Path):
    result = kills.run(tmp_path, engine_kills=4, service_kills=2)
    assert result["faults"] == []
    assert result["done"] > 10
