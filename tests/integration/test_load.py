"""A crowd at the door: as many as there is room for are let in, the others are told when to come back, and nobody let in is lost."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from benchmarks import server


@pytest.mark.skipif(sys.platform == "win32", reason="reads /proc")
def test_a_crowd(tmp_path: Path):
    # the engine is at the first job for as long as the crowd comes: it holds one, and so many wait
    with server.Service(tmp_path, 60.0, 50) as service:
        met = asyncio.run(server.crowd(service, 200))
        assert met["accepted"] == 51
        assert met["told_to_come_back"] == 150
        assert met["with_retry_after"] == 150
    with server.Service(tmp_path, 0.0, 50) as service:
        assert asyncio.run(server.count_done(service, met["ids"])) == 51
