"""The command `version`."""

from __future__ import annotations

import typer

from alphalayer import __version__
from alphalayer.cli.console import out

app = typer.Typer()


@app.command()
def version() -> None:
    """Show the version."""
    out.print(f"alphalayer {__version__}")
