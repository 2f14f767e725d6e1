"""Generate four stickers: trimmed to the object, with a margin of 8 pixels, as WebP."""

import asyncio
import os
from pathlib import Path

from alphalayer.client import AsyncClient
from alphalayer.core.errors import AlphalayerError

URL = os.environ.get("ALPHALAYER_URL", "http://localhost:7861")
KEY = os.environ.get("ALPHALAYER_API_KEY")
SUBJECTS = ("a cute cat", "a slice of pizza", "a rocket", "a crystal ball")
STICKER = {"format": "webp", "trim": True, "trim_padding": 8, "defringe": True}


async def write_sticker(client: AsyncClient, subject: str) -> None:
    """Write the sticker of one subject, or print why it failed."""
    path = Path(subject.replace(" ", "-") + ".webp")
    try:
        (image,) = await client.generate(f"{subject}, sticker", **STICKER)
    except AlphalayerError as error:
        print(f"{path}: {error}")
        return
    path.write_bytes(image)
    print(f"wrote {path}")


async def main() -> None:
    """Submit all jobs at once. The queue keeps them if the service restarts."""
    async with AsyncClient(URL, api_key=KEY) as client:
        await asyncio.gather(*(write_sticker(client, subject) for subject in SUBJECTS))


asyncio.run(main())
