"""Hashes of model files as that ecosystem writes them, remembered by size and modification time."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

SHORT_HASH_DIGITS = 10


class HashCache:
    """SHA-256 by file, in one small JSON file; where that cannot be written, hashes live as long as the process."""

    def __init__(self, file: Path):
        self._file = file
        self._known: dict[str, Any] = {}
        try:
            loaded = json.loads(file.read_text())
            self._known = loaded if isinstance(loaded, dict) else {}
        except (OSError, ValueError, RecursionError):
            pass

    def known(self, path: Path) -> str | None:
        """The SHA-256 of a file if it is known and the file is as it was."""
        entry = self._known.get(str(path.resolve()))
        return (
            entry["sha256"]
            if isinstance(entry, dict) and entry.get("stamp") == [*file_stamp(path)]
            else None
        )

    def sha256(self, path: Path) -> str:
        """The SHA-256 of a whole file, 64 hex digits."""
        known = self.known(path)
        if known:
            return known
        digest = file_sha256(path)
        self._known[str(path.resolve())] = {"stamp": [*file_stamp(path)], "sha256": digest}
        self._save()
        return digest

    def _save(self) -> None:
        try:
            with tempfile.NamedTemporaryFile(
                "w", dir=self._file.parent, delete=False, suffix=".tmp"
            ) as file:
                json.dump(self._known, file, indent=1)
            os.replace(file.name, self._file)  # noqa: PTH105
        except OSError:
            pass  # a read-only models folder is no reason to fail


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change (ns), by which a file that was written anew is known; (-1, -1) where there is none."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
