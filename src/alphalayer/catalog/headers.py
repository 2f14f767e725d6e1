"""Header of a safetensors file: tensor names and shapes, metadata, and what they reveal."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from alphalayer.catalog.completeness import missing_tensor
from alphalayer.catalog.files import open_file, parse_json, printable
from alphalayer.catalog.kinds import embedding_shapes, family_of
from alphalayer.catalog.layer_kinds import layer_names
from alphalayer.core.errors import CorruptFile

MAX_HEADER_BYTES = 16_000_000
"""Limit of a header. That of an SDXL checkpoint has 0.4 MB, that of a LoRA some MB of metadata."""
MAX_RANK = 64
_AGAIN = "Download it again; a complete file has the size that its page names."
_SMALLER = "Save it again with less metadata."
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
"""Bits of a number in each supported format."""

MAX_METADATA = 100_000
"""Limit of the characters of listed metadata. Longer values are left out first."""
MAX_ALIAS = 1000


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file: the shape of each tensor by name, and the metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Summary:
    """What the catalog knows of a file from its header."""

    family: str
    embedding: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Shapes of an embedding's tensors by name."""
    alias: str = ""
    """Name that a LoRA was trained under."""
    title: str = ""
    """Title that its author gave it."""
    has_diffusers_names: bool = False
    """Whether it is a VAE with the names of diffusers."""
    missing: str = ""
    """A tensor that is not there, though those around it are."""
    layer_names: tuple[str, ...] = ()
    """Published names that it may have as a LayerDiffuse file, see `layer_kinds`."""


def summarize(path: Path) -> Summary:
    """Return the summary of a safetensors file, read once and after each change.

    Raises:
        CorruptFile: See `read_header`. A damaged header is not read again either.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    version = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
    with _reading:
        summary = _summarize(path, version)
    if isinstance(summary, CorruptFile):
        # a new one, because each raise adds its traceback to an error
        raise CorruptFile(summary.message, hint=summary.hint)
    return summary


def listed_metadata(path: Path) -> dict[str, str]:
    """Return the texts in a file's header, the short ones first, up to `MAX_METADATA`.

    They are read each time: those of many files would fill the memory.

    Raises:
        CorruptFile: See `read_header`.
    """
    summarize(path)
    with _reading:
        texts = _leading_metadata(path) or read_header(path).metadata
    listed: dict[str, str] = {}
    left = MAX_METADATA
    for name, value in sorted(texts.items(), key=lambda text: len(text[1])):
        left -= len(name) + len(value)
        if left < 0:
            break
        listed[name] = value
    return listed


def _leading_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a checked file, {} if they do not begin its header.

    Parsing all tensors of a LoRA takes ten times as long.
    """
    try:
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, MAX_HEADER_BYTES)).decode()
        start = _METADATA_START.match(text)
        return _read_metadata(_decoder.raw_decode(text, start.end())[0]) if start else {}
    except (OSError, ValueError, RecursionError):
        return {}  # it changed meanwhile


_METADATA_START = re.compile(r'\{\s*"__metadata__"\s*:\s*')
_decoder = json.JSONDecoder()
_reading = Lock()
"""Held while a header is parsed, which may take 100 MB."""


@lru_cache(10_000)
def _summarize(path: Path, _version: tuple[int, ...]) -> Summary | CorruptFile:
    try:
        header = read_header(path)
    except CorruptFile as error:
        if isinstance(error.__cause__, OSError):
            raise  # a failing disk may recover
        return error.with_traceback(None)
    shapes = header.shapes
    return Summary(
        family_of(shapes),
        embedding_shapes(shapes),
        header.metadata.get("ss_output_name", "")[:MAX_ALIAS],
        header.metadata.get("modelspec.title", "")[:MAX_ALIAS],
        any(name.startswith("encoder.down_blocks.") for name in shapes),
        missing_tensor(shapes),
        layer_names(shapes),
    )


