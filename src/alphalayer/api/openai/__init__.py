"""The OpenAI Images dialect, served under `/v1/images` and `/v1/models`."""
