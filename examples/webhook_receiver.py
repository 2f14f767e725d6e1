"""Submit a job with requests and verify the webhook that reports its end.

The signature follows Standard Webhooks. `Webhook.verify` also rejects a message whose
timestamp is more than five minutes away from the clock, so that a recorded one is of no use.
"""

import os
from http.server import BaseHTTPRequestHandler, HTTPServer

import requests
from standardwebhooks import Webhook, WebhookVerificationError

URL = os.environ.get("ALPHALAYER_URL", "http://localhost:7861")
KEY = os.environ.get("ALPHALAYER_API_KEY")
SECRET = os.environ["ALPHALAYER_WEBHOOK_SECRET"]  # "whsec_" and the key in base64


class Receiver(BaseHTTPRequestHandler):
    """Endpoint of the webhook. It answers 204, or 400 if the signature is wrong."""

    def do_POST(self) -> None:
        """Verify one message and keep the job."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self.server.job = Webhook(SECRET).verify(body, dict(self.headers))
            self.send_response(204)
        except WebhookVerificationError as error:
            self.send_response(400, str(error))
        self.end_headers()


with HTTPServer(("127.0.0.1", 0), Receiver) as server:
    server.job = None
    job = requests.post(
        f"{URL}/alpha/v1/jobs",
        json={
            "prompt": "an apple, high quality",
            "webhook_url": f"http://127.0.0.1:{server.server_port}/hook",
        },
        headers={"Authorization": f"Bearer {KEY}"} if KEY else {},
        timeout=60,
    )
    job.raise_for_status()
    while server.job is None or server.job["id"] != job.json()["id"]:
        server.handle_request()

print(server.job["state"], server.job["images"][0]["url"])
