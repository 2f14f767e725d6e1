"""Writing files of a folder so that each is whole, whenever the process is killed or the power fails."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from pathlib import Path

from alphalayer.core.job import job_prefix_of
from alphalayer.observability.logging import log

ABANDONED_S = 600.0
"""Nobody writes a picture for so long."""


def write(folder: Path, key: str, data: bytes, *, replace: bool) -> None:
    """Write a file of a folder; one that is there stays, unless it is to be replaced. A new one has its name only once its bytes are safe
    from a power cut, and when this returns, the name is, too: obstore syncs neither. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    # obstore takes names that end so for no files
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
            pass  # whoever wrote it may not have come to the sync below
        except OSError:
            # some file systems (exFAT, many SMB shares) have no links
            if not (folder / key).exists():
                unfinished.replace(folder / key)
        _sync(folder)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes left that were killed a while ago as they wrote pictures. What cannot be removed is logged; files of others
    stay. Raises `OSError` where there is no folder."""
    for path in folder.iterdir():
        key, _, number = path.name.partition("#")
        if not number.isdigit() or not job_prefix_of(key):
            continue
        try:
            about = path.lstat()
            if stat.S_ISREG(about.st_mode) and time.time() - about.st_mtime > ABANDONED_S:
                path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("storage.temporary_file_kept", file=str(path), error=error.strerror)


def _sync(folder: Path) -> None:
    if (
        os.name == "nt"
    ):  # folders cannot be opened there, and their changes are written as they are made
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does not know how
            raise
    finally:
        os.close(opened)
