"""Writing files of a folder so that each is whole, whenever the process is killed or the power fails."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from pathlib import Path

ABANDONED_S = 600.0
"""Nobody writes a picture for so long."""
_UNFINISHED = re.compile(r"[^#]+#\d+")
"""Names that obstore takes for no files."""


def write(folder: Path, key: str, data: bytes, *, replace: bool) -> None:
    """Write a file of a folder; one that is there stays, unless it is to be replaced. A new one has its name only once its bytes are safe
    from a power cut, and when this returns, the name is, too: obstore syncs neither. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{key}#{secrets.randbits(64)}"
    try:
        with unfinished.open("xb") as file:
            file.write(data)
            if not replace:
                file.flush()
                os.fsync(file.fileno())
        if replace:
            unfinished.replace(folder / key)
            return
        try:
            (folder / key).hardlink_to(unfinished)
        except FileExistsError:
            return
        except OSError:
            # some file systems (exFAT, many SMB shares) have no links
            if (folder / key).exists():
                return
            unfinished.replace(folder / key)
        _sync(folder)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote, here or, a while ago, elsewhere. Raises `OSError`."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()


def _sync(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, and their changes are written as they are made
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not know how
            raise
    finally:
        os.close(opened)
