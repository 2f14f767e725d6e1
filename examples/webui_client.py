"""Generate an image through the AUTOMATIC1111 API with webuiapi."""

import os
from urllib.parse import urlsplit

import webuiapi

URL = urlsplit(os.environ.get("ALPHALAYER_URL", "http://localhost:7861"))
KEY = os.environ.get("ALPHALAYER_API_KEY")

USER = "key" if KEY else None
api = webuiapi.WebUIApi(host=URL.hostname, port=URL.port or 80, username=USER, password=KEY)
result = api.txt2img(prompt="an apple, high quality", seed=7, steps=20, width=512, height=512)
result.image.save("apple.png")
print("wrote apple.png", result.image.mode, result.image.size)
