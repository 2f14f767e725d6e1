"""The `alphalayer` command: options, calls of the other packages, and output."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from alphalayer import __version__, catalog
from alphalayer.auth import api_keys
from alphalayer.catalog import download
from alphalayer.cli import forge_flags
from alphalayer.cli.console import (
    err,
    out,
    program_name,
    render_hint,
    show_error,
    show_mark,
)
from alphalayer.cli.doctor import check_models_dir, check_port, diagnose
from alphalayer.cli.generate import generate
from alphalayer.cli.options import add_options, name_flags
from alphalayer.cli.plan import plan
from alphalayer.config import API_KEY, Settings, load_settings
from alphalayer.core.errors import AlphalayerError, CommandHint, SetupFailed, StorageFailed
from alphalayer.core.optional_dependencies import install_hint, require
from alphalayer.images import codecs

app = typer.Typer(
    name="alphalayer",
    help="Text in, transparent PNG out: Stable Diffusion XL with LayerDiffuse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # its tables cut the names of flags at 80 columns
)
models_app = typer.Typer(help="List, pull and verify models.", no_args_is_help=True)
app.add_typer(models_app, name="models")
keys_app = typer.Typer(help="Manage API keys.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

DEFAULT_PORT = 7861
ModelsDir = Annotated[
    Path | None, typer.Option(help="Folder with Stable-diffusion/ and layer_model/.")
]


def _show_version(is_requested: bool) -> None:
    if is_requested:
        version()
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None: ...


app.command(context_settings={"allow_extra_args": True})(generate)


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
        flags["host"] = "0.0.0.0"
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
    if settings.port != DEFAULT_PORT and "data_dir" not in settings.model_fields_set:
        # Forge is started once for each GPU, in one folder, each time with another port
        settings = settings.model_copy(update={"data_dir": settings.data_dir / str(settings.port)})
    run_server(settings)


app.command()(name_flags(plan))


@models_app.command("list")
def models_list(models_dir: ModelsDir = None) -> None:
    """List the models, and the reason why a model cannot be used."""
    settings = load_settings(models_dir=models_dir)
    check_models_dir(settings)
    for entry in catalog.find_models(settings.models_dir):
        family = catalog.FAMILY_NAMES.get(entry.family, entry.family)
        if entry.problem:
            show_mark("error", f"{entry.name}  {entry.problem.message}", entry.problem.hint)
        else:
            is_built_in = entry.path == catalog.EMBEDDED_MODEL
            kind = "small, built in" if is_built_in else family
            hint = CommandHint("For SDXL run:", catalog.PULL) if is_built_in else ""
            show_mark("ok", f"{entry.title}  {kind}  {entry.path}", hint)


@models_app.command("pull")
def models_pull(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAMES]...", help=f"Any of: {', '.join(download.names())}."),
    ] = None,
    models_dir: ModelsDir = None,
    yes: Annotated[bool, typer.Option("--yes", help="Accept the licences without a prompt.")] = (
        False
    ),
) -> None:
    """Download models from their public hub, after showing the licences."""
    files = download.plan_pull(names or ["sdxl-base", "layerdiffuse"])
    for licence in dict.fromkeys(file.licence for file in files):
        out.print(licence)
    out.print(f"{len(files)} files, about {sum(file.size for file in files) / 1e9:.1f} GB.")
    if not yes and not typer.confirm("Download them under these licences?"):
        raise typer.Exit(1)
    folder = load_settings(models_dir=models_dir).models_dir
    for file in files:
        pulled = download.pull(file, folder)
        out.print(f"{pulled.path}  {pulled.finding}")


@models_app.command("verify")
def models_verify(models_dir: ModelsDir = None) -> None:
    """Verify model files, LoRAs and embeddings: readable, complete, of the right kind."""
    settings = load_settings(models_dir=models_dir)
    check_models_dir(settings)
    results = download.verify(settings.models_dir, settings.embeddings)
    for result in results:
        finding = result.finding.removeprefix(f"{result.path} ")
        show_mark("ok" if result.is_ok else "error", f"{result.path}  {finding}")
    if not results:
        out.print(render_hint(CommandHint("no model files; get some with:", catalog.PULL)))
    raise typer.Exit(not all(result.is_ok for result in results))


@keys_app.command("add")
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


@keys_app.command("list")
def keys_list() -> None:
    """List the API keys by name, with their limits."""
    table = Table("name", "per minute", "share of the queue")
    for key in api_keys.read_keys(load_settings().keys_file) or ():
        table.add_row(key.name, str(key.per_minute or "-"), f"{key.queue_share:.0%}")
    out.print(table)


@keys_app.command("remove")
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


@app.command()
def doctor(models_dir: ModelsDir = None) -> None:
    """Diagnose the installation."""
    findings = diagnose(load_settings(models_dir=models_dir))
    for finding in findings:
        show_mark(finding.level, finding.text, finding.hint)
    raise typer.Exit(any(finding.level == "error" for finding in findings))


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
    (width, height), parameters = codecs.read_settings(_read(file))
    out.print(f"{file}  {width}x{height}")
    out.print(parameters or "no settings in this file.", soft_wrap=True)


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
    from alphalayer.client import AsyncClient

    create_server(lambda: AsyncClient(url, api_key=key)).run("stdio", show_banner=False)


@app.command()
def version() -> None:
    """Show the version."""
    out.print(f"alphalayer {__version__}")


def run_server(settings: Settings) -> None:
    """Run the HTTP service until it is stopped."""
    from alphalayer.observability.logging import configure_logging
    from alphalayer.service.app import check, create_app
    from alphalayer.service.uvicorn_server import Server, serve

    configure_logging(settings.log_level, settings.log_json)
    check_models_dir(settings)
    check_port(settings.host, settings.port)
    asyncio.run(check(settings))
    serve(
        Server(
            create_app(settings), host=settings.host, port=settings.port, drain_s=settings.drain_s
        )
    )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StorageFailed(
            f"cannot read {file}: {error.strerror}.", hint="Name an image file."
        ) from None


def main() -> None:
    """Run a command. An error for users is one line on stderr and exit code 1."""
    try:
        app(prog_name=program_name())
    except AlphalayerError as error:
        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
