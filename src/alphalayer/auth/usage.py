"""Time of each key's last use, stored beside the journal and shown by `keys list`."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from alphalayer.auth.files import replace_file
from alphalayer.observability.logging import log

FILE = "keys-used.json"
"""Name of the file in `data_dir`."""
STORE_EVERY_S = 60.0
_TIMES: TypeAdapter[dict[str, float]] = TypeAdapter(dict[str, float])


def read_usage(file: Path) -> dict[str, float]:
    """Return the last use of each key in Unix seconds, by name. It may be incomplete."""
    try:
        return _TIMES.validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return {}


class KeyUsage:
    """Last use of each key of one service."""

    def __init__(self, file: Path):
        self._file = file
        self._new: dict[str, float] = {}
        self._has_failed = False

    def record(self, name: str) -> None:
        """Record a use of a key."""
        self._new[name] = time.time()

    async def run(self) -> None:
        """Store the uses once a minute, and at the end."""
        try:
            while True:
                await asyncio.sleep(STORE_EVERY_S)
                await asyncio.to_thread(self.store)
        finally:
            self.store()

    def store(self) -> None:
        """Store the new uses. If the folder is not writable, they are lost.

        The log has one line about it: a container may have a read-only file system for good.
        """
        new, self._new = self._new, {}
        if not new:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            times = _TIMES.dump_json(read_usage(self._file) | new, indent=1)
            replace_file(self._file, f"{times.decode()}\n")
        except OSError as error:
            if not self._has_failed:
                log.warning("api_keys.usage_not_stored", error=str(error))
            self._has_failed = True
