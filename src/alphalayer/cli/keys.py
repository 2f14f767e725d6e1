"""The commands `keys add`, `keys list` and `keys remove`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from alphalayer.auth import api_keys
from alphalayer.cli.console import err, out
from alphalayer.config import load_settings

app = typer.Typer(name="keys", help="Manage API keys.", no_args_is_help=True)


@app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the client.")],
    per_minute: Annotated[int, typer.Option(help="Most requests per minute. 0: no limit.")] = 0,
    queue_share: Annotated[float, typer.Option(help="Largest share of the queue, up to 1.")] = 1.0,
) -> None:
    """Create an API key and show it once. A running service accepts it immediately."""
    file = load_settings().keys_file
    out.print(api_keys.add_key(file, name, per_minute, queue_share))
    err.print(
        f"This is the key of {name}. It is shown only once. Its hash is in {file.absolute()}. "
        "A service that uses this file now requires a key."
    )


@app.command("list")
def keys_list() -> None:
    """List the API keys by name, with their limits."""
    table = Table("name", "per minute", "share of the queue")
    for key in api_keys.read_keys(load_settings().keys_file) or ():
        table.add_row(key.name, str(key.per_minute or "-"), f"{key.queue_share:.0%}")
    out.print(table)


@app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the client.")],
) -> None:
    """Remove an API key. A running service rejects it immediately."""
    file = load_settings().keys_file
    if not api_keys.remove_key(file, name):
        err.print(
            "warning: no key is left, so every request is rejected. "
            f"To allow requests without a key, stop the service and remove {file.absolute()}"
        )
