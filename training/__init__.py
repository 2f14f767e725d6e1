"""How the embedded model was made. Runs on its own: `python -m training`; nothing in the package imports it."""
