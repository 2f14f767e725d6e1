"""Packages that not everybody needs, in groups that `pip` calls extras: how to get one, from where this package itself came."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import sys
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from alphalayer.core.errors import SetupFailed


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def require(package: str, extra: str) -> None:
    """Check that a package of an extra is installed.

    Raises:
        SetupFailed: it is missing; the hint is the command that installs the extra.
    """
    if not is_installed(package):
        raise SetupFailed(f"{package} is not installed.", hint=install_hint(extra))


def install_hint(extra: str) -> str:
    """The command that installs an extra here: from the checkout or file that this package was installed from, else from the index."""
    came_from: dict[str, Any] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        # PEP 610: written by pip for what comes from elsewhere than an index
        came_from = json.loads(
            importlib.metadata.distribution("alphalayer").read_text("direct_url.json") or "{}"
        )
    url, wanted = came_from.get("url", ""), f'"alphalayer[{extra}]"'
    if came_from.get("dir_info", {}).get("editable"):
        wanted = f'-e "{url2pathname(urlsplit(url).path)}[{extra}]"'
    elif url:
        wanted = f'"alphalayer[{extra}] @ {url}"'
    # a .venv of run.py may be without a pip of its own
    pip = (
        f"{sys.executable} -m pip"
        if importlib.util.find_spec("pip")
        else f"pip --python {sys.executable}"
    )
    return f"Run: {pip} install {wanted}"
