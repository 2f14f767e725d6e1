#!/usr/bin/env bash
# Generate an image with curl: first in one request, then as a job with events.
set -euo pipefail

url=${ALPHALAYER_URL:-http://localhost:7861}
headers=(-H "Content-Type: application/json")
if [ -n "${ALPHALAYER_API_KEY:-}" ]; then
  headers+=(-H "Authorization: Bearer $ALPHALAYER_API_KEY")
fi

# Print one field of a JSON object.
field() { python3 -c "import json, sys; print(json.load(sys.stdin)$1)"; }

# One request: the answer has the URL of the image.
body='{"prompt": "an apple, high quality", "seed": 7}'
image=$(curl -sf "$url/alpha/v1/txt2img" "${headers[@]}" -d "$body" | field '["url"]')
curl -sf "$image" -o apple.png

# A job: the answer comes at once, and its events report the progress.
body='{"prompt": "a pear, high quality", "seed": 7}'
curl -sf "$url/alpha/v1/jobs" "${headers[@]}" -H "Idempotency-Key: $RANDOM$RANDOM" \
  -d "$body" > job.json
curl -sfN "$(field '["events_url"]' < job.json)" "${headers[@]}" | grep "^event:"
image=$(curl -sf "$(field '["url"]' < job.json)" "${headers[@]}" | field '["images"][0]["url"]')
curl -sf "$image" -o pear.png

echo "wrote apple.png and pear.png"
