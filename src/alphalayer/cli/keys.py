"""The commands `keys add`, `keys list`, `keys rotate` and `keys remove`."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Annotated

import typer
from rich.table import Table

from alphalayer.auth import api_keys, usage
from alphalayer.auth.api_keys import Key
from alphalayer.cli.console import err, out
from alphalayer.config import load_settings
from alphalayer.core.errors import SetupFailed

app = typer.Typer(name="keys", help="Manage API keys.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the client.")]


@app.command("add")
def keys_add(
    name: Name,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Right of the key: {', '.join(api_keys.SCOPES)}. "
            "Repeat it for several. Default: all."
        ),
    ] = None,
    expires: Annotated[
        str, typer.Option(help="Lifetime such as 30d or 12h, or a date such as 2030-01-31 (UTC).")
    ] = "",
    per_minute: Annotated[
        int, typer.Option(help="Most submissions and conversions per minute. 0: no limit.")
    ] = 0,
    requests_per_minute: Annotated[
        int, typer.Option(help="Most requests of any kind per minute. 0: no limit.")
    ] = 0,
    cost_per_minute: Annotated[
        int, typer.Option(help="Most megapixel-steps submitted per minute. 0: no limit.")
    ] = 0,
    queue_share: Annotated[float, typer.Option(help="Largest share of the queue, up to 1.")] = 1.0,
) -> None:
    """Create an API key and show it once. A running service accepts it immediately."""
    file = load_settings().keys_file
    secret = api_keys.add_key(
        file,
        name,
        scopes=tuple(dict.fromkeys(scope or api_keys.SCOPES)),
        expires=read_expiry(expires, datetime.now(timezone.utc)),
        per_minute=per_minute,
        requests_per_minute=requests_per_minute,
        cost_per_minute=cost_per_minute,
        queue_share=queue_share,
    )
    out.print(secret)
    err.print(
        f"This is the key of {name}. It is shown only once. Its hash is in {file.absolute()}. "
        "A service that uses this file now requires a key."
    )


@app.command("list")
def keys_list() -> None:
    """List the API keys by name, with scopes, limits and last use on this machine."""
    settings = load_settings()
    used = usage.read_usage(settings.data_dir / usage.FILE)
    table = Table("name", "scopes", "expires", "last use", "limits")
    for key in api_keys.read_keys(settings.keys_file) or ():
        expires = key.expires.timestamp() if key.expires else None
        table.add_row(
            key.name,
            "all" if set(key.scopes) == set(api_keys.SCOPES) else "\n".join(key.scopes),
            f"{_shown(expires)}\n(expired)" if key.is_expired else _shown(expires),
            _shown(used.get(key.name)),
            "\n".join(_limits(key)) or "-",
        )
    out.print(table)


@app.command("rotate")
def keys_rotate(name: Name) -> None:
    """Replace the secret of an API key and show it once. Scopes, limits and jobs stay."""
    file = load_settings().keys_file
    out.print(api_keys.rotate_key(file, name))
    err.print(f"This is the new key of {name}. A running service rejects the old one immediately.")


@app.command("remove")
def keys_remove(name: Name) -> None:
    """Remove an API key. A running service rejects it immediately."""
    file = load_settings().keys_file
    if not api_keys.remove_key(file, name):
        err.print(
            "warning: no key is left, so every request is rejected. "
            f"To allow requests without a key, stop the service and remove {file.absolute()}"
        )


def read_expiry(text: str, now: datetime) -> datetime | None:
    """Return the time that `--expires` names; None for an empty text.

    Raises:
        SetupFailed: The text is no lifetime and no date, or the time has passed.
    """
    if not text:
        return None
    lifetime = re.fullmatch(r"(\d{1,5})([dh])", text)
    try:
        if lifetime:
            count = int(lifetime[1])
            moment = now + (timedelta(days=count) if lifetime[2] == "d" else timedelta(hours=count))
        else:
            moment = datetime.fromisoformat(text)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    except (ValueError, OverflowError):
        raise SetupFailed(
            f'--expires: "{text}" is not accepted; use 30d, 12h or a date such as 2030-01-31.'
        ) from None
    if moment <= now:
        raise SetupFailed(f"--expires: {text} has passed.", hint="Use a later time.")
    return moment


def _limits(key: Key) -> list[str]:
    """Return the limits of a key, one a line."""
    limits = {
        "submissions": key.per_minute,
        "requests": key.requests_per_minute,
        "megapixel-steps": key.cost_per_minute,
    }
    lines = [f"{limit:,} {what} a minute" for what, limit in limits.items() if limit]
    return [*lines, *([f"{key.queue_share:.0%} of the queue"] if key.queue_share < 1 else [])]


def _shown(moment: float | None) -> str:
    """Return a time in UTC for the table."""
    if moment is None:
        return "-"
    return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%d %H:%M")
