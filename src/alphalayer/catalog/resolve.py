"""Names in requests: which model or LoRA a name refers to."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from alphalayer.catalog.entries import CHECKPOINTS, EMBEDDED_MODEL, ModelEntry, flatten_name
from alphalayer.catalog.files import printable, usable_files
from alphalayer.catalog.hashes import SHORT_HASH_DIGITS
from alphalayer.catalog.headers import listed_metadata, summarize
from alphalayer.core.errors import CommandHint, CorruptFile, InvalidRequest, ModelNotFound

PULL = "models pull sdxl-base layerdiffuse"
PULL_LAYERS = "models pull layerdiffuse"
"""Commands that download model files."""
_BRACKETED_HASH = re.compile(rf" \[[0-9a-f]{{{SHORT_HASH_DIGITS}}}\]$")


def resolve_model(
    name: str | None, entries: list[ModelEntry], models_dir: Path = Path("models")
) -> ModelEntry:
    """Return the entry that a name refers to; without a name, the first usable entry.

    If several entries match equally well, the first usable one is returned.

    Args:
        name: A name, title, path below `CHECKPOINTS`, hash, or file name with or without extension.
        entries: All models, from `find_models`.
        models_dir: The models folder, for messages.

    Raises:
        ModelNotFound: No model has that name. The message lists the available ones.
        ModelUnusable: The model exists but cannot be used.
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
    names = [
        f"{entry.name} (built in)" if entry.path == EMBEDDED_MODEL else entry.name
        for entry in entries
    ]
    raise ModelNotFound(
        f'no model "{name}" in {models_dir / CHECKPOINTS}; {_format_names(names)}.',
        hint=CommandHint("Use one of them, or run:", PULL),
        field="model",
    )


def find_lora(models_dir: Path, name: str) -> Path:
    """Return the file of a LoRA by its name.

    That is its file name without extension, with or without its folders, or the name that it was
    trained under (`ss_output_name`). A file name counts first.

    Raises:
        InvalidRequest: There is no such LoRA, or there are several.
    """
    folder = models_dir / "Lora"
    files = usable_files(folder)
    for names_of in (_lora_paths(folder), _lora_stem, lora_alias):
        for same in (str, _normalize):
            matches = [path for path in files if same(name) in map(same, names_of(path))]
            if len(matches) == 1:
                return matches[0]
            if matches:
                paths = ", ".join(_lora_paths(folder)(path)[0] for path in matches)
                raise InvalidRequest(
                    f'{len(matches)} LoRAs have the name "{name}": {printable(paths)[:1000]}.',
                    hint="Use one of these names.",
                    field="loras",
                )
    names = _format_names([path.stem for path in files])
    raise InvalidRequest(f'no LoRA "{name}" in {folder}; {names}.', field="loras")


def lora_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in a LoRA's header, of limited size; none if it is damaged."""
    try:
        return listed_metadata(path)
    except CorruptFile:
        return {}


def lora_alias(path: Path) -> list[str]:
    """Return the name that a LoRA was trained under, or nothing."""
    try:
        alias = summarize(path).alias
    except CorruptFile:
        alias = ""
    return [alias] if alias and alias != "None" else []


def _lora_paths(folder: Path) -> Callable[[Path], list[str]]:
    def paths(path: Path) -> list[str]:
        return [path.relative_to(folder).with_suffix("").as_posix()]

    return paths


def _lora_stem(path: Path) -> list[str]:
    return [path.stem]


def _rank(entry: ModelEntry, name: str) -> tuple[bool, int] | None:
    """Rank how well an entry matches a name: greater is better, None is no match.

    A hash in a title may be outdated, or newer than the known one.
    So it favours the entry that has it, and excludes no other.
    """
    bracketed = _BRACKETED_HASH.search(name)
    bare = name[: bracketed.start()] if bracketed else name
    has_same_hash = bracketed is not None and entry.short_hash == bracketed[0][2:-1]
    aliases = (
        {entry.name, entry.name + entry.path.suffix, entry.sha256, entry.short_hash},
        {entry.path.name},
        {entry.path.stem},
        {_normalize(entry.name)},
    )
    requested = {name, bare, flatten_name(bare), _normalize(bare)}
    if entry.name in (name, bare):
        return has_same_hash, 1
    for i, names in enumerate(aliases):
        if names & requested:
            return has_same_hash, -i
    return None


def _normalize(name: str) -> str:
    """Return the composed form of a name. macOS stores names of files decomposed."""
    return unicodedata.normalize("NFC", name)


def _format_names(names: list[str]) -> str:
    if not names:
        return "there is none"
    return f"there {'is' if len(names) == 1 else 'are'}: {', '.join(names)}"
