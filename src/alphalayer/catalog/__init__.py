"""The models folder: what is there, what it is called, and what it is. Free of torch; reads headers, never weights.

models/Stable-diffusion/   checkpoints: single .safetensors files, or diffusers folders (with model_index.json)
models/layer_model/        LayerDiffuse files under their published names
models/Lora/               LoRA files
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alphalayer.catalog.folders import family_of_folder, read_json
from alphalayer.catalog.hashes import SHORT_HASH_DIGITS, HashCache, file_sha256, file_stamp
from alphalayer.catalog.headers import FAMILY_NAMES, Header, family_of, read_header
from alphalayer.core.errors import (
    CommandHint,
    CorruptFile,
    InvalidRequest,
    ModelNotFound,
    ModelUnusable,
    PickleRefused,
    UnsupportedFamily,
)
from alphalayer.core.request import ModelDefaults

__all__ = [
    "FAMILY_NAMES",
    "SHORT_HASH_DIGITS",
    "Header",
    "ModelEntry",
    "check_layerdiffuse_method",
    "file_stamp",
    "find_lora",
    "find_models",
    "hash_model",
    "layer_config",
    "layer_file",
    "model_defaults",
    "read_header",
    "read_json",
    "resolve_model",
    "weight_files",
]

CHECKPOINTS = "Stable-diffusion"
EMBEDDED_MODEL = Path(__file__).parent.parent / "builtin_models" / "alphalayer-mini"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
LAYER_CONFIG = Path("layerdiffuse", "config.json")
"""In a model's folder: its own patch, decoder and defaults."""
_BRACKETED_HASH = re.compile(rf" \[[0-9a-f]{{{SHORT_HASH_DIGITS}}}\]$")
FP16 = ".fp16"
PULL = "models pull sdxl-base layerdiffuse"
PULL_LAYERS = "models pull layerdiffuse"
"""Commands that download model files."""


@dataclass(frozen=True)
class ModelEntry:
    """One model of the folder. `problem` says why it cannot be drawn with, if it cannot."""

    name: str
    path: Path
    kind: str
    """"single_file" or "diffusers"."""
    family: str
    sha256: str | None = None
    problem: ModelUnusable | None = None
    stamp: tuple[tuple[int, int], ...] = ()
    """The `file_stamp` of each of its files: a model that was written anew under its old name has another."""

    @property
    def short_hash(self) -> str | None:
        """The first ten digits of the SHA-256, None until the file was hashed."""
        return self.sha256[:SHORT_HASH_DIGITS] if self.sha256 else None

    @property
    def title(self) -> str:
        """The name, with the short hash in brackets once it is known."""
        return f"{self.name} [{self.short_hash}]" if self.short_hash else self.name

    def webui_json(self) -> dict[str, Any]:
        """The entry as `GET /sdapi/v1/sd-models` shows it."""
        return {
            "title": self.title,
            "model_name": self.name,
            "hash": self.short_hash,
            "sha256": self.sha256,
            "filename": str(self.path.resolve()),
            "config": None,
        }


def find_models(models_dir: Path) -> list[ModelEntry]:
    """All checkpoints of a models folder by name, usable or not, and the embedded model last."""
    folder, cache = models_dir / CHECKPOINTS, _cache(models_dir)
    entries: list[ModelEntry] = []
    diffusers = [index.parent for index in sorted(folder.rglob("model_index.json"))]
    entries += [_diffusers_entry(path, folder, cache) for path in diffusers]
    for path in sorted(folder.rglob("*")):
        inside = any(parent in path.parents for parent in diffusers)
        if path.suffix in (".safetensors", *PICKLE_SUFFIXES) and path.is_file() and not inside:
            entries.append(_file_entry(path, folder, cache))
    if (EMBEDDED_MODEL / "model_index.json").is_file():
        entry = _diffusers_entry(EMBEDDED_MODEL, EMBEDDED_MODEL.parent, cache)
        entries.append(replace(entry, sha256=entry.sha256 or _embedded_sha256()))
    return sorted(entries, key=lambda entry: (entry.path == EMBEDDED_MODEL, entry.name.lower()))


