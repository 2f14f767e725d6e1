"""The command `generate`: its options come from the core, its images from the render path."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from alphalayer.cli.console import out
from alphalayer.cli.inputs import InputImages, read_images
from alphalayer.cli.options import add_options, name_flags, select_fields
from alphalayer.cli.rendering import (
    SETTINGS,
    check_writable,
    choose_model,
    load_checked_settings,
    numbered,
    refuse_more_words,
    render,
    write_file,
)
from alphalayer.config import Settings
from alphalayer.core.inputs import check_transparency, size_for_image
from alphalayer.core.job import Job, JobSpec, Output
from alphalayer.core.modes import DEFAULT_MODE, MODES, OPAQUE
from alphalayer.core.request import GenerationOptions, GenerationRequest, parse_request
from alphalayer.core.samplers import split_sampler_name
from alphalayer.core.values import parse_as
from alphalayer.images import codecs

app = typer.Typer()

InputPath = Annotated[Path | None, typer.Option(help="Input image, for a mode that needs it.")]


@app.command(context_settings={"allow_extra_args": True})
@name_flags
@add_options(JobSpec, only=("iterations",))
@add_options(Output)
@add_options(GenerationRequest, skip=("inputs", "options", "warnings"))
@add_options(GenerationOptions)
@add_options(Settings, only=SETTINGS, as_text=True)
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to generate.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File or folder to write to.")
    ] = None,
    transparent: Annotated[
        bool, typer.Option(help="Generate with LayerDiffuse. --no-transparent is --mode opaque.")
    ] = True,
    image: Annotated[Path | None, typer.Option(help="Image to change.")] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Mask of --image: its white part is changed, or its opaque part."),
    ] = None,
    foreground_image: InputPath = None,
    background_image: InputPath = None,
    blended_image: InputPath = None,
    **options: Any,
) -> None:
    """Generate PROMPT and write an image with a real alpha channel."""
    refuse_more_words(context, prompt)
    settings = load_checked_settings(options)
    if not transparent:
        options["mode"] = OPAQUE
    inputs = read_images(
        {
            ("init", "image"): image,
            ("mask", "mask"): mask,
            ("foreground", "foreground_image"): foreground_image,
            ("background", "background_image"): background_image,
            ("blended", "blended_image"): blended_image,
        }
    )
    options |= {"inputs": inputs.fields, **_init_options(inputs, options)}
    job = Job.new(_spec(prompt, output, options, settings))
    targets = _choose_targets(job, output, settings.outputs_dir)
    check_writable(next(iter(targets.values())))
    choose_model(job.spec.generation.model, settings)
    start = time.perf_counter()
    result = render(job, _TargetFiles(targets, inputs), settings)
    seconds = time.perf_counter() - start
    for file in result.images:
        out.print(
            f"{targets[file.key]}  {file.width}x{file.height}  seed {file.seed}  "
            f"{seconds:.1f} s  {result.model_name}"
        )


def _init_options(inputs: InputImages, options: dict[str, Any]) -> dict[str, Any]:
    """Return the size that an image to change leads to.

    Raises:
        InvalidRequest: It is opaque, and the mode generates transparency.
    """
    init = inputs.by_role.get("init")
    if init is None:
        return {}
    mode = MODES.get(options["mode"] or DEFAULT_MODE)
    if init.is_opaque and mode:
        check_transparency(mode, "add --no-transparent", "image")
    size = size_for_image((init.width, init.height), options["width"], options["height"])
    return dict(zip(("width", "height"), size, strict=True))


def _spec(prompt: str, output: Path | None, options: dict[str, Any], settings: Settings) -> JobSpec:
    """Validate the options. Raises `InvalidRequest`."""
    sampler, scheduler = split_sampler_name(options["sampler"], options["scheduler"])
    request = parse_request(
        {
            **select_fields(GenerationRequest, options),
            "prompt": prompt,
            "sampler": sampler,
            "scheduler": scheduler,
            "noise": settings.noise,
            "decode": settings.decode,
            "options": parse_as(GenerationOptions, select_fields(GenerationOptions, options)),
        },
        comments=settings.prompt_comments,
    )
    finishing = select_fields(Output, options)
    # a file name decides, and a wrong --format is an error beside it as well
    for name in filter(None, (options["format"], output and output.suffix[1:])):
        finishing["format"] = codecs.check_format(name)
    return parse_as(
        JobSpec,
        {
            **select_fields(JobSpec, options),
            "generation": request,
            "output": parse_as(Output, finishing),
        },
    )


def _choose_targets(job: Job, output: Path | None, folder: Path) -> dict[str, Path]:
    """Return the path of each image of a job by its storage key.

    It is the named file, numbered from the second image on, or a new name in a folder.
    The new names are not those of the service, which removes files of jobs that it does not know.
    """
    keys = [job.file_name(index) for index in range(len(job.spec.seeds))]
    if output and output.suffix:
        return {key: numbered(output, number) for number, key in enumerate(keys, 1)}
    return {
        key: (output or folder)
        / f"alpha_{int(job.created_at)}_{secrets.token_hex(4)}.{job.spec.output.format}"
        for key in keys
    }


class _TargetFiles:
    """Paths that images are written to, and the input images."""

    def __init__(self, targets: Mapping[str, Path], inputs: InputImages):
        self._targets = targets
        self.open = inputs.open

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:  # noqa: ARG002
        """Write an image to its target, also over a file that exists."""
        write_file(self._targets[key], data)
