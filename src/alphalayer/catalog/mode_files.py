"""Files that the modes of LayerDiffuse need, and which of them a model lacks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alphalayer.catalog.entries import ModelEntry
from alphalayer.catalog.model_config import check_layerdiffuse_mode, layer_config, layer_file
from alphalayer.core.errors import CommandHint, InvalidRequest, LayerDiffuseMissing
from alphalayer.core.job import JobSpec
from alphalayer.core.modes import (
    DECODER_FILES,
    DEFAULT_MODE,
    ENCODER_DOWNLOADS,
    ENCODER_FILES,
    MODES,
    OPAQUE,
    Mode,
    mode_for,
)
from alphalayer.core.request import GenerationRequest


@dataclass(frozen=True)
class MissingFile:
    """A file that a mode needs, and its name for `alphalayer models pull`."""

    path: Path
    download: str


def check_modes(entry: ModelEntry, spec: JobSpec, models_dir: Path) -> None:
    """Check that a model has the modes of all stages of a job, and their files.

    Raises:
        InvalidRequest: It has another mode.
        LayerDiffuseMissing: A file is missing.
        CorruptFile: The model's configuration cannot be read.
    """
    for request in spec.requests:
        if request.mode != OPAQUE:
            _check_mode(entry, spec, request, models_dir)


def _check_mode(
    entry: ModelEntry, spec: JobSpec, request: GenerationRequest, models_dir: Path
) -> None:
    try:
        check_layerdiffuse_mode(entry, request.mode)
    except InvalidRequest as error:
        if spec.stores_layers:
            error.hint = _layers_hint(MODES[request.mode], has_inputs=bool(spec.generation.inputs))
        raise
    mode, encodes = mode_for(entry.family, request.mode), request.uses_init
    for file in missing_files(entry, mode, models_dir, encodes=encodes) or ():
        raise LayerDiffuseMissing(
            f'{file.path.name} is not in {file.path.parent}; mode "{mode.name}" needs it'
            f"{' to change an image' if encodes else ''}.",
            hint=CommandHint("Run:", f"models pull {file.download}"),
        )


def _layers_hint(mode: Mode, *, has_inputs: bool) -> CommandHint:
    """Return what to do if a model lacks the mode of a layer."""
    start = "Use" if has_inputs else 'Want "foreground", or use'
    return CommandHint(
        f"{start} another model. Its file {mode.files[0]} comes with:",
        f"models pull {mode.download}",
    )


def missing_files(
    entry: ModelEntry, mode: Mode, models_dir: Path, *, encodes: bool = False
) -> list[MissingFile] | None:
    """Return the files that a model lacks for a mode. None: it cannot have that mode.

    Args:
        entry: The model.
        mode: The mode, not "opaque".
        models_dir: The models folder.
        encodes: Whether an image is changed, which needs the transparent encoder.

    Raises:
        CorruptFile: The model's configuration cannot be read.
    """
    if mode.family != entry.family:
        return None
    config = layer_config(entry.path)
    default = mode_for(entry.family, DEFAULT_MODE)
    if "patch" in config and mode.name not in (config.get("method"), default.name):
        return None
    files = [("patch", mode.files, mode.download)]
    if mode.has_alpha:
        files.append(("decoder", DECODER_FILES[mode.family], default.download))
        if encodes:
            download = ENCODER_DOWNLOADS[mode.family]
            files.append(("encoder", ENCODER_FILES[mode.family], download))
    paths = [
        MissingFile(layer_file(entry.path, names, config.get(key), models_dir), download)
        for key, names, download in files
    ]
    return [file for file in paths if not file.path.is_file()]
