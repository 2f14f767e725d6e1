"""The `alphalayer` command."""