def resolve_model(
    name: str | None, entries: list[ModelEntry], models_dir: Path = Path("models")
) -> ModelEntry:
    """The entry that a name, title, path below `CHECKPOINTS`, hash, file name or file name without its ending means, as `_rank` ranks
    them; of several of one rank the first that is usable. Without one the first usable entry. `models_dir` is for messages.

    Raises:
        ModelNotFound: none of that name; the message lists those that are there.
        ModelUnusable: it is there and cannot be drawn with.
    """
    if not name:
        usable = [entry for entry in entries if not entry.problem]
        if usable:
            return usable[0]
        if entries and entries[0].problem:
            raise entries[0].problem
        raise ModelNotFound(
            f"no model is in {models_dir / CHECKPOINTS}.",
            hint=CommandHint("Put an SDXL checkpoint there, or run:", PULL),
        )
    ranks = [_rank(entry, name) for entry in entries]
    best = max((rank for rank in ranks if rank), default=None)
    matches = [entry for entry, rank in zip(entries, ranks, strict=True) if rank and rank == best]
    for entry in matches:
        if entry.problem is None:
            return entry
    if matches and matches[0].problem:
        raise matches[0].problem
    there = [
        f"{entry.name} (built in)" if entry.path == EMBEDDED_MODEL else entry.name
        for entry in entries
    ]
    raise ModelNotFound(
        f'no model "{name}" in {models_dir / CHECKPOINTS}; {_listed(there)}.',
        hint=CommandHint("Use one of them, or run:", PULL),
        field="model",
    )


def _rank(entry: ModelEntry, name: str) -> tuple[bool, int] | None:
    """How well an entry answers to a name, greater is better; None: not at all. A title's hash may be older than the one that we know, or
    newer: it speaks for the entry that has it and against none."""
    bracketed = _BRACKETED_HASH.search(name)
    bare = name[: bracketed.start()] if bracketed else name
    agrees = bracketed is not None and entry.short_hash == bracketed[0][2:-1]
    ways = (
        {entry.name, entry.name + entry.path.suffix, entry.sha256, entry.short_hash},
        {entry.path.name},
        {entry.path.stem},
    )
    for i, way in enumerate(ways):
        if way & {name, bare, _flat(bare)}:
            return agrees, -i
    return None


def hash_model(entry: ModelEntry, models_dir: Path) -> str:
    """The SHA-256 of a model, of its UNet where it is a folder; computed once, then remembered. Raises `CorruptFile`."""
    file = _hashed_file(entry.path, entry.kind)
    try:
        return _cache(models_dir).sha256(file)
    except OSError as error:
        raise CorruptFile(
            f"{file} cannot be read: {error.strerror}.", hint="Get the model again."
        ) from None


