"""The running service: composition root, engine pool, health, retention, webhooks."""
