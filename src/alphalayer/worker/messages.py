"""What supervisor and engine process say to each other: one JSON object a line, over the process's standard input and output.

to the engine     open    {name, logs, engine, options, storage}   once, first
                  run     {jobs}                             draw them together and store them; sent ahead
                  cancel  {id}
from the engine   ready   {batch_pixels, device}             after `open`; how much it draws together, with what
                  started, progress, done, failed            {id, …}
                  failed  {id: null, error}                  it cannot start or go on, and ends
The engine ends when its input ends.
"""

from __future__ import annotations

import json
from typing import Any

MAX_LINE_BYTES = 16 * 1024 * 1024


def write_message(kind: str, **fields: Any) -> bytes:
    """One message as a line."""
    return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n"


def read_message(line: bytes | str) -> dict[str, Any]:
    """The message of a line. Raises `ValueError` if it is none."""
    message = json.loads(line)
    if not isinstance(message, dict) or "kind" not in message:
        raise ValueError(f"not a message: {line[:200]!r}")
    return message
