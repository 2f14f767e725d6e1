"""Files of folders that are not trusted: which there are, how they are named and read.

All names of model files enter the catalog here. Nothing here waits for a pipe or a device, and no
read is larger than its limit.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from alphalayer.core.errors import AlphalayerError, CorruptFile, ModelUnusable

logger = logging.getLogger(__name__)

MAX_PARTS = 1_000_000
"""Limit of the values of a JSON text: parsing as many takes about 0.3 s and 100 MB."""
MAX_DEPTH = 20
MAX_ENTRIES = 100_000
"""Limits of the folders below a listed one. A link may lead to a whole disk."""
# control characters, line separators, directions of text, and bytes that are not UTF-8
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
E = TypeVar("E", bound=AlphalayerError)


@dataclass(frozen=True)
class ListedFile:
    """A file, or what has the name of one. `problem` is the reason why it cannot be read."""

    path: Path
    name: str
    """Path below the listed folder, with replacement characters if it cannot be shown."""
    problem: ModelUnusable | None = None


def list_files(folder: Path, is_listed: Callable[[str], bool]) -> list[ListedFile]:
    """Return the visible files of a folder and its subfolders, sorted by path.

    Links to folders are followed, see `_walk`.

    Args:
        folder: The folder, which may be missing.
        is_listed: Whether a file of this name counts.
    """
    paths = sorted(Path(entry) for entry in _walk(folder) if is_listed(Path(entry).name))
    return [
        ListedFile(path, printable(str(path.relative_to(folder))), _problem(path, folder))
        for path in paths
    ]


def usable_files(folder: Path, suffixes: Sequence[str] = (".safetensors",)) -> list[Path]:
    """Return the files with these suffixes that can be named and read, sorted by path.

    The others are logged once.
    """
    listed = list_files(folder, lambda name: suffix_of(name) in suffixes)
    for file in listed:
        if file.problem:
            _warn_once(str(file.problem))
    return [file.path for file in listed if file.problem is None]


def is_file(path: Path) -> bool:
    """Return whether a file exists. A name that is too long is no error."""
    return os.path.isfile(path)  # noqa: PTH113 - `Path.is_file` raises for such a name


def suffix_of(path: Path | str) -> str:
    """Return the suffix of a file's name in small letters."""
    return Path(path).suffix.lower()


def printable(text: str) -> str:
    """Replace bytes and control characters that cannot be shown."""
    return _UNPRINTABLE.sub("\ufffd", text)


def public_path(path: Path, folder: Path) -> str:
    """Return a path for clients, from the name of a folder on."""
    below = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    return printable(str(Path(folder.absolute().name, below)))


def shorten_paths(error: E, *folders: Path) -> E:
    """Remove what is above some folders from the paths in an error, for clients.

    Args:
        error: The error, which changes.
        folders: Folders of the service, such as the models folder.
    """
    for folder in folders:
        # with and without links, and without ".."
        paths = {str(folder), os.path.abspath(folder), os.path.realpath(folder)}  # noqa: PTH100
        for path in paths:
            shown = re.compile(rf"(?<![^\s\"'(]){re.escape(printable(path))}(?=[/\\\s\"':;,.)]|$)")
            name = printable(folder.absolute().name)
            error.message = shown.sub(lambda _, name=name: name, error.message)
    return error


def open_file(path: Path) -> BinaryIO:
    """Open a regular file. Raises `OSError` for anything else, without waiting."""
    file = open(path, "rb", opener=_open)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "it is not a regular file")
    return file


def parse_json(text: bytes, **hooks: Any) -> Any:
    """Return the value of a JSON text of limited size.

    Raises:
        ValueError: It is not JSON in UTF-8, too deep, or has more than `MAX_PARTS` values.
    """
    if sum(text.count(mark) for mark in b",:[{") > MAX_PARTS:
        raise ValueError(f"it has more than {MAX_PARTS:,} parts")
    try:
        return json.loads(text.decode(), **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg}, character {error.pos + 1})") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None


def _walk(folder: Path) -> Iterator[str]:
    """Yield the paths of all visible files and folders below a folder.

    Links to folders are followed after all real folders, and each folder once. So a link changes
    no name of a file that is there anyway, and a loop ends.
    """
    pending, links = deque([(str(folder), 0)]), deque[tuple[str, int]]()
    visited: set[tuple[int, int]] = set()
    yielded = 0
    while pending or links:
        path, depth = (pending or links).popleft()
        try:
            status = os.stat(path)  # noqa: PTH116 - of the folder that a link means
            if (status.st_dev, status.st_ino) in visited or depth > MAX_DEPTH:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name.startswith("."):
                        continue  # of a file manager, or the second half of a file of macOS
                    yielded += 1
                    if yielded > MAX_ENTRIES:
                        _warn_once(f"{printable(str(folder))} has more than {MAX_ENTRIES:,} files.")
                        return
                    yield entry.path
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((entry.path, depth + 1))
                    # a link to itself is no folder, where `entry.is_dir` raises
                    elif entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112
                        links.append((entry.path, depth + 1))
        except OSError:
            continue  # missing, unreadable, or removed meanwhile


def _problem(path: Path, folder: Path) -> ModelUnusable | None:
    """Return why a file cannot be read, as far as its name and kind show."""
    shown = printable(str(path))
    if _UNPRINTABLE.search(str(path.relative_to(folder))):
        return ModelUnusable(
            f"{shown} has a name with control characters or bytes that are not UTF-8.",
            hint="Rename it.",
        )
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = (
            "is a link to nothing" if path.is_symlink() else f"cannot be read: {error.strerror}"
        )
        return CorruptFile(f"{shown} {reason}.", hint="Remove it, or get the file again.")
    kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), None)
    if kind is None:
        return None
    return CorruptFile(f"{shown} is {kind}, not a file.", hint="Remove or rename it.")


@lru_cache(1000)
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _open(path: str, flags: int) -> int:
    # opening a pipe would wait until another process writes into it
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
