"""API keys: storage, lookup and rate limits."""
