"""The commands `models list`, `models pull` and `models verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from alphalayer import catalog
from alphalayer.catalog import download
from alphalayer.cli.checks import ModelsDir, check_models_dir
from alphalayer.cli.console import out, render_hint, show_mark
from alphalayer.config import load_settings
from alphalayer.core.errors import CommandHint

app = typer.Typer(name="models", help="List, pull and verify models.", no_args_is_help=True)


@app.command("list")
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
            show_mark("ok", f"{entry.title}  {kind}  {catalog.printable(str(entry.path))}", hint)


@app.command("pull")
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
        out.print(str(pulled))


@app.command("verify")
def models_verify(models_dir: ModelsDir = None) -> None:
    """Verify model files, LoRAs and embeddings: readable, complete, of the right kind."""
    settings = load_settings(models_dir=models_dir)
    check_models_dir(settings)
    results = download.verify(settings.models_dir, settings.embeddings)
    for result in results:
        show_mark("ok" if result.is_ok else "error", str(result))
    if not results:
        out.print(render_hint(CommandHint("no model files; get some with:", catalog.PULL)))
    raise typer.Exit(not all(result.is_ok for result in results))
