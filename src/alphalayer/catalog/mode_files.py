"""Files that the modes of LayerDiffuse need, and which of them a model lacks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alphalayer.catalog.entries import ModelEntry
from alphalayer.catalog.model_config import layer_config, layer_file
from alphalayer.core.modes import (
    DECODER_FILES,
    DEFAULT_MODE,
    ENCODER_DOWNLOADS,
    ENCODER_FILES,
    Mode,
    mode_for,
)


@dataclass(frozen=True)
class MissingFile:
    """A file that a mode needs, and its name for `alphalayer models pull`."""

    path: Path
    download: str


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
