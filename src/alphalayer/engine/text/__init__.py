"""Prompt grammar, tokens and text encoders."""
