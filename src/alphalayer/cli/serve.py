"""The commands that serve jobs: `serve`, `serverless` and `serve-as-before`."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from alphalayer.cli import forge_flags
from alphalayer.cli.checks import check_models_dir, check_port
from alphalayer.cli.console import err
from alphalayer.cli.options import add_options
from alphalayer.config import Settings, load_settings
from alphalayer.core.errors import SetupFailed
from alphalayer.core.optional_dependencies import install_hint, require

app = typer.Typer()

DEFAULT_PORT = 7861


@app.command()
@add_options(Settings, as_text=True)
def serve(
    listen: Annotated[
        bool, typer.Option("--listen", help="As --host 0.0.0.0, if no --host is given.")
    ] = False,
    **flags: Any,
) -> None:
    """Start the HTTP service.

    Settings come from options, then ALPHALAYER_... variables, then alphalayer.toml.
    """
    if listen and flags["host"] is None:
        flags["host"] = "0.0.0.0"  # nosec B104 # the flag means all addresses
    run_server(load_settings(**flags))


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def serverless(_context: typer.Context) -> None:
    """Run a worker of a Runpod serverless endpoint.

    Options of the Runpod SDK are passed on (--rp_serve_api, --test_input).
    """
    if importlib.util.find_spec("runpod") is None:
        raise SetupFailed("the Runpod SDK is not installed.", hint=install_hint("serverless"))
    require("torch", "engine")
    from alphalayer.integrations.runpod import serve

    serve(load_settings())


@app.command(
    "serve-as-before",
    hidden=True,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def serve_as_before(
    context: typer.Context,
    home: Annotated[
        Path,
        typer.Option(help="Working folder. Folders in flags are relative to the current folder."),
    ] = Path(),
) -> None:
    """Start the HTTP service with the flags of Forge and with COMMANDLINE_ARGS.

    Flags without a meaning here are ignored with a warning.
    """
    flags = forge_flags.split(os.environ.get(forge_flags.VARIABLE, ""))
    translation = forge_flags.translate([*flags, *context.args])
    os.chdir(home)
    for warning in translation.warnings:
        err.print(f"warning: {warning}")
    settings = load_settings(**translation.settings)
    if "decode" not in settings.model_fields_set:
        # the images of Forge 2
        settings = settings.model_copy(update={"decode": "auto"})
    if settings.port != DEFAULT_PORT and "data_dir" not in settings.model_fields_set:
        # Forge is started once for each GPU, in one folder, each time with another port
        settings = settings.model_copy(update={"data_dir": settings.data_dir / str(settings.port)})
    run_server(settings)


def run_server(settings: Settings) -> None:
    """Run the HTTP service until it is stopped."""
    from alphalayer.observability.logging import configure_logging
    from alphalayer.service.app import check, create_app
    from alphalayer.service.connections import ConnectionLimits
    from alphalayer.service.uvicorn_server import Server, serve

    configure_logging(settings.log_level, settings.log_json)
    check_models_dir(settings)
    check_port(settings.host, settings.port)
    asyncio.run(check(settings))
    serve(
        Server(
            create_app(settings),
            host=settings.host,
            port=settings.port,
            drain_s=settings.drain_s,
            limits=ConnectionLimits(
                connections=settings.max_connections, upload_s=settings.upload_timeout_s
            ),
        )
    )
