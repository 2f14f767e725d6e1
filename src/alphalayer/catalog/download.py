"""Getting published models and checking those that are there: names, licences, hashes. Free of torch.

Downloads resume, show their progress and are checked; a hash that differs is told, never fatal for files that users brought.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from alphalayer import catalog
from alphalayer.catalog.hashes import HashCache
from alphalayer.catalog.headers import family_of, read_header
from alphalayer.core.errors import (
    AlphalayerError,
    CorruptFile,
    InvalidRequest,
    ModelNotFound,
    StorageFailed,
)
from alphalayer.core.modes import DECODER_FILES, MODES

SDXL_LICENCE = "SDXL base 1.0: CreativeML Open RAIL++-M. Commercial and hosted use is allowed; its use restrictions must be passed on."
LAYERDIFFUSE_LICENCE = "LayerDiffuse weights: tagged creativeml-openrail-m by their authors."
JUGGERNAUT = (
    "Juggernaut XL is not fetched here: its licence bars use behind API services without a commercial licence. "
    "If you have one, put the file into Stable-diffusion/ of your models folder yourself."
)


@dataclass(frozen=True)
class Published:
    """A published file: where it is, where it goes, what it must hash to (None: not known), and its licence."""

    name: str
    repository: str
    filename: str
    folder: str
    size: int
    sha256: str | None
    licence: str


PUBLISHED = (
    Published(
        "sdxl-base",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "sd_xl_base_1.0.safetensors",
        "Stable-diffusion",
        6_938_078_334,
        None,
        SDXL_LICENCE,
    ),
    Published(
        "layerdiffuse",
        "LayerDiffusion/layerdiffusion-v1",
        "layer_xl_transparent_attn.safetensors",
        "layer_model",
        743_352_688,
        "b7919c5b4837fb64f24c97a7abdf1a9c6e8d60de080a5dae089dde098266df95",
        LAYERDIFFUSE_LICENCE,
    ),
    Published(
        "layerdiffuse",
        "LayerDiffusion/layerdiffusion-v1",
        "vae_transparent_decoder.safetensors",
        "layer_model",
        208_266_320,
        "59dc8feefe40d26b6cb7186aed7af70c60d94ac4f9db8ebe7f121a01ba27a2fc",
        LAYERDIFFUSE_LICENCE,
    ),
    Published(
        "layerdiffuse-conv",
        "LayerDiffusion/layerdiffusion-v1",
        "layer_xl_transparent_conv.safetensors",
        "layer_model",
        3_619_745_776,
        "5ee958d80dcd515fa7ac915274c536fadd3db5d919adeb5ff45107b6169aacc7",
        LAYERDIFFUSE_LICENCE,
    ),
)
"""What `pull` knows. Sizes are about right and serve the check for free space."""


def plan_pull(names: Sequence[str]) -> list[Published]:
    """The files that names mean. Raises `InvalidRequest` for others, Juggernaut XL with its licence's reason."""
    known = sorted({each.name for each in PUBLISHED})
    for name in names:
        if "juggernaut" in name.lower():
            raise InvalidRequest(JUGGERNAUT, field="name")
        if name not in known:
            raise InvalidRequest(
                f'"{name}" is not a model that can be pulled.',
                hint=f"Use: {', '.join(known)}.",
                field="name",
            )
    return [each for each in PUBLISHED if each.name in names]


@dataclass(frozen=True)
class Verified:
    """One file of the models folder and what was found: "as published", "differs from ...", "readable", or what is wrong."""

    path: Path
    finding: str
    is_well: bool


