"""Samplers, noise schedules, noise and guidance."""