def model_defaults(path: Path) -> ModelDefaults:
    """What a model is drawn with where a request is silent: its folder's own defaults, or those of SDXL. Raises `CorruptFile`."""
    try:
        return ModelDefaults.model_validate(layer_config(path).get("defaults", {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptFile(f"{path / LAYER_CONFIG}: defaults.{where}: {first['msg']}.") from None


def check_layerdiffuse_method(entry: ModelEntry, method: str) -> None:
    """Raise `InvalidRequest` where a model brings a patch of its own and that is of another method.

    Its `layerdiffuse/config.json` names the method; "attention", the default of requests, means the model's patch, whatever it is.
    """
    if method == "attention":
        return
    config = layer_config(entry.path)
    if "patch" in config and method != config.get("method"):
        raise InvalidRequest(
            f'{entry.name} brings its own LayerDiffuse patch, which is not one of "{method}".',
            hint='Use "attention", or another model.',
            field="layerdiffuse_method",
        )


def find_lora(models_dir: Path, name: str) -> Path:
    """The file of a LoRA by its name without extension. Raises `InvalidRequest` if there is none."""
    files = {path.stem: path for path in sorted((models_dir / "Lora").rglob("*.safetensors"))}
    if name not in files:
        raise InvalidRequest(
            f'no LoRA "{name}" in {models_dir / "Lora"}; {_listed(list(files))}.', field="loras"
        )
    return files[name]


def _listed(names: list[str]) -> str:
    return (
        f"there {'is' if len(names) == 1 else 'are'}: {', '.join(names)}"
        if names
        else "there is none"
    )


def layer_config(path: Path) -> dict[str, Any]:
    """What a model's folder says of its own LayerDiffuse files; empty where it has none. Raises `CorruptFile`."""
    own = path / LAYER_CONFIG
    return read_json(own) if own.is_file() else {}


def layer_file(model: Path, names: Sequence[str], named: str | None, models_dir: Path) -> Path:
    """Where a LayerDiffuse file of a model is, or would be: the one `named` by its folder's config, the first of the published `names` in
    its own `layerdiffuse/`, or the first of them in the shared folder."""
    own, shared = (model / LAYER_CONFIG).parent, models_dir / "layer_model"
    if named is not None:
        return own / named
    places = [folder / name for folder in (own, shared) for name in names]
    return next((place for place in places if place.is_file()), shared / names[0])


def _flat(path: str) -> str:
    """A name of the list from a path below `CHECKPOINTS`."""
    return path.replace("/", "_").replace("\\", "_")


def _file_entry(path: Path, folder: Path, cache: HashCache) -> ModelEntry:
    name = _flat(str(path.relative_to(folder).with_suffix("")))
    problem: ModelUnusable | None = None
    family = "unknown"
    if path.suffix in PICKLE_SUFFIXES:
        problem = PickleRefused(
            f"{path} is a pickle file, and opening one can run any code that is in it.",
            hint="Use the .safetensors version of this model.",
        )
    else:
        try:
            family = _family_of_file(path, path.stat().st_mtime_ns)
        except (CorruptFile, FileNotFoundError) as error:
            problem = error if isinstance(error, CorruptFile) else CorruptFile(f"{path} is gone.")
        else:
            problem = None if family == "sdxl" else _unsupported(path, family)
    return ModelEntry(
        name, path, "single_file", family, cache.known(path), problem, (file_stamp(path),)
    )


@lru_cache(1)
def _embedded_sha256() -> str:
    """Small enough to be known from the start, also where the models folder cannot be written."""
    return file_sha256(_hashed_file(EMBEDDED_MODEL, "diffusers"))


@lru_cache(256)
def _family_of_file(path: Path, _modified: int) -> str:
    return family_of(read_header(path))


def _unsupported(path: Path, family: str) -> UnsupportedFamily:
    right_place = {
        "layerdiffuse-patch": "layer_model",
        "transparent-decoder": "layer_model",
        "lora": "Lora",
        "embedding": "embeddings",
    }
    what = FAMILY_NAMES.get(family, family)
    if family in right_place:
        return UnsupportedFamily(
            f"{path} is a {what}, not a checkpoint.", hint=f"Move it to {right_place[family]}/."
        )
    return UnsupportedFamily(
        f"{path} is a {what} checkpoint; this version draws with whole SDXL text-to-picture checkpoints only.",
        hint="Use a version with the VAE inside." if family == "sdxl-no-vae" else "",
    )


def _diffusers_entry(path: Path, folder: Path, cache: HashCache) -> ModelEntry:
    name = _flat(str(path.relative_to(folder)))
    problem: ModelUnusable | None = None
    family = "unknown"
    try:
        family = family_of_folder(path)
    except CorruptFile as error:
        problem = error
    else:
        problem = None if family == "sdxl" else _unsupported(path, family)
    hashed = _hashed_file(path, "diffusers")
    known = cache.known(hashed) if hashed.is_file() else None
    files = sorted(file for file in path.rglob("*") if file.suffix in (".safetensors", ".json"))
    return ModelEntry(
        name, path, "diffusers", family, known, problem, tuple(file_stamp(file) for file in files)
    )


def _hashed_file(path: Path, kind: str) -> Path:
    if kind == "single_file":
        return path
    folder = path / "unet"
    return next(iter(weight_files(folder)), folder / "diffusion_pytorch_model.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """The files that a part of a diffusers folder is read from: plain ones, or, where there are no others, those named for 16 bit."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if FP16 not in file.name] or files


def _cache(models_dir: Path) -> HashCache:
    return HashCache(models_dir / ".alphalayer-hashes.json")
