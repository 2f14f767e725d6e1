"""SHA-256 hashes of model files, cached by size and modification time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from alphalayer.catalog.files import open_file
from alphalayer.catalog.folders import read_json
from alphalayer.core.errors import CorruptFile

SHORT_HASH_DIGITS = 10
"""Digits of the short hash, as AUTOMATIC1111 writes it."""


class HashCache:
    """Cache of SHA-256 hashes in one JSON file.

    If the file cannot be written, the hashes live as long as the process.
    """

    def __init__(self, file: Path):
        self._file = file
        self._entries: dict[str, Any] = {}
        with suppress(CorruptFile):
            self._entries = read_json(file)

    def get(self, path: Path) -> str | None:
        """Return the cached SHA-256 of a file, or None if it is missing or outdated."""
        entry = self._entries.get(_key(path))
        if isinstance(entry, dict) and entry.get("stamp") == [*file_stamp(path)]:
            sha256 = str(entry.get("sha256"))
            return sha256 if re.fullmatch("[0-9a-f]{64}", sha256) else None
        return None

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a whole file, 64 hex digits."""
        cached = self.get(path)
        if cached:
            return cached
        digest = file_sha256(path)
        self._entries[_key(path)] = {"stamp": [*file_stamp(path)], "sha256": digest}
        self._save()
        return digest

    def _save(self) -> None:
        try:
            with tempfile.NamedTemporaryFile(
                "w", dir=self._file.parent, delete=False, suffix=".tmp"
            ) as file:
                json.dump(self._entries, file, indent=1)
            os.replace(file.name, self._file)  # noqa: PTH105
        except OSError:
            pass  # a read-only models folder is no reason to fail


def _key(path: Path) -> str:
    return os.path.realpath(path)


def open_hash_cache(models_dir: Path) -> HashCache:
    """Open the hash cache of a models folder."""
    return HashCache(models_dir / ".alphalayer-hashes.json")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with open_file(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_stamp(path: Path) -> tuple[int, int]:
    """Return size and modification time (ns), which change if a file is replaced.

    The stamp of a missing file is (-1, -1).
    """
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
