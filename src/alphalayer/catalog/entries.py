"""Checkpoints of a models folder: their names, kinds, families and hashes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from alphalayer.catalog.files import ListedFile, is_file, list_files, printable, suffix_of
from alphalayer.catalog.folders import family_of_folder
from alphalayer.catalog.hashes import (
    SHORT_HASH_DIGITS,
    HashCache,
    file_sha256,
    file_stamp,
    open_hash_cache,
)
from alphalayer.catalog.headers import summarize
from alphalayer.catalog.kinds import NOT_CHECKPOINTS, SUPPORTED, describe
from alphalayer.catalog.parts import check_parts, weight_files
from alphalayer.catalog.sidecars import read_settings, sidecars
from alphalayer.core.errors import CorruptFile, ModelUnusable, PickleRefused, UnsupportedFamily

logger = logging.getLogger(__name__)

CHECKPOINTS = "Stable-diffusion"
EMBEDDED_MODEL = Path(__file__).parent.parent / "builtin_models" / "alphalayer-mini"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
VAE_SUFFIX = ".vae.safetensors"
"""Suffix of the VAE beside a checkpoint, after the checkpoint's name."""
_INDEX = "model_index.json"
_RIGHT_FOLDER = {
    "layerdiffuse-patch": "layer_model",
    "transparent-decoder": "layer_model",
    "transparent-encoder": "layer_model",
    "lora": "Lora",
    "embedding": "embeddings",
}
_NO_VAE = f"Put its VAE beside it as NAME{VAE_SUFFIX}, or use a version with the VAE."
_UNET_ALONE = "Use a checkpoint with the text encoders and the VAE inside."
_HINTS = {
    "sdxl-no-vae": _NO_VAE,
    "sd15-no-vae": _NO_VAE,
    "vae": f"Put it beside its checkpoint, as NAME{VAE_SUFFIX}.",
    "sdxl-unet": _UNET_ALONE,
    "sd15-unet": _UNET_ALONE,
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
    models = [
        file
        for file in listed
        if file.path.name == _INDEX
        or (diffusers.isdisjoint((file.path, *file.path.parents)) and not _is_vae_of(file.path))
    ]
    if (EMBEDDED_MODEL / _INDEX).is_file():
        models.append(ListedFile(EMBEDDED_MODEL / _INDEX, f"{EMBEDDED_MODEL.name}/{_INDEX}"))
    entries = _tell_apart([_entry(file, cache) for file in models], folder)
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


def flatten_name(path: str) -> str:
    """Return a model's name from its path below `CHECKPOINTS`."""
    return path.replace("/", "_").replace("\\", "_")


def _is_model_file(name: str) -> bool:
    return name == _INDEX or suffix_of(name) in (".safetensors", *PICKLE_SUFFIXES)


def separate_vae(checkpoint: Path) -> Path | None:
    """Return the VAE file beside a checkpoint, None if there is none."""
    path = checkpoint.with_name(checkpoint.stem + VAE_SUFFIX)
    return path if is_file(path) else None


def _is_vae_of(path: Path) -> bool:
    """Return whether a file is the VAE beside a checkpoint."""
    name = path.name.removesuffix(VAE_SUFFIX)
    return name != path.name and is_file(path.with_name(f"{name}.safetensors"))


def _tell_apart(entries: list[ModelEntry], folder: Path) -> list[ModelEntry]:
    """Name models by their path if one that comes before has the same name.

    Usable ones come first, then those in fewer folders, and the embedded model last.
    """

    def rank(entry: ModelEntry) -> tuple[bool, bool, int]:
        return entry.path == EMBEDDED_MODEL, entry.problem is not None, len(entry.path.parts)

    names: set[str] = set()
    renamed: list[ModelEntry] = []
    for entry in sorted(entries, key=rank):
        root = EMBEDDED_MODEL.parent.parent if entry.path == EMBEDDED_MODEL else folder
        path = printable(entry.path.relative_to(root).as_posix())
        short = path.removesuffix(entry.path.suffix) if entry.kind == "single_file" else path
        name = next((name for name in (entry.name, short) if name not in names), path)
        names.add(name)
        renamed.append(replace(entry, name=name))
    return renamed


def _entry(file: ListedFile, cache: HashCache) -> ModelEntry:
    """Return the entry of a single file, or of the folder of a model_index.json.

    No file may hide the others, so an unexpected error is the problem of its entry.
    """
    is_folder = file.path.name == _INDEX
    try:
        return _diffusers_entry(file, cache) if is_folder else _file_entry(file, cache)
    except Exception as error:
        _log_once(file.path, repr(error))
        path, kind = (file.path.parent, "diffusers") if is_folder else (file.path, "single_file")
        problem = ModelUnusable(
            f"{printable(str(path))} cannot be read: an unexpected error, see the log.",
            hint="Get the file again, or report the error.",
        )
        return ModelEntry(_name_of(file), path, kind, "unknown", problem=problem)


@lru_cache(1000)
def _log_once(path: Path, _error: str) -> None:
    """Log the current exception, once for each file and error."""
    logger.exception("%s cannot be listed.", printable(str(path)))


def _name_of(file: ListedFile) -> str:
    is_folder = file.path.name == _INDEX
    path = Path(file.name).parent.as_posix() if is_folder else file.name
    return flatten_name(path if is_folder else path.removesuffix(file.path.suffix))


def _file_entry(file: ListedFile, cache: HashCache) -> ModelEntry:
    path, problem, family = file.path, file.problem, "unknown"
    if problem is None and suffix_of(path) in PICKLE_SUFFIXES:
        problem = PickleRefused(
            f"{path} is a pickle file, and opening one can run any code that is in it.",
            hint="Use the .safetensors version of this model.",
        )
    elif problem is None:
        family, problem = _family_of_file(path)
    sha256 = None if file.problem else cache.get(path)
    vae = separate_vae(path)
    stamp = tuple(file_stamp(file) for file in (path, *([vae] if vae else []), *sidecars(path)))
    return ModelEntry(_name_of(file), path, "single_file", family, sha256, problem, stamp)


def _family_of_file(path: Path) -> tuple[str, ModelUnusable | None]:
    """Return the family of a single file, and why it cannot be used."""
    try:
        summary = summarize(path)
        vae = separate_vae(path)
        problem = _vae_problem(vae) if vae else None
        read_settings(path)
    except CorruptFile as error:
        return "unknown", error
    family = summary.family
    if problem:
        return family, problem
    if vae:
        family = family.removesuffix("-no-vae")
    if family not in SUPPORTED:
        return family, _unsupported(path, family)
    return family, _incomplete(path, summary.missing) if summary.missing else None


def _vae_problem(path: Path) -> UnsupportedFamily | None:
    """Return why a file cannot be the VAE of a checkpoint."""
    summary = summarize(path)
    if summary.family != "vae":
        return UnsupportedFamily(
            f"{path} is {describe(summary.family)}, not a VAE.", hint="Remove it."
        )
    if summary.has_diffusers_names:
        return UnsupportedFamily(
            f"{path} has the tensor names of diffusers.",
            hint="Use the VAE with the names of LDM, as in sdxl_vae.safetensors.",
        )
    return None


def _diffusers_entry(index: ListedFile, cache: HashCache) -> ModelEntry:
    path, problem, family = index.path.parent, index.problem, "unknown"
    if problem is None:
        try:
            family = family_of_folder(path)
            if family in SUPPORTED:
                check_parts(path, family)
            else:
                problem = _unsupported(path, family)
        except CorruptFile as error:
            problem = error
    hashed = _hashed_file(path, "diffusers")
    sha256 = cache.get(hashed) if hashed.is_file() else None
    if path == EMBEDDED_MODEL:
        sha256 = sha256 or _embedded_sha256()
    files = list_files(path, lambda name: suffix_of(name) in (".safetensors", ".json"))
    stamp = tuple(file_stamp(file.path) for file in files)
    return ModelEntry(_name_of(index), path, "diffusers", family, sha256, problem, stamp)


def _incomplete(path: Path, missing: str) -> CorruptFile:
    return CorruptFile(
        f"{path} is incomplete: {printable(missing)[:200]} is missing.", hint="Download it again."
    )


@lru_cache(1)
def _embedded_sha256() -> str:
    """Hash the embedded model. It is small, so it needs no cache file."""
    return file_sha256(_hashed_file(EMBEDDED_MODEL, "diffusers"))


def _unsupported(path: Path, family: str) -> UnsupportedFamily:
    if family in _RIGHT_FOLDER:
        return UnsupportedFamily(
            f"{path} is {describe(family)}, not a checkpoint.",
            hint=f"Move it to {_RIGHT_FOLDER[family]}/.",
        )
    if family in NOT_CHECKPOINTS:
        return UnsupportedFamily(
            f"{path} is {describe(family)}, not a checkpoint.",
            hint=_HINTS.get(family, "Move it elsewhere."),
        )
    return UnsupportedFamily(
        f"{path} is {describe(family, 'checkpoint')}; "
        "this version supports only complete text-to-image checkpoints of SDXL and SD 1.5.",
        hint=_HINTS.get(family, ""),
    )


def _hashed_file(path: Path, kind: str) -> Path:
    if kind == "single_file":
        return path
    folder = path / "unet"
    return next(iter(weight_files(folder)), folder / "diffusion_pytorch_model.safetensors")
