"""Turns of requests under load."""

from __future__ import annotations

import asyncio
from typing import Any

from alphalayer.api.middleware.turns import Turns


async def test_get_is_handled_before_earlier_posts_of_a_crowd():
    handled: list[str] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        handled.append(scope["name"])

    turns = Turns(app)

    def request(method: str, name: str) -> asyncio.Task[None]:
        scope = {"type": "http", "method": method, "name": name}
        return asyncio.create_task(turns(scope, None, None))  # pyright: ignore[reportArgumentType]

    posts = [request("POST", f"post {i}") for i in range(50)]
    await asyncio.gather(request("GET", "look"), *posts)
    assert handled.index("look") <= 1
    assert handled.pop(handled.index("look")) == "look"
    assert handled == [f"post {i}" for i in range(50)]
