"""The short form of `tests.stress.kills`."""

from __future__ import annotations

import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.stress import crowd, kills
from tests.support.serving import wait_until


class FailingHandler(BaseHTTPRequestHandler):
    """A handler that answers each request with 500."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_error(500)

    def log_message(self, *_: object) -> None:
        pass


def test_crowd_closes_after_a_failing_service(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crowd, "LAST_S", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), FailingHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        clients = crowd.Crowd([f"http://127.0.0.1:{server.server_port}"], 2)
        wait_until(lambda: len(clients.failures) > 2)
        closing = threading.Thread(target=clients.close, daemon=True)
        closing.start()
        closing.join(10)
        server.shutdown()
    assert not closing.is_alive()


@pytest.mark.skipif(
    sys.platform == "win32" or not shutil.which("pgrep"), reason="needs kill -9 and pgrep"
)
def test_kills_lose_or_repeat_no_accepted_job(tmp_path: Path):
    result = kills.run(tmp_path, engine_kills=2, service_kills=1)
    assert result["errors"] == []
    assert result["done"] > 10
