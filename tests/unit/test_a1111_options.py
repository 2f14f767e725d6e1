"""Options of a client, which services of several versions share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from alphalayer.api.a1111.routes import options_of
from alphalayer.api.a1111.settings import OverrideSettings


async def test_options_of_a_newer_version_are_ignored():
    async def load_options(owner: str) -> dict[str, Any]:
        return {"CLIP_stop_at_last_layers": 2, "tiling": True} if owner == "ann" else {}

    request: Any = SimpleNamespace(state=SimpleNamespace(client="ann"))
    service: Any = SimpleNamespace(job_queue=SimpleNamespace(load_options=load_options))
    assert await options_of(request, service) == OverrideSettings(CLIP_stop_at_last_layers=2)
