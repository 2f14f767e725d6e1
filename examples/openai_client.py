"""Generate an image through the OpenAI API with the openai package."""

import base64
import os
from pathlib import Path

import openai

URL = os.environ.get("ALPHALAYER_URL", "http://localhost:7861")
KEY = os.environ.get("ALPHALAYER_API_KEY", "none")

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
answer = client.images.generate(
    model="alphalayer",
    prompt="an apple, high quality",
    background="transparent",
    extra_body={"seed": 7},
)
Path("apple.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
print("wrote apple.png")
