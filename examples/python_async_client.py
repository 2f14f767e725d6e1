"""Generate three seeds of one prompt at the same time with asyncio.

The service runs compatible jobs in one batch.
"""

import asyncio
import os
from pathlib import Path

from alphalayer.client import AsyncClient

URL = os.environ.get("ALPHALAYER_URL", "http://localhost:7861")
KEY = os.environ.get("ALPHALAYER_API_KEY")
SEEDS = (1, 2, 3)


async def main() -> None:
    """Write one file for each seed."""
    async with AsyncClient(URL, api_key=KEY) as client:
        jobs = [client.generate("a red heart", seed=seed) for seed in SEEDS]
        for seed, (image,) in zip(SEEDS, await asyncio.gather(*jobs), strict=True):
            Path(f"heart-{seed}.png").write_bytes(image)
            print(f"wrote heart-{seed}.png")


asyncio.run(main())
