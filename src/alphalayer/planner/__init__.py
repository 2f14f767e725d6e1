"""Capacity planning: how many GPUs a number of users needs."""
