"""The command `generate`: its options come from the core, its images from the render path."""

from __future__ import annotations

import errno
import secrets
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from alphalayer import catalog
from alphalayer.cli.checks import check_models_dir
from alphalayer.cli.console import err, out, program_name, progress, render_hint
from alphalayer.cli.inputs import InputImages, read_images
from alphalayer.cli.options import add_options, name_flags, select_fields
from alphalayer.config import Settings, load_settings
from alphalayer.core.errors import CommandHint, StorageFailed
from alphalayer.core.inputs import check_opaque_init, size_from_image
from alphalayer.core.job import Job, JobResult, JobSpec, Output
from alphalayer.core.modes import DEFAULT_MODE, OPAQUE
from alphalayer.core.optional_dependencies import require
from alphalayer.core.request import GenerationOptions, GenerationRequest, parse_request
from alphalayer.core.samplers import split_sampler_name
from alphalayer.core.values import parse_as
from alphalayer.images import codecs
from alphalayer.worker.render import ENGINE, Renderer, load_engine

app = typer.Typer()

SETTINGS = ("models_dir", "device", "dtype", "memory", "noise", "decode")
"""Settings with an option."""


InputPath = Annotated[Path | None, typer.Option(help="Input image, for a mode that needs it.")]


@app.command(context_settings={"allow_extra_args": True})
@name_flags
@add_options(JobSpec, skip=("generation", "output", "previews", "seeds"))
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
    if context.args:
        words = " ".join([prompt, *context.args])
        raise typer.BadParameter(
            f'put it in quotes: {program_name()} generate "{words}"', param_hint="PROMPT"
        )
    require("torch", "engine")
    settings = load_settings(**select_fields(Settings, options))
    check_models_dir(settings)
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
    _check_writable(next(iter(targets.values())))
    model = job.spec.generation.model or settings.default_model
    _report_embedded_model(model, settings.models_dir)
    start = time.perf_counter()
    result = _render(job, _TargetFiles(targets, inputs), settings)
    seconds = time.perf_counter() - start
    for warning in result.warnings:
        err.print(warning, markup=False)
    for file in result.images:
        out.print(
            f"{targets[file.key]}  {file.width}x{file.height}  seed {file.seed}  "
            f"{seconds:.1f} s  {result.model_name}"
        )


def _init_options(inputs: InputImages, options: dict[str, Any]) -> dict[str, Any]:
    """Return the size of the image to change, as far as no size is requested.

    Raises:
        InvalidRequest: It is opaque, and the mode generates transparency.
    """
    init = inputs.by_role.get("init")
    if init is None:
        return {}
    check_opaque_init(options["mode"] or DEFAULT_MODE, is_opaque=init.is_opaque)
    sides = zip(("width", "height"), size_from_image(init.width, init.height), strict=True)
    return {name: side for name, side in sides if options[name] is None}


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
        later = (output.with_stem(f"{output.stem}-{number}") for number in range(2, len(keys) + 1))
        return dict(zip(keys, (output, *later), strict=True))
    return {
        key: (output or folder)
        / f"alpha_{int(job.created_at)}_{secrets.token_hex(4)}.{job.spec.output.format}"
        for key in keys
    }


def _check_writable(target: Path) -> None:
    """Create the folder of a file. Raises `StorageFailed` if it cannot be written to."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _cannot_write(target, error) from None


def _report_embedded_model(name: str | None, models_dir: Path) -> None:
    """Print a line if the embedded model is used because there is no other.

    Raises:
        ModelNotFound, ModelUnusable: See `alphalayer.catalog.resolve_model`.
    """
    entry = catalog.resolve_model(name, catalog.find_models(models_dir), models_dir)
    if not name and entry.path == catalog.EMBEDDED_MODEL:
        folder = models_dir / catalog.CHECKPOINTS
        text = f"Generating with {entry.name}, the small embedded model. {folder} holds no other."
        err.print(render_hint(CommandHint(f"{text} For SDXL run:", catalog.PULL)))


def _render(job: Job, files: _TargetFiles, settings: Settings) -> JobResult:
    with progress() as report:
        engine = load_engine(ENGINE, settings.engine_options())
        return Renderer(engine, files, lambda _job, step: report(step)).run(job)


class _TargetFiles:
    """Paths that images are written to, and the input images."""

    def __init__(self, targets: Mapping[str, Path], inputs: InputImages):
        self._targets = targets
        self.open = inputs.open

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:  # noqa: ARG002
        """Write an image to its target, also over a file that exists."""
        try:
            self._targets[key].write_bytes(data)
        except OSError as error:
            raise _cannot_write(self._targets[key], error) from None


def _cannot_write(target: Path, error: OSError) -> StorageFailed:
    remedy = "Free some space, or name" if error.errno == errno.ENOSPC else "Name"
    return StorageFailed(
        f"cannot write {target}: {error.strerror}.", hint=f"{remedy} another place with --output."
    )
