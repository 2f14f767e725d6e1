"""The command `mcp`."""

from __future__ import annotations

from typing import Annotated

import typer

from alphalayer.client import AsyncClient
from alphalayer.config import API_KEY
from alphalayer.core.errors import SetupFailed
from alphalayer.core.optional_dependencies import install_hint

app = typer.Typer()


@app.command()
def mcp(
    url: Annotated[str, typer.Option(help="URL of a running service.")] = "http://localhost:7861",
    key: Annotated[str | None, typer.Option(help="API key of the service.", envvar=API_KEY)] = None,
) -> None:
    """Run an MCP server over stdio. It generates images with a running service."""
    try:
        from alphalayer.integrations.mcp import create_server
    except ImportError as error:
        raise SetupFailed(f"{error.name} is not installed.", hint=install_hint("mcp")) from None

    create_server(lambda: AsyncClient(url, api_key=key)).run("stdio", show_banner=False)