def pull(published: Published, models_dir: Path) -> Verified:
    """Fetch one file into the models folder, resuming what was begun, and check it. Of one that is there it is said whether it differs.

    Raises:
        StorageFailed: not enough room, the folder cannot be written, or another process fetches the same file.
        ModelNotFound: the hub cannot be reached or has no such file.
        CorruptFile: what came does not hash to what was published; the file is kept beside, with `.wrong` added.
    """
    folder = models_dir / published.folder
    target = folder / published.filename
    cache = HashCache(models_dir / ".alphalayer-hashes.json")
    if target.is_file():
        return Verified(target, _compared(published, cache.sha256(target)), True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begun = sum(part.stat().st_size for part in folder.glob(f"{target.name}.*.part"))
        free = shutil.disk_usage(folder).free
        if free + begun < published.size:
            raise StorageFailed(
                f"{published.filename} needs {published.size / 1e9:.1f} GB in {folder} and {free / 1e9:.1f} GB are free.",
                hint="Free some space or name another folder with --models-dir.",
            )
        # two that append to one .part make nonsense of it
        with FileLock(folder / f".{target.name}.lock", timeout=0):
            etag = _fetch(published, target)
    except AlphalayerError:
        raise
    except Timeout:
        raise StorageFailed(
            f"another process fetches {target}.", hint="Wait until it is done."
        ) from None
    except Exception as error:  # which errors of the network huggingface-hub lets through differs between its versions
        if (
            not isinstance(error, OSError)
            or error.errno is None
            or isinstance(error, (ConnectionError, TimeoutError))
        ):
            raise _unreachable(published, error) from None
        raise StorageFailed(
            f"{target} cannot be written: {error.strerror}.", hint="Check space and permissions."
        ) from None
    # the hub's ETag of a large file is its SHA-256
    sha256 = published.sha256 or (etag if re.fullmatch("[0-9a-f]{64}", etag) else None)
    return _checked(target, cache.sha256(target), sha256)


def _fetch(published: Published, target: Path) -> str:
    """Download to a `.part` beside the target, from where an earlier attempt stopped; it bears the file's version, the ETag that
    comes back, in its name."""
    # hf_hub_download forgets what a broken attempt had fetched
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get

    about = get_hf_file_metadata(hf_hub_url(published.repository, published.filename))
    etag = about.etag or "unknown"
    part = target.with_name(f"{target.name}.{etag[:10]}.part")
    with part.open("ab") as file:
        begun = file.tell()
        if begun != about.size:
            http_get(
                about.location,
                file,
                resume_size=begun,
                expected_size=about.size,
                displayed_filename=target.name,
            )
    part.replace(target)
    return etag


def _unreachable(published: Published, error: Exception) -> ModelNotFound:
    return ModelNotFound(
        f"{published.repository}/{published.filename} cannot be fetched: {(str(error) or repr(error)).splitlines()[0]}.",
        hint="Check the connection and run the same command again; it goes on where it stopped.",
    )


def _checked(target: Path, digest: str, sha256: str | None) -> Verified:
    if sha256 is not None and digest != sha256:
        wrong = target.with_name(target.name + ".wrong")
        target.replace(wrong)
        raise CorruptFile(
            f"{target.name} hashes to {digest[:10]} and was published as {sha256[:10]}; kept as {wrong.name}.",
            hint="Run the same command again.",
        )
    return Verified(target, "as published" if sha256 else f"readable, {digest[:10]}", True)


def _compared(published: Published | None, digest: str) -> str:
    """What a file's hash says of it."""
    if published is None or published.sha256 is None:
        return f"readable, {digest[:10]}"
    return (
        "as published"
        if digest == published.sha256
        else f"readable, differs from the published file ({digest[:10]})"
    )


def verify(models_dir: Path, embeddings_dir: Path) -> list[Verified]:
    """Read the header of every model file, LoRA and embedding, hash what is published or a checkpoint, and say what each is."""
    cache = HashCache(models_dir / ".alphalayer-hashes.json")
    published = {each.filename: each for each in PUBLISHED}
    found: list[Verified] = []
    for path in sorted((models_dir / "layer_model").glob("*.safetensors")):
        verified = verify_layer_file(path)
        if verified.is_well:
            verified = Verified(path, _compared(published.get(path.name), cache.sha256(path)), True)
        found.append(verified)
    found += [_verify_checkpoint(entry, models_dir) for entry in catalog.find_models(models_dir)]
    # LoRAs have many forms: names that say nothing else will do
    found += [_verify(path, ("lora", "unknown")) for path in _weight_files(models_dir / "Lora")]
    found += [_verify(path, ("embedding",)) for path in _weight_files(embeddings_dir)]
    return found


def verify_layer_file(path: Path) -> Verified:
    """Read the header of a file of `layer_model`, and say whether it is what its name says."""
    return _verify(path, _layer_families(path.name))


def _layer_families(name: str) -> tuple[str, ...]:
    """What a file of that name may be in `layer_model`."""
    if name in DECODER_FILES:
        return ("transparent-decoder",)
    if name in (MODES["attention"].files[0], MODES["conv"].files[0]):
        return ("layerdiffuse-patch",)
    if any(name in mode.files for mode in MODES.values()):
        # converted to the names of diffusers, where a patch is a LoRA, or a UNet's weights by their names
        return ("layerdiffuse-patch", "lora", "unknown")
    return ("layerdiffuse-patch", "transparent-decoder", "unknown")


def _weight_files(folder: Path) -> list[Path]:
    kinds = (".safetensors", *catalog.PICKLE_SUFFIXES)
    return [path for path in sorted(folder.rglob("*")) if path.suffix in kinds and path.is_file()]


def _verify_checkpoint(entry: catalog.ModelEntry, models_dir: Path) -> Verified:
    try:
        if entry.problem:
            raise entry.problem
        for file in sorted(entry.path.rglob("*.safetensors")):
            read_header(file)
        digest = catalog.hash_model(entry, models_dir)
    except AlphalayerError as error:
        return Verified(entry.path, str(error), False)
    return Verified(
        entry.path, f"readable, {catalog.FAMILY_NAMES[entry.family]}, {digest[:10]}", True
    )


def _verify(path: Path, families: Sequence[str]) -> Verified:
    """A file that should be of one of these families; the first names what is wanted."""
    if path.suffix in catalog.PICKLE_SUFFIXES:
        return Verified(
            path, "is a pickle file and is not opened; use its .safetensors version.", False
        )
    try:
        family = family_of(read_header(path))
    except AlphalayerError as error:
        return Verified(path, str(error), False)
    wanted, name = catalog.FAMILY_NAMES[families[0]], catalog.FAMILY_NAMES.get(family, family)
    if family in families:
        return Verified(path, f"readable, {wanted}", True)
    what = "something unknown." if family == "unknown" else f"a {name}; move it where it belongs."
    return Verified(path, f"is no {wanted}, but {what}", False)
