"""What commands that generate images share: checks before a job, its run, and files written."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import typer

from alphalayer import catalog
from alphalayer.cli.checks import check_models_dir
from alphalayer.cli.console import err, program_name, progress, render_hint
from alphalayer.cli.options import select_fields
from alphalayer.config import Settings, load_settings
from alphalayer.core.errors import CommandHint, StorageFailed
from alphalayer.core.job import Job, JobResult
from alphalayer.core.optional_dependencies import require
from alphalayer.worker.render import ENGINE, ImageFiles, Renderer, load_engine

SETTINGS = ("models_dir", "device", "dtype", "memory", "noise", "decode")
"""Settings with an option."""


def refuse_more_words(context: typer.Context, prompt: str) -> None:
    """Raise `BadParameter` if the prompt was given without quotes."""
    if context.args:
        words = " ".join([prompt, *context.args])
        raise typer.BadParameter(
            f'put it in quotes: {program_name()} {context.info_name} "{words}"',
            param_hint="PROMPT",
        )


def load_checked_settings(options: dict[str, Any]) -> Settings:
    """Return the settings with those that are options.

    Raises:
        SetupFailed: The engine is not installed, or there is no folder of models.
    """
    require("torch", "engine")
    settings = load_settings(**select_fields(Settings, options))
    check_models_dir(settings)
    return settings


def choose_model(name: str | None, settings: Settings) -> catalog.ModelEntry:
    """Return the model of a request.

    If it is the embedded one because there is no other, print a line.

    Raises:
        ModelNotFound, ModelUnusable: See `alphalayer.catalog.resolve_model`.
    """
    models_dir, name = settings.models_dir, name or settings.default_model
    entry = catalog.resolve_model(name, catalog.find_models(models_dir), models_dir)
    if not name and entry.path == catalog.EMBEDDED_MODEL:
        folder = models_dir / catalog.CHECKPOINTS
        text = f"Generating with {entry.name}, the small embedded model. {folder} holds no other."
        err.print(render_hint(CommandHint(f"{text} For SDXL run:", catalog.PULL)))
    return entry


def render(job: Job, files: ImageFiles, settings: Settings) -> JobResult:
    """Run a job in this process, with a bar of its progress. Print its warnings."""
    result = _run(job, files, settings)
    for warning in result.warnings:
        err.print(warning, markup=False)
    return result


def _run(job: Job, files: ImageFiles, settings: Settings) -> JobResult:
    with progress() as report:
        engine = load_engine(ENGINE, settings.engine_options())
        return Renderer(engine, files, lambda _job, step: report(step)).run(job)


def numbered(path: Path, number: int) -> Path:
    """Return the path of one of several files. From the second on it has a number."""
    return path if number == 1 else path.with_stem(f"{path.stem}-{number}")


def check_writable(target: Path) -> None:
    """Create the folder of a file. Raises `StorageFailed` if it cannot be written to."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _cannot_write(target, error) from None


def write_file(target: Path, data: bytes) -> None:
    """Write a file, also over one that exists. Raises `StorageFailed`."""
    try:
        target.write_bytes(data)
    except OSError as error:
        raise _cannot_write(target, error) from None


def _cannot_write(target: Path, error: OSError) -> StorageFailed:
    remedy = "Free some space, or name" if error.errno == errno.ENOSPC else "Name"
    return StorageFailed(
        f"cannot write {target}: {error.strerror}.", hint=f"{remedy} another place with --output."
    )
