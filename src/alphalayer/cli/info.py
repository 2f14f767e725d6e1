"""The command `info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alphalayer.cli.console import out
from alphalayer.core.errors import StorageFailed
from alphalayer.images import files

app = typer.Typer()


@app.command()
def info(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="An image of Alphalayer, or of another program that stores its settings "
            "as AUTOMATIC1111 does.",
        ),
    ],
) -> None:
    """Show the settings of an image."""
    (width, height), parameters = files.read_settings(_read(file))
    out.print(f"{file}  {width}x{height}")
    out.print(parameters or "no settings in this file.", soft_wrap=True)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StorageFailed(
            f"cannot read {file}: {error.strerror}.", hint="Name an image file."
        ) from None
