"""The short form of `tests.stress.pods`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.servers import postgres_programs, s3_program
from tests.stress import pods


@pytest.mark.skipif(sys.platform == "win32" or not postgres_programs() or not s3_program(), reason="needs servers")
def test_pods_and_workers_die_and_no_job_is_lost(tmp_path: Path):
    result = pods.run(tmp_path, pods=2, workers=2, jobs=30, kills=4)
    assert result["faults"] == []
    assert result["done"] >= 30
