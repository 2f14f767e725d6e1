"""Commands that install an extra, for each source of the installed package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from alphalayer.core.optional_dependencies import install_hint


def _set_install_source(folder: Path, monkeypatch: pytest.MonkeyPatch, source: object) -> None:
    """Pretend that the package was installed from `source`."""
    info = folder / "alphalayer-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: alphalayer\nVersion: 1\n")
    if source:
        (info / "direct_url.json").write_text(json.dumps(source))
    distribution = importlib.metadata.Distribution.at(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: distribution)


@pytest.mark.parametrize(
    ("source", "requirement"),
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
def test_install_hint_follows_how_the_package_was_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: object, requirement: str
):
    _set_install_source(tmp_path, monkeypatch, source)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert install_hint("shared") == f"Run: {sys.executable} -m pip install {requirement}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert install_hint("shared") == f"Run: pip --python {sys.executable} install {requirement}"
