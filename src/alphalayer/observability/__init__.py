"""Logs, metrics, traces and supervised background tasks."""
