"""Complete files in a local folder, whenever a process is killed or the power fails."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from pathlib import Path

from alphalayer.core.job import job_prefix_of
from alphalayer.observability.logging import log
from alphalayer.storage import is_input

ABANDONED_S = 600.0
"""Seconds after which a write is not running any more."""


def write(folder: Path, key: str, data: bytes, *, replace: bool, renew: bool) -> None:
    """Write a file of a folder.

    A new file gets its name after its content is synced. The name is synced at the return,
    which obstore does not do. Replaced files are not synced.

    Args:
        folder: Path of the folder. It is created if it is missing.
        key: Name of the file.
        data: Content of the file.
        replace: Whether to replace an existing file.
        renew: Whether to set the time of writing of an existing file.

    Raises:
        OSError: The file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # obstore does not list files with such a suffix
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
        _name(unfinished, folder / key, renew=renew)
        # another process may have named the file without the sync
        _sync(folder)
    finally:
        unfinished.unlink(missing_ok=True)


def _name(unfinished: Path, file: Path, *, renew: bool) -> None:
    """Name a complete file, unless a file has the name. Raises `OSError`."""
    try:
        file.hardlink_to(unfinished)
        return
    except FileExistsError:
        pass
    except OSError:
        # some file systems (exFAT, many SMB shares) have no links
        if not file.exists():
            unfinished.replace(file)
            return
    if renew:
        try:
            os.utime(file)
        except FileNotFoundError:
            # retention deleted it meanwhile
            unfinished.replace(file)


def is_plain_file(path: Path) -> bool:
    """Return whether a path is a file itself: no link, pipe, device or folder."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def delete_unfinished(folder: Path) -> None:
    """Delete the temporary files of killed processes.

    Files of other programs stay. A file that cannot be deleted is logged.

    Raises:
        OSError: The folder cannot be read.
    """
    for path in folder.iterdir():
        key, _, number = path.name.partition("#")
        if not number.isdigit() or not (job_prefix_of(key) or is_input(key)):
            continue
        try:
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > ABANDONED_S:
                path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("storage.temporary_file_kept", file=str(path), error=error.strerror)


def _sync(folder: Path) -> None:
    """Sync the names of a folder's files."""
    if os.name == "nt":
        # folders cannot be opened there, and their changes are written at once
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # unsupported by the file system
            raise
    finally:
        os.close(descriptor)
