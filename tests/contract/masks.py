"""What differs from run to run in an answer, masked, so that the rest can be compared whole."""

from __future__ import annotations

import json
import re
from typing import Any

TIMES = {
    "created",
    "created_at",
    "started_at",
    "finished_at",
    "next_before",
    "job_timestamp",
    "eta_s",
    "eta_relative",
}
LIBRARY = {"_meta", "capabilities"}
"""What MCP's library says of itself."""
SIZES = {"free", "used", "total"}
MOVING = ("state", "stage", "position", "step", "steps", "eta_s", "started_at", "preview_url")
"""Of a job that is not over."""
TEXTS = (
    (re.compile(r"http://127\.0\.0\.1:\d+"), "<address>"),
    (re.compile(r"alpha_\d+_[0-9a-f]{12}"), "<file>"),
    (re.compile(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{24}\b|\b[0-9a-f]{10}\b"), "<hex>"),
    (re.compile(r"\balphalayer-\d[\w.+]*"), "<version>"),
    (re.compile(r"[A-Za-z0-9+/]{60,}={0,2}"), "<base64>"),
    (re.compile(r'/[^\s"]*/(?:builtin_)?models/'), "<folder>/models/"),
)


def masked(value: Any, key: str = "") -> Any:
    """Plain data with times, sizes, ids, hashes, versions, addresses, folders, pictures and the state of unfinished jobs masked."""
    if value in (None, 0, "0") or isinstance(value, bool):
        return value
    if key in TIMES:
        return "<time>"
    if key in LIBRARY:
        return "<library>"
    if key in SIZES:
        return "<size>"
    if key == "version":
        return "<version>"
    if isinstance(value, dict):
        moving = MOVING if value.get("state") in ("queued", "running") else ()
        return {
            name: "<moving>" if name in moving else masked(each, name)
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [masked(each) for each in value]
    if isinstance(value, str):
        return _masked_text(value)
    return value


def _masked_text(text: str) -> Any:
    if text.startswith("{"):
        try:
            return {"<JSON>": masked(json.loads(text))}
        except ValueError:
            pass
    for pattern, mask in TEXTS:
        text = pattern.sub(mask, text)
    return text
