"""Finished images as files of the requested format and quality."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator

from PIL import Image

from alphalayer.api.deps import ENCODE_BYTES, Service, file_chunks
from alphalayer.api.embedded_files import EmbeddedFiles
from alphalayer.api.openai.schemas import ImageFields, OutputFormat
from alphalayer.images import codecs
from alphalayer.storage import open_file, read

CHUNK_BYTES = 256 * 1024


async def finished_file(body: ImageFields, service: Service, key: str) -> bytes:
    """Return an image in the requested format and quality, within a turn of the pool."""
    data = await read(service.storage, key)
    if not body.is_lossy:
        return data
    return await service.pixels.process(
        data, ENCODE_BYTES, convert, body.output_format, body.output_compression
    )


async def embed(body: ImageFields, service: Service, files: EmbeddedFiles, key: str) -> str:
    """Return the placeholder of an image in the requested format and quality."""

    async def chunks() -> AsyncIterator[bytes]:
        if not body.is_lossy:
            async for chunk in file_chunks(service, key):
                yield chunk
            return
        async with service.pixels.turn(limited=False):
            data = await finished_file(body, service, key)
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    # errors later would cut the response off
    await open_file(service.storage, key)
    return files.add(chunks)


async def store_converted(body: ImageFields, service: Service, key: str) -> str:
    """Return the storage key of an image in the requested format.

    If it is encoded again, it is stored beside the first.
    """
    if not body.is_lossy:
        return key
    encoded = f"{key.rpartition('.')[0]}.{body.output_format}"
    async with service.pixels.turn(limited=False):
        data = await finished_file(body, service, key)
        await service.pixels.run(len(data), service.storage.put, encoded, data)
    return encoded


def convert(data: bytes, kind: OutputFormat, quality: int) -> bytes:
    """Encode an image file in another format. For jpeg it must be opaque."""
    rgba, parameters = codecs.decode(data)
    if kind == "png":
        return codecs.encode(rgba, "png", parameters or "")
    image, buffer = Image.fromarray(rgba), io.BytesIO()
    if kind == "jpeg":
        image = image.convert("RGB")
    image.save(buffer, format=kind.upper(), quality=max(quality, 1))
    return buffer.getvalue()
