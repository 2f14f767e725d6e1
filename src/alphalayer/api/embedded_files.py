"""JSON answers that hold files as base64. The files are sent piece by piece.

An answer with many images would otherwise take several times their size in memory.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import AsyncIterator, Callable

from fastapi.responses import StreamingResponse
from pydantic import BaseModel

Chunks = Callable[[], AsyncIterator[bytes]]
"""Function that opens a file and yields its content."""


class EmbeddedFiles:
    """Files of one answer, by the placeholders that stand for them."""

    def __init__(self):
        self._files: dict[str, Chunks] = {}

    def add(self, chunks: Chunks) -> str:
        """Return the placeholder of a file. Clients cannot guess it."""
        placeholder = secrets.token_hex(16)
        self._files[placeholder] = chunks
        return placeholder

    def respond(self, answer: BaseModel, *, exclude_none: bool = False) -> StreamingResponse:
        """Return the response of an answer with placeholders."""
        text = answer.model_dump_json(exclude_none=exclude_none)
        return StreamingResponse(self._pieces(text), media_type="application/json")

    async def _pieces(self, text: str) -> AsyncIterator[bytes]:
        placeholders = re.compile(f"({'|'.join(self._files) or '(?!)'})")
        for part in placeholders.split(text):
            if part not in self._files:
                yield part.encode()
                continue
            async for piece in encode_base64(self._files[part]()):
                yield piece


async def encode_base64(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the base64 of a file whose chunks have any sizes."""
    rest = b""
    async for chunk in chunks:
        data = rest + chunk
        end = len(data) - len(data) % 3
        rest = data[end:]
        yield base64.b64encode(data[:end])
    yield base64.b64encode(rest)
