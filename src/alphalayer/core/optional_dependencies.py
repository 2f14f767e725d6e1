"""Optional packages, in groups that `pip` calls extras, and how to install them."""

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
    """Return a hint with the command that installs an extra.

    It installs from the source of this package: a checkout, a file or the index.
    """
    origin: dict[str, Any] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        # PEP 610: pip writes it for a package that does not come from an index
        origin = json.loads(
            importlib.metadata.distribution("alphalayer").read_text("direct_url.json") or "{}"
        )
    url, requirement = origin.get("url", ""), f'"alphalayer[{extra}]"'
    if origin.get("dir_info", {}).get("editable"):
        requirement = f'-e "{url2pathname(urlsplit(url).path)}[{extra}]"'
    elif url:
        requirement = f'"alphalayer[{extra}] @ {url}"'
    # the .venv of run.py may have no pip
    pip = (
        f"{sys.executable} -m pip"
        if importlib.util.find_spec("pip")
        else f"pip --python {sys.executable}"
    )
    return f"Run: {pip} install {requirement}"
