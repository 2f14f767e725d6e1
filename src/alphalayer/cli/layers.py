"""The command `layers`: foreground, background and blended image as files with layers."""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from alphalayer import catalog
from alphalayer.api.native.answers import split_sets
from alphalayer.api.native.fields import SpecContext
from alphalayer.api.native.layers import LAYER_FIELDS, LayersRequest
from alphalayer.api.uploads import Images, StoredInput
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
from alphalayer.core.edits import LayerFields
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import ImageRef, Job, JobSpec
from alphalayer.core.request import RequestFields
from alphalayer.core.values import parse_as
from alphalayer.images import codecs
from alphalayer.images.layered import DocumentKind, describe_layers, write_document
from alphalayer.storage.inputs import input_name

app = typer.Typer()

HIRES = ("hires_scale", "hires_upscaler", "hires_steps", "hires_strength")
"""Fields that layers do not have."""
InputPath = Annotated[Path | None, typer.Option(help="This layer, which is then not generated.")]


@app.command(context_settings={"allow_extra_args": True})
@name_flags
@add_options(LayersRequest, only=("want",))
@add_options(JobSpec, only=("iterations",))
@add_options(RequestFields, skip=HIRES)
@add_options(LayerFields)
@add_options(Settings, only=SETTINGS, as_text=True)
def layers(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to generate.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for a PNG of each layer.")
    ] = None,
    foreground: InputPath = None,
    background: InputPath = None,
    blended: InputPath = None,
    psd: Annotated[
        Path | None, typer.Option(help="Photoshop file with all layers to write.")
    ] = None,
    ora: Annotated[
        Path | None, typer.Option(help="OpenRaster file with all layers to write.")
    ] = None,
    tiff: Annotated[Path | None, typer.Option(help="TIFF file with all layers to write.")] = None,
    **options: Any,
) -> None:
    """Generate PROMPT as layers, and write them as images or as one file."""
    refuse_more_words(context, prompt)
    settings = load_checked_settings(options)
    inputs = read_images(
        {
            ("foreground", "foreground"): foreground,
            ("background", "background"): background,
            ("blended", "blended"): blended,
        }
    )
    targets = _Targets.of(output, {"psd": psd, "ora": ora, "tiff": tiff}, settings.outputs_dir)
    model = choose_model(options["model"], settings)
    spec = _spec({"prompt": prompt, **options}, inputs, model.family, settings)
    catalog.check_modes(model, spec, settings.models_dir)
    job = Job.new(spec)
    start = time.perf_counter()
    files = _Files(inputs)
    result = render(job, files, settings)
    seconds = time.perf_counter() - start
    for number, stack in enumerate(split_sets(job.model_copy(update={"result": result})), 1):
        width, height, seed = stack[0].width, stack[0].height, min(layer.seed for layer in stack)
        for path in targets.write(stack, files.data, number):
            out.print(
                f"{path}  {width}x{height}  seed {seed}  {seconds:.1f} s  {result.model_name}"
            )


def _spec(options: dict[str, Any], inputs: InputImages, family: str, settings: Settings) -> JobSpec:
    """Validate the options. Raises `InvalidRequest`."""
    fields = select_fields(LayersRequest, options)
    images: Images = {
        role: StoredInput(input_name(image.data), image.width, image.height, image.is_opaque, "")
        for role, image in inputs.by_role.items()
    }
    try:
        body = parse_as(
            LayersRequest, {LAYER_FIELDS.get(name, name): value for name, value in fields.items()}
        )
    except InvalidRequest as error:
        names = LayersRequest.model_fields
        options_by_field = {field: name for name, field in LAYER_FIELDS.items() if name in names}
        error.field = options_by_field.get(error.field or "", error.field)
        raise
    return body.to_spec(
        SpecContext(settings.noise, settings.decode, settings.prompt_comments, images, family)
    )


@dataclass(frozen=True)
class _Targets:
    """Files that layers are written to."""

    stem: Path | None
    """Beginning of the paths of images. None: none are written."""
    documents: Mapping[DocumentKind, Path]

    @classmethod
    def of(
        cls, output: Path | None, paths: Mapping[DocumentKind, Path | None], outputs_dir: Path
    ) -> _Targets:
        """Choose the files. Without any requested, images go to the folder of outputs.

        Raises:
            StorageFailed: One of them cannot be written to.
        """
        documents: dict[DocumentKind, Path] = {kind: path for kind, path in paths.items() if path}
        folder = output or (None if documents else outputs_dir)
        stem = folder and folder / f"alpha_{int(time.time())}_{secrets.token_hex(4)}"
        for path in (*documents.values(), *filter(None, [stem])):
            check_writable(path)
        return cls(stem, documents)

    def write(
        self, stack: Sequence[ImageRef], files: Mapping[str, bytes], number: int
    ) -> Iterator[Path]:
        """Write a set of layers, bottom to top, and yield the paths.

        Args:
            stack: The layers.
            files: Images by key.
            number: Number of the set, from 1 on.
        """
        if self.stem:
            for layer in stack:
                path = numbered(self.stem.with_name(f"{self.stem.name}_{layer.role}.png"), number)
                write_file(path, files[layer.key])
                yield path
        layers = describe_layers(stack, lambda key: codecs.decode(files[key])[0])
        for kind, target in self.documents.items():
            path = numbered(target, number)
            document = io.BytesIO()
            write_document(document, kind, layers)
            write_file(path, document.getvalue())
            yield path


class _Files:
    """Images in memory, and the input images."""

    def __init__(self, inputs: InputImages):
        self.data: dict[str, bytes] = {}
        self.open = inputs.open

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:  # noqa: ARG002
        """Keep an image."""
        self.data[key] = data
