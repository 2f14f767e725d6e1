"""Generate an image with our Python client and print the progress."""

import os
from pathlib import Path

from alphalayer.client import Client, JobStatus

URL = os.environ.get("ALPHALAYER_URL", "http://localhost:7861")
KEY = os.environ.get("ALPHALAYER_API_KEY")


def show(job: JobStatus) -> None:
    """Print one change of the job."""
    print(job.state, f"step {job.step} of {job.steps}")


with Client(URL, api_key=KEY) as client:
    (image,) = client.generate("an apple, high quality", seed=7, on_change=show)

Path("apple.png").write_bytes(image)
print("wrote apple.png")
