"""More clients than the queue accepts: the others get Retry-After, and no accepted job is lost."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from benchmarks import server


@pytest.mark.skipif(sys.platform == "win32", reason="reads /proc")
def test_crowd_over_the_queue_limit_is_refused(tmp_path: Path):
    # the first job runs during all requests, and 50 more wait
    with server.Service(tmp_path, 60.0, 50) as service:
        figures = asyncio.run(server.crowd(service, 200))
        assert figures["accepted"] == 51
        assert figures["refused"] == 150
        assert figures["with_retry_after"] == 150
    with server.Service(tmp_path, 0.0, 50) as service:
        assert asyncio.run(server.count_done(service, figures["ids"])) == 51
