"""Terminal output: lines, marks and progress.

Names are printed verbatim, never as markup.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from alphalayer.core.errors import PROGRAM, STARTED_BY, AlphalayerError, CommandHint

if TYPE_CHECKING:
    from alphalayer.engine.base import Progress as EngineProgress

_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
out = Console(**_PLAIN)
err = Console(stderr=True, **_PLAIN)

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}
_STAGES = {
    "load": "loading the model",
    "text": "reading the prompt",
    "inputs": "reading the images",
    "sample": "generating",
    "upscale": "enlarging",
    "decode": "decoding",
}


def program_name() -> str:
    """Return the command that starts this program.

    run.py sets it, because it starts the program without `alphalayer` on the path.
    """
    return os.environ.get(STARTED_BY) or PROGRAM


def render_hint(hint: str) -> str:
    """Return a hint with its command as the user starts this program."""
    return hint.render(program_name()) if isinstance(hint, CommandHint) else hint


def show_mark(mark: str, text: str, hint: str = "") -> None:
    """Print a line that begins with "ok", "warning" or "error", and the hint below it."""
    out.print(Text.assemble((mark, _COLOURS[mark]), f"  {text}"))
    if hint:
        out.print(f"    {render_hint(hint)}")


def show_error(error: AlphalayerError) -> None:
    """Print an error and its hint in one line on stderr."""
    err.print(
        Text.assemble(("error:", "red"), f" {error.describe()} {render_hint(error.hint)}".rstrip())
    )


@contextmanager
def progress() -> Generator[Any]:
    """Show a bar on stderr with stage, step and time left, if it is a terminal.

    Yields:
        The function that the engine reports its progress to.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[at]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not sys.stderr.isatty()) as bar:
        task: TaskID = bar.add_task("starting torch", total=None, at="")

        def report(progress: EngineProgress) -> None:
            at = f"step {progress.step} of {progress.steps}" if progress.steps else ""
            stage = _STAGES.get(progress.stage, progress.stage)
            bar.update(
                task,
                description=stage,
                completed=progress.step,
                total=progress.steps or None,
                at=at,
            )

        yield report
