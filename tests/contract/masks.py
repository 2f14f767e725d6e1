"""Masks for the parts of an answer that differ between runs."""

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
"""Fields in which the MCP library describes itself."""
SIZES = {"free", "used", "total"}
MOVING = ("state", "stage", "position", "step", "steps", "eta_s", "started_at", "preview_url")
"""Fields of a job that is queued or running."""
TEXTS = (
    (re.compile(r"http://127\.0\.0\.1:\d+"), "<address>"),
    (re.compile(r"alpha_\d+_[0-9a-f]{12}"), "<file>"),
    (re.compile(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{24}\b|\b[0-9a-f]{10}\b"), "<hex>"),
    (re.compile(r"\balphalayer-\d[\w.+]*"), "<version>"),
    (re.compile(r"[A-Za-z0-9+/]{60,}={0,2}"), "<base64>"),
    (re.compile(r'/[^\s"]*/(?:builtin_)?models/'), "<folder>/models/"),
)


def masked(value: Any, key: str = "") -> Any:
    """Return plain data with the parts masked that differ between runs.

    These are times, sizes, ids, hashes, versions, addresses, folders, encoded images and the
    state of jobs that are not complete.
    """
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
    if key == "seconds":
        return dict.fromkeys(value, "<time>")
    if isinstance(value, dict):
        moving = MOVING if value.get("state") in ("queued", "running") else ()
        return {
            name: "<moving>" if name in moving else masked(field, name)
            for name, field in value.items()
        }
    if isinstance(value, list):
        return [masked(item) for item in value]
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