def read_header(path: Path) -> Header:
    """Read and check a safetensors header.

    The file has 8 bytes with the header's length, the header as JSON, then the tensors' bytes.

    Raises:
        CorruptFile: A part is missing or damaged. The message names it.
    """
    shown = printable(str(path))
    try:
        with open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            raw = file.read(8)
            length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
            if not 2 <= length <= size - 8:
                raise CorruptFile(
                    f"{shown} is not a safetensors file, or only its beginning is there.",
                    hint=_AGAIN,
                )
            if length > MAX_HEADER_BYTES:
                raise CorruptFile(
                    f"{shown} has a header of {length:,} bytes; "
                    f"at most {MAX_HEADER_BYTES:,} are read.",
                    hint=_SMALLER,
                )
            text = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        shapes, metadata, end = _read_tensors(text)
    except ValueError as error:
        raise CorruptFile(
            f"{shown} has a damaged safetensors header: {error}.", hint=_AGAIN
        ) from None
    missing = 8 + length + end - size
    if missing > 0:
        raise CorruptFile(
            f"{shown} is cut off: {missing:,} of {8 + length + end:,} bytes are missing.",
            hint=_AGAIN,
        )
    if missing < 0:
        raise CorruptFile(f"{shown} has {-missing:,} bytes after its tensors.", hint=_AGAIN)
    return Header(shapes, metadata)


def _unreadable(path: Path, error: OSError) -> CorruptFile:
    return CorruptFile(
        f"{printable(str(path))} cannot be read: {error.strerror}.",
        hint="Check the disk and permissions.",
    )


def _read_tensors(text: bytes) -> tuple[dict[str, tuple[int, ...]], dict[str, str], int]:
    """Return shapes, metadata, and the end of the last tensor. Raises `ValueError`."""
    if not text.startswith(b"{"):
        raise ValueError("it does not begin with {")
    entries: dict[str, Any] = parse_json(
        text, object_pairs_hook=_unique, parse_float=_refuse_number, parse_constant=_refuse_number
    )
    metadata = _read_metadata(entries.pop("__metadata__", None))
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        try:
            shapes[name], span = _read_tensor(entry)
        except ValueError as error:
            raise ValueError(f"{printable(name)[:100]} has {error}") from None
        spans.append(span)
    end = 0
    for first, after in sorted(spans):
        if first != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = after
    return shapes, metadata, end


def _read_metadata(entry: Any) -> dict[str, str]:
    """Return the texts of the metadata, with replacements for what cannot be sent."""
    return {
        name.encode(errors="replace").decode(): value.encode(errors="replace").decode()
        for name, value in (entry.items() if isinstance(entry, dict) else ())
        if isinstance(value, str)
    }


def _read_tensor(entry: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return the shape of a tensor, and its first byte and the one after its last."""
    if not isinstance(entry, dict):
        raise ValueError("no description")
    kind = entry.get("dtype")
    if not isinstance(kind, str) or kind not in BITS:
        raise ValueError(f"a number format that is not one of {', '.join(BITS)}")
    shape, span = (_read_sizes(entry.get(name)) for name in ("shape", "data_offsets"))
    if shape is None or len(shape) > MAX_RANK:
        raise ValueError("a shape that is not a list of sizes")
    if span is None or len(span) != 2:
        raise ValueError("data_offsets that are not two positions")
    if math.prod(shape) * BITS[kind] != (span[1] - span[0]) * 8:
        raise ValueError("data_offsets that differ from the size of its shape")
    return shape, (span[0], span[1])


def _read_sizes(values: Any) -> tuple[int, ...] | None:
    """Return a list of sizes or positions, or None for anything else."""
    if isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    ):
        return tuple(values)
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        raise ValueError("a name occurs twice")
    return entry


def _refuse_number(number: str) -> None:
    raise ValueError(f"it holds the number {number[:20]}")
