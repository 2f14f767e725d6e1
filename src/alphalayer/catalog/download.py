"""Download of published models, and verification of model files: names, licences, hashes.

Downloads resume, show their progress and are verified.
A user's own file may differ from the published one: its hash is reported, and is not an error.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from alphalayer import catalog
from alphalayer.catalog.files import ListedFile, list_files, printable, suffix_of
from alphalayer.catalog.hashes import HashCache, open_hash_cache
from alphalayer.catalog.headers import read_header, summarize
from alphalayer.catalog.kinds import describe
from alphalayer.catalog.layer_kinds import (
    DECODERS,
    ENCODERS,
    RESCALED_ENCODER,
    published_name,
)
from alphalayer.core.errors import (
    AlphalayerError,
    CorruptFile,
    InvalidRequest,
    ModelNotFound,
    StorageFailed,
)

SDXL_LICENCE = (
    "SDXL base 1.0: CreativeML Open RAIL++-M. "
    "Commercial and hosted use is allowed; its use restrictions must be passed on."
)
LAYERDIFFUSE_LICENCE = "LayerDiffuse weights: tagged creativeml-openrail-m by their authors."
JUGGERNAUT = (
    "Juggernaut XL cannot be downloaded by this command: its licence forbids use behind API "
    "services without a commercial licence. "
    "If you have one, put the file into Stable-diffusion/ of your models folder yourself."
)


@dataclass(frozen=True)
class Published:
    """A published file: its source, target folder, SHA-256 (None: unknown) and licence."""

    name: str
    repository: str
    filename: str
    folder: str
    size: int
    sha256: str | None
    licence: str


def _layer_file(name: str, filename: str, size: int, sha256: str | None) -> Published:
    return Published(
        name,
        "LayerDiffusion/layerdiffusion-v1",
        f"{filename}.safetensors",
        "layer_model",
        size,
        sha256,
        LAYERDIFFUSE_LICENCE,
    )


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
    _layer_file(
        "layerdiffuse",
        "layer_xl_transparent_attn",
        743_352_688,
        "b7919c5b4837fb64f24c97a7abdf1a9c6e8d60de080a5dae089dde098266df95",
    ),
    _layer_file(
        "layerdiffuse",
        "vae_transparent_decoder",
        208_266_320,
        "59dc8feefe40d26b6cb7186aed7af70c60d94ac4f9db8ebe7f121a01ba27a2fc",
    ),
    _layer_file(
        "layerdiffuse-conv",
        "layer_xl_transparent_conv",
        3_619_745_776,
        "5ee958d80dcd515fa7ac915274c536fadd3db5d919adeb5ff45107b6169aacc7",
    ),
    _layer_file(
        "layerdiffuse-fg2ble",
        "layer_xl_fg2ble",
        701_981_624,
        "50a29851ad56308f14d6c9ed375be17df6921efeca240b31f567f6b8c76d1e70",
    ),
    _layer_file(
        "layerdiffuse-fgble2bg",
        "layer_xl_fgble2bg",
        702_004_664,
        "179a61fdcdb149af1897b2840f24ba09466ab6265b2c792b0e99df557f0439be",
    ),
    _layer_file(
        "layerdiffuse-bg2ble",
        "layer_xl_bg2ble",
        701_981_624,
        "2901d1353cc4ca763c8bedc48453b36e88680605f417c7f7ec730a7c36845d7c",
    ),
    _layer_file(
        "layerdiffuse-bgble2fg",
        "layer_xl_bgble2fg",
        3_619_791_856,
        "1688f0c17447f74662686fadd431f24d26a1ba8ffea322c6f56c8b5ed581b78d",
    ),
    _layer_file("layerdiffuse-encoder", "vae_transparent_encoder", 2_365_008, None),
    _layer_file(
        "layerdiffuse-sd15",
        "layer_sd15_transparent_attn",
        350_266_608,
        "cc9ee87452bf1ccdd419035bf9618f6bdcaac1a2d3e23694d62e5a9c721da295",
    ),
    *(
        _layer_file(
            name,
            "layer_sd15_vae_transparent_decoder",
            208_266_320,
            "6df4712dfbb3783231b22f869a5da5cbfea782ebb05f782bd9e8744bfb0cdf03",
        )
        for name in ("layerdiffuse-sd15", "layerdiffuse-sd15-decoder")
    ),
    _layer_file(
        "layerdiffuse-sd15-fg2bg",
        "layer_sd15_fg2bg",
        562_982_312,
        "5bade856ec3e55d6ceb0e35bbc97cea7fa4953f7776c8032f2fe52ba740ed580",
    ),
    _layer_file(
        "layerdiffuse-sd15-bg2fg",
        "layer_sd15_bg2fg",
        562_982_312,
        "8367f976da1cc4275e513c7fb40f977ca312e79e720d7db7ae94978a9359fb62",
    ),
    _layer_file(
        "layerdiffuse-sd15-joint",
        "layer_sd15_joint",
        554_404_208,
        "2cc81c33c1a786bdc376c6d1bfb43dbdffda2f610f7c6b4ebd776505a29712bd",
    ),
    _layer_file("layerdiffuse-sd15-encoder", "layer_sd15_vae_transparent_encoder", 2_365_008, None),
)
"""All files that `pull` can download. Sizes (bytes) are approximate, for the free space check."""


def names() -> list[str]:
    """Return the names that `pull` knows, in the order of `PUBLISHED`."""
    return list(dict.fromkeys(published.name for published in PUBLISHED))


def plan_pull(requested: Sequence[str]) -> list[Published]:
    """Return the files to download for these names.

    Raises:
        InvalidRequest: A name is unknown, or its licence forbids the download.
    """
    known = names()
    for name in requested:
        if "juggernaut" in name.lower():
            raise InvalidRequest(JUGGERNAUT, field="name")
        if name not in known:
            raise InvalidRequest(
                f'"{name}" is not a model that can be pulled.',
                hint=f"Use: {', '.join(known)}.",
                field="name",
            )
    files = {file.filename: file for file in PUBLISHED if file.name in requested}
    return list(files.values())


@dataclass(frozen=True)
class Verified:
    """Result for one file: "as published", "readable", "differs from ...", or the error."""

    path: Path
    finding: str
    is_ok: bool

    def __str__(self) -> str:
        path = printable(str(self.path))
        return f"{path}  {self.finding.removeprefix(f'{path} ')}"


def pull(published: Published, models_dir: Path) -> Verified:
    """Download one file into the models folder, or resume its download, and verify it.

    An existing file is not downloaded again, only compared with the published one.

    Raises:
        StorageFailed: There is too little space, the folder cannot be written,
            or another process downloads the same file.
        ModelNotFound: The hub cannot be reached or has no such file.
        CorruptFile: The hash differs from the published one.
            The file is kept with `.wrong` added to its name.
    """
    folder = models_dir / published.folder
    target = folder / published.filename
    cache = open_hash_cache(models_dir)
    if target.is_file():
        return Verified(target, _compare(published, cache.sha256(target)), True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_free_space(published, target)
        # two processes that append to one .part file would corrupt it
        with FileLock(folder / f".{target.name}.lock", timeout=0):
            etag = _download(published, target)
    except AlphalayerError:
        raise
    except Timeout:
        raise StorageFailed(
            f"another process downloads {target}.", hint="Wait until it is done."
        ) from None
    except Exception as error:  # the network errors of huggingface-hub differ by its version
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
    return _check_hash(target, cache.sha256(target), sha256)


def _check_free_space(published: Published, target: Path) -> None:
    folder = target.parent
    downloaded = sum(part.stat().st_size for part in folder.glob(f"{target.name}.*.part"))
    free = shutil.disk_usage(folder).free
    if free + downloaded < published.size:
        raise StorageFailed(
            f"{published.filename} needs {published.size / 1e9:.1f} GB in {folder} "
            f"and {free / 1e9:.1f} GB are free.",
            hint="Free some space or name another folder with --models-dir.",
        )


def _download(published: Published, target: Path) -> str:
    """Download to a `.part` file beside the target, resuming an earlier attempt.

    Returns:
        The ETag of the file, which is also part of the name of the `.part` file.
    """
    # hf_hub_download does not resume after an interruption
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get

    metadata = get_hf_file_metadata(hf_hub_url(published.repository, published.filename))
    etag = metadata.etag or "unknown"
    part = target.with_name(f"{target.name}.{etag[:10]}.part")
    with part.open("ab") as file:
        downloaded = file.tell()
        if downloaded != metadata.size:
            http_get(
                metadata.location,
                file,
                resume_size=downloaded,
                expected_size=metadata.size,
                displayed_filename=target.name,
            )
    part.replace(target)
    return etag


def _unreachable(published: Published, error: Exception) -> ModelNotFound:
    reason = (str(error) or repr(error)).splitlines()[0]
    return ModelNotFound(
        f"{published.repository}/{published.filename} cannot be downloaded: {reason}.",
        hint="Check the connection and run the same command again; it continues where it stopped.",
    )


def _check_hash(target: Path, digest: str, sha256: str | None) -> Verified:
    if sha256 is not None and digest != sha256:
        wrong = target.with_name(target.name + ".wrong")
        target.replace(wrong)
        raise CorruptFile(
            f"{target.name} hashes to {digest[:10]} and was published as {sha256[:10]}; "
            f"kept as {wrong.name}.",
            hint="Run the same command again.",
        )
    return Verified(target, "as published" if sha256 else f"readable, {digest[:10]}", True)


def _compare(published: Published | None, digest: str) -> str:
    """Return the finding for a readable file by its hash."""
    if published is None or published.sha256 is None:
        return f"readable, {digest[:10]}"
    if digest == published.sha256:
        return "as published"
    return f"readable, differs from the published file ({digest[:10]})"


def verify(models_dir: Path, embeddings_dir: Path) -> list[Verified]:
    """Verify every model file, LoRA and embedding by its header.

    Layer files and checkpoints are hashed, too.
    """
    cache = open_hash_cache(models_dir)
    published = {file.filename: file for file in PUBLISHED}
    results: list[Verified] = []
    for result in verify_layer_files(models_dir):
        path = result.path
        results.append(
            _verify_published(path, published.get(path.name), cache) if result.is_ok else result
        )
    results += [_verify_checkpoint(entry, models_dir) for entry in catalog.find_models(models_dir)]
    # LoRAs have many forms, so tensor names of no known kind are accepted
    for folder, families in (
        (models_dir / "Lora", ("lora", "unknown")),
        (embeddings_dir, ("embedding",)),
    ):
        results += [_verify(file, families) for file in list_files(folder, _is_weight_file)]
    return results


def _verify_published(path: Path, published: Published | None, cache: HashCache) -> Verified:
    try:
        return Verified(path, _compare(published, cache.sha256(path)), True)
    except OSError as error:
        return Verified(path, f"cannot be read: {error.strerror}.", False)


def verify_layer_files(models_dir: Path) -> list[Verified]:
    """Check that each file of `layer_model` is of the kind that its name promises."""
    return [
        _verify_layer_file(file) for file in list_files(models_dir / "layer_model", _is_weight_file)
    ]


def _verify_layer_file(file: ListedFile) -> Verified:
    path, name = file.path, published_name(file.path.name)
    if file.problem or suffix_of(path) in catalog.PICKLE_SUFFIXES:
        return _verify(file, ())
    try:
        actual = summarize(path).layer_names
    except AlphalayerError as error:
        return Verified(path, str(error), False)
    if name in actual:
        return Verified(path, "readable, LayerDiffuse", True)
    if not actual:
        return _verify(file, _layer_families(path.name))
    kinds = {DECODERS: "transparent-decoder", ENCODERS: "transparent-encoder"}
    kind = describe(kinds.get(actual, "layerdiffuse-patch"))
    if path.name == RESCALED_ENCODER:
        return Verified(path, f"is {kind} whose output has another factor. It is not used.", False)
    names = " or ".join(f"{other}.safetensors" for other in actual)
    return Verified(path, f"is {kind} with the tensors of {names}. Rename it.", False)


def _layer_families(name: str) -> tuple[str, ...]:
    """Return the families that a file of that name may have in `layer_model`."""
    original = published_name(name)
    if original in DECODERS:
        return ("transparent-decoder",)
    if original in ENCODERS:
        return ("transparent-encoder",)
    if name in {file.filename for file in PUBLISHED}:
        return ("layerdiffuse-patch",)
    if name.removesuffix(".safetensors") != original:
        # names of diffusers: there a patch is a LoRA, or has the tensor names of a UNet
        return ("layerdiffuse-patch", "lora", "unknown")
    return ("layerdiffuse-patch", "unknown")


def _is_weight_file(name: str) -> bool:
    return suffix_of(name) in (".safetensors", *catalog.PICKLE_SUFFIXES)


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


def _verify(file: ListedFile, families: Sequence[str]) -> Verified:
    """Check that a file is of one of these families; the first one is reported."""
    path = file.path
    if file.problem is None and suffix_of(path) in catalog.PICKLE_SUFFIXES:
        return Verified(
            path, "is a pickle file and is not opened; use its .safetensors version.", False
        )
    try:
        if file.problem:
            raise file.problem
        family = summarize(path).family
    except AlphalayerError as error:
        return Verified(path, str(error), False)
    if family in families:
        return Verified(path, f"readable, {catalog.FAMILY_NAMES[families[0]]}", True)
    move = "" if family == "unknown" else "; move it where it belongs"
    return Verified(path, f"is not {describe(families[0])}, but {describe(family)}{move}.", False)
