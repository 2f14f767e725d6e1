"""The native dialect, `/alpha/v1`: from a prompt to the URL of a transparent image."""
