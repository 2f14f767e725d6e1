"""Rendering of jobs: supervisor, engine process, their messages, and the one render path."""
