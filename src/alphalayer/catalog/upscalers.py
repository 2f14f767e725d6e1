"""Upscalers of a models folder: the files of `ESRGAN`."""

from __future__ import annotations

from pathlib import Path

from alphalayer.catalog.files import suffix_of, usable_files
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import IMAGE_UPSCALERS, LATENT_UPSCALERS

FOLDER = "ESRGAN"
SUFFIXES = (".safetensors", ".pth")
ALIASES = {
    "R-ESRGAN 4x+": "RealESRGAN_x4plus",
    "R-ESRGAN 4x+ Anime6B": "RealESRGAN_x4plus_anime_6B",
}
"""Names in AUTOMATIC1111 of files that it downloads."""


def upscaler_files(models_dir: Path) -> dict[str, Path]:
    """Return the files by name. Of equal names the .safetensors file counts."""
    files: dict[str, Path] = {}
    for path in sorted(usable_files(models_dir / FOLDER, SUFFIXES), key=_has_pickle):
        files.setdefault(path.stem, path)
    return files


def find_upscaler(models_dir: Path, name: str) -> Path:
    """Return the file of an upscaler. Raises `InvalidRequest` if there is none."""
    files = upscaler_files(models_dir)
    path = files.get(name) or files.get(ALIASES.get(name, name))
    if path is None:
        known = ", ".join((*LATENT_UPSCALERS, *IMAGE_UPSCALERS, *files))
        raise InvalidRequest(
            f'unknown upscaler "{name}"; use one of: {known}.',
            hint=f"Put its file into {models_dir.absolute().name}/{FOLDER}.",
            field="hires_upscaler",
        )
    return path


def _has_pickle(path: Path) -> bool:
    """Return whether a file is a pickle. Others of the same name are preferred."""
    return suffix_of(path) != ".safetensors"
