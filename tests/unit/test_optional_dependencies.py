"""How to get an extra, as it is said for each way that the package may have been installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from alphalayer.core.optional_dependencies import install_hint


def _installed(folder: Path, monkeypatch: pytest.MonkeyPatch, came_from: object) -> None:
    """As if the package was installed so."""
    info = folder / "alphalayer-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: alphalayer\nVersion: 1\n")
    if came_from:
        (info / "direct_url.json").write_text(json.dumps(came_from))
    found = importlib.metadata.Distribution.at(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: found)


@pytest.mark.parametrize(
    ("came_from", "what"),
    [
        (None, '"alphalayer[shared]"'),
        (
            {"url": "file:///my%20work/al", "dir_info": {"editable": True}},
            '-e "/my work/al[shared]"',
        ),
        (
            {"url": "file:///tmp/alphalayer.whl", "archive_info": {}},
            '"alphalayer[shared] @ file:///tmp/alphalayer.whl"',
        ),
    ],
)
def test_an_extra_comes_from_where_the_package_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, came_from: object, what: str
):
    _installed(tmp_path, monkeypatch, came_from)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert install_hint("shared") == f"Run: {sys.executable} -m pip install {what}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert install_hint("shared") == f"Run: pip --python {sys.executable} install {what}"
