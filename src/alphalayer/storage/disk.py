"""Space and rights of a folder, without writing to it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MIN_FREE_BYTES = 16_000_000
"""Space below which a folder counts as full. A large image needs about as much."""


def find_problem(folder: Path, content: str) -> str | None:
    """Return why files cannot be written to a folder, or None.

    Args:
        folder: The folder. A missing one is created by the next write.
        content: Name of the content for the message, which clients may read.
    """
    path = folder.absolute()
    existing = next((parent for parent in (path, *path.parents) if parent.is_dir()), path)
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return f"the folder of {content} cannot be read: {error.strerror}."
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"the folder of {content} cannot be written to."
    if free < MIN_FREE_BYTES:
        return f"the disk of {content} has {free / 1e6:.1f} MB left."
    return None
