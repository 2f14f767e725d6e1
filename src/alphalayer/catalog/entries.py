"""Checkpoints of a models folder: their names, kinds, families and hashes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from alphalayer.catalog.files import ListedFile, list_files, printable
from alphalayer.catalog.folders import family_of_folder
from alphalayer.catalog.hashes import (
    SHORT_HASH_DIGITS,
    HashCache,
    file_sha256,
    file_stamp,
    open_hash_cache,
)
from alphalayer.catalog.headers import FAMILY_NAMES, SUPPORTED, summarize
from alphalayer.core.errors import CorruptFile, ModelUnusable, PickleRefused, UnsupportedFamily

CHECKPOINTS = "Stable-diffusion"
EMBEDDED_MODEL = Path(__file__).parent.parent / "builtin_models" / "alphalayer-mini"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
FP16 = ".fp16"
"""Part of the names of weight files that hold 16-bit numbers."""
_INDEX = "model_index.json"
_RIGHT_FOLDER = {
    "layerdiffuse-patch": "layer_model",
    "transparent-decoder": "layer_model",
    "lora": "Lora",
    "embedding": "embeddings",
}


@dataclass(frozen=True)
class ModelEntry:
    """A model of the folder. `problem` is the reason why it cannot be used, if there is one."""

    name: str
    path: Path
    kind: str
    """"single_file" or "diffusers"."""
    family: str
    sha256: str | None = None
    problem: ModelUnusable | None = None
    stamp: tuple[tuple[int, int], ...] = ()
    """The `file_stamp` of each file. It changes if the model is replaced under the same name."""

    @property
    def modified(self) -> int:
        """Return the time of the last change of its files, in seconds; 0 if they are gone."""
        return max(0, *(modified // 1_000_000_000 for _, modified in self.stamp), 0)

    @property
    def short_hash(self) -> str | None:
        """Return ten digits of the SHA-256, or None if the file is not hashed yet."""
        return self.sha256[:SHORT_HASH_DIGITS] if self.sha256 else None

    @property
    def title(self) -> str:
        """Return the name, with the short hash in brackets if it is known."""
        return f"{self.name} [{self.short_hash}]" if self.short_hash else self.name


def find_models(models_dir: Path) -> list[ModelEntry]:
    """Return all checkpoints by name, usable or not, and the embedded model last."""
    folder, cache = models_dir / CHECKPOINTS, open_hash_cache(models_dir)
    listed = list_files(folder, _is_model_file)
    diffusers = {file.path.parent for file in listed if file.path.name == _INDEX}
    entries: list[ModelEntry] = []
    for file in listed:
        if file.path.name == _INDEX:
            entries.append(_diffusers_entry(file, folder, cache))
        elif diffusers.isdisjoint((file.path, *file.path.parents)):
            entries.append(_file_entry(file, cache))
    if (EMBEDDED_MODEL / _INDEX).is_file():
        embedded = ListedFile(EMBEDDED_MODEL / _INDEX, f"{EMBEDDED_MODEL.name}/{_INDEX}")
        entry = _diffusers_entry(embedded, EMBEDDED_MODEL.parent, cache)
        entries.append(replace(entry, sha256=entry.sha256 or _embedded_sha256()))
    return sorted(entries, key=lambda entry: (entry.path == EMBEDDED_MODEL, entry.name.lower()))


def hash_model(entry: ModelEntry, models_dir: Path) -> str:
    """Return the SHA-256 of a model, computed once and then cached.

    The hash of a diffusers folder is that of its UNet.

    Raises:
        CorruptFile: The file cannot be read.
    """
    file = _hashed_file(entry.path, entry.kind)
    try:
        return open_hash_cache(models_dir).sha256(file)
    except OSError as error:
        raise CorruptFile(
            f"{file} cannot be read: {error.strerror}.", hint="Get the model again."
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of one part of a diffusers folder.

    Files with 16-bit numbers count only if there are no others.
    """
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if FP16 not in file.name] or files


def flatten_name(path: str) -> str:
    """Return a model's name from its path below `CHECKPOINTS`."""
    return path.replace("/", "_").replace("\\", "_")


def _is_model_file(name: str) -> bool:
    return name == _INDEX or Path(name).suffix in (".safetensors", *PICKLE_SUFFIXES)


def _file_entry(file: ListedFile, cache: HashCache) -> ModelEntry:
    path, problem, family = file.path, file.problem, "unknown"
    if problem is None and path.suffix in PICKLE_SUFFIXES:
        problem = PickleRefused(
            f"{path} is a pickle file, and opening one can run any code that is in it.",
            hint="Use the .safetensors version of this model.",
        )
    elif problem is None:
        try:
            family = summarize(path).family
        except CorruptFile as error:
            problem = error
        else:
            problem = None if family in SUPPORTED else _unsupported(path, family)
    name = flatten_name(file.name.removesuffix(path.suffix))
    sha256 = None if file.problem else cache.get(path)
    return ModelEntry(name, path, "single_file", family, sha256, problem, (file_stamp(path),))


def _diffusers_entry(index: ListedFile, folder: Path, cache: HashCache) -> ModelEntry:
    path, problem, family = index.path.parent, index.problem, "unknown"
    if problem is None:
        try:
            family = family_of_folder(path)
        except CorruptFile as error:
            problem = error
        else:
            problem = None if family in SUPPORTED else _unsupported(path, family)
    hashed = _hashed_file(path, "diffusers")
    sha256 = cache.get(hashed) if hashed.is_file() else None
    files = list_files(path, lambda name: Path(name).suffix in (".safetensors", ".json"))
    stamp = tuple(file_stamp(file.path) for file in files)
    name = flatten_name(printable(str(path.relative_to(folder))))
    return ModelEntry(name, path, "diffusers", family, sha256, problem, stamp)


@lru_cache(1)
def _embedded_sha256() -> str:
    """Hash the embedded model. It is small, so it needs no cache file."""
    return file_sha256(_hashed_file(EMBEDDED_MODEL, "diffusers"))


def _unsupported(path: Path, family: str) -> UnsupportedFamily:
    name = FAMILY_NAMES.get(family, family)
    if family in _RIGHT_FOLDER:
        return UnsupportedFamily(
            f"{path} is a {name}, not a checkpoint.", hint=f"Move it to {_RIGHT_FOLDER[family]}/."
        )
    return UnsupportedFamily(
        f"{path} is a {name} checkpoint; "
        "this version supports only complete SDXL text-to-image checkpoints.",
        hint="Use a version with the VAE inside." if family == "sdxl-no-vae" else "",
    )


def _hashed_file(path: Path, kind: str) -> Path:
    if kind == "single_file":
        return path
    folder = path / "unet"
    return next(iter(weight_files(folder)), folder / "diffusion_pytorch_model.safetensors")
