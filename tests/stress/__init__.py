"""Rough treatment of whole services: scripts to run by hand, with short forms in the tests."""
