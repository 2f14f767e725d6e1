"""The `alphalayer` command: the list of its commands, whose modules are imported when used."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.main import get_group

from alphalayer.cli.console import program_name, show_error
from alphalayer.cli.version import version
from alphalayer.core.errors import AlphalayerError


@dataclass(frozen=True)
class CommandEntry:
    """A command: the module of this package that defines it, and its line in `--help`."""

    module: str
    summary: str
    is_hidden: bool = False


COMMANDS = {
    "generate": CommandEntry(
        "generate", "Generate PROMPT and write an image with a real alpha channel."
    ),
    "layers": CommandEntry(
        "layers", "Generate PROMPT as layers, and write them as images or as one file."
    ),
    "serve": CommandEntry("serve", "Start the HTTP service."),
    "serverless": CommandEntry("serve", "Run a worker of a Runpod serverless endpoint."),
    "serve-as-before": CommandEntry(
        "serve",
        "Start the HTTP service with the flags of Forge and with COMMANDLINE_ARGS.",
        is_hidden=True,
    ),
    "plan": CommandEntry(
        "plan", "Estimate pods, waiting time and cost for a number of users, by simulation."
    ),
    "doctor": CommandEntry("doctor", "Diagnose the installation."),
    "info": CommandEntry("info", "Show the settings of an image."),
    "mcp": CommandEntry("mcp", "Run an MCP server over stdio."),
    "version": CommandEntry("version", "Show the version."),
    "models": CommandEntry("models", "List, pull and verify models."),
    "keys": CommandEntry("keys", "Manage API keys."),
}

app = typer.Typer(
    name="alphalayer",
    help="Text in, transparent PNG out: Stable Diffusion XL with LayerDiffuse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # its tables cut the names of flags at 80 columns
)


def load_command(name: str) -> Any:
    """Import the module of a command and return the command."""
    commands = typer.Typer(rich_markup_mode=None)
    commands.add_typer(importlib.import_module(f"alphalayer.cli.{COMMANDS[name].module}").app)
    return get_group(commands).commands[name]


class _LazyCommand(TyperCommand):
    """Command whose module is imported when the command is used."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Return the context of the command, which then runs in place of this one."""
        assert self.name is not None
        return load_command(self.name).make_context(*arguments, **options)


for _name, _entry in COMMANDS.items():
    app.command(_name, cls=_LazyCommand, help=_entry.summary, hidden=_entry.is_hidden)(lambda: None)


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
