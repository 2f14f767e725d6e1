"""Says what is wrong on this machine, and what to do about it. Looks only; changes nothing."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alphalayer import catalog
from alphalayer.catalog import download
from alphalayer.catalog.layer_files import DECODER_FILES, PATCH_FILES
from alphalayer.config import Settings
from alphalayer.core.errors import CorruptFile, SetupFailed, StorageFailed
from alphalayer.core.optional_dependencies import install_hint, is_installed
from alphalayer.storage.objects import open_storage

LITTLE_DISK = 2 * 1024**3
PATIENCE_S = 120
_AFTER_ALL = "~"
"""Sorts after the name of every picture: nothing is to come, but the bucket has to answer."""
_OTHER_PORT = "Use another one with --port."
# torch is asked in a process of its own: importing it here would take seconds and could crash
_ASK_TORCH = (
    "import json, torch; cuda = torch.cuda.is_available(); "
    "print(json.dumps({'torch': torch.__version__, 'built': torch.version.cuda, "
    "'mps': torch.backends.mps.is_available(), "
    "'gpus': [[torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i)] "
    "for i in range(torch.cuda.device_count())] if cuda else []}))"
)


@dataclass(frozen=True)
class Finding:
    """One thing looked at: how it is, and what to do if it is not well."""

    level: Literal["ok", "warning", "error"]
    what: str
    hint: str = ""


def diagnose(settings: Settings) -> list[Finding]:
    """Look at torch and GPU, models, LayerDiffuse files, the port, the place of pictures and its room, and the shared queue."""
    findings: list[Finding] = []
    pictures = _bucket if settings.storage else _outputs
    for look in (_torch, _models, _layer_files, _port, pictures, _database):
        findings += look(settings)
    return findings


def _ask_torch() -> dict[str, Any] | str:
    """What torch says of itself, or why it says nothing."""
    command = [sys.executable, "-c", _ASK_TORCH]
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"torch does not answer within {PATIENCE_S} s."
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or [f"no message, exit code {asked.returncode}"])[
            -1
        ]
        return f"torch cannot be imported: {last}"
    try:
        # what is imported along with it may print, too
        return json.loads(asked.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return f"torch says nothing of itself: {asked.stdout[-200:]!r}"


def _torch(settings: Settings) -> Iterator[Finding]:
    if not is_installed("torch"):
        if settings.role == "api":
            yield Finding("ok", "torch is not installed; the role api does not need it")
        else:
            yield Finding("error", "torch is not installed.", install_hint("engine"))
        return
    answer = _ask_torch()
    if isinstance(answer, str):
        hint = "Look at nvidia-smi (a driver that hangs holds torch up), or remove .venv and run: python3 run.py doctor"
        yield Finding("error", answer, hint)
        return
    yield Finding("ok", f"torch {answer['torch']}")
    for name, free, total in answer["gpus"]:
        yield Finding("ok", f"GPU {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    if answer["mps"]:
        yield Finding("ok", "GPU of Apple silicon (mps)")
    if answer["gpus"] or answer["mps"] or settings.device == "cpu":
        return
    if shutil.which("nvidia-smi"):
        built = f"built for CUDA {answer['built']}" if answer["built"] else "a CPU build"
        yield Finding(
            "error",
            f"this machine has an NVIDIA driver, and torch ({built}) sees no GPU.",
            "Look at CUDA_VISIBLE_DEVICES and nvidia-smi, or remove .venv and run: python3 run.py --cuda doctor",
        )
    else:
        yield Finding(
            "warning", "no GPU; pictures are drawn on the CPU.", "SDXL wants a GPU of 8 GB or more."
        )


def check_models_dir(settings: Settings) -> None:
    """Raise `SetupFailed` if the models folder that somebody named is not there, or if there is a file in its place."""
    folder = settings.models_dir
    if folder.is_dir() or ("models_dir" not in settings.model_fields_set and not folder.exists()):
        return
    raise SetupFailed(
        f"the models folder {folder} is {'not a folder' if folder.exists() else 'not there'}.",
        hint=f"Name the one that holds {catalog.CHECKPOINTS}/ with --models-dir (the setting models_dir).",
    )


def _models(settings: Settings) -> Iterator[Finding]:
    try:
        check_models_dir(settings)
    except SetupFailed as error:
        yield Finding("error", error.message, error.hint)
        return
    entries = catalog.find_models(settings.models_dir)
    for entry in entries:
        if entry.problem:
            yield Finding("warning", entry.problem.message, entry.problem.hint)
        else:
            built_in = f" ({catalog.BUILT_IN})" if entry.path == catalog.EMBEDDED_MODEL else ""
            yield Finding("ok", f"model {entry.title}{built_in}")
    if not any(entry.problem is None for entry in entries):
        folder = settings.models_dir / catalog.CHECKPOINTS
        yield Finding(
            "error",
            f"no usable model in {folder}.",
            f"Put an SDXL checkpoint there, or run: {catalog.PULL}",
        )


def _layer_files(settings: Settings) -> Iterator[Finding]:
    folder = settings.models_dir / "layer_model"
    configs: dict[Path, dict[str, Any]] = {}
    for entry in catalog.find_models(settings.models_dir):
        if entry.problem is None:
            try:
                configs[entry.path] = catalog.layer_config(entry.path)
            except CorruptFile as error:
                yield Finding("error", error.message, error.hint)
    kinds = (
        ("patch", "patch", PATCH_FILES["attention"]),
        ("decoder", "transparent decoder", DECODER_FILES),
    )
    for key, what, names in kinds:
        wanted = {
            catalog.layer_file(path, names, config.get(key), settings.models_dir)
            for path, config in configs.items()
        }
        for missing in sorted(path for path in wanted if not path.is_file()):
            where = f"the LayerDiffuse {what} ({missing.name}) is not in {missing.parent}."
            yield Finding(
                "error",
                where,
                catalog.PULL_LAYERS if missing.parent == folder else "Get the model again.",
            )
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path:
            found = download.verify_layer_file(path)
            if found.is_ok:
                yield Finding("ok", f"LayerDiffuse {what}")
            else:
                hint = f"Remove it. {catalog.PULL_LAYERS}"
                yield Finding(
                    "error",
                    f"LayerDiffuse {what}: {path} {found.finding.removeprefix(f'{path} ')}",
                    hint,
                )


def check_port(host: str, port: int) -> None:
    """Raise `SetupFailed` if nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            is_address = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
            hint = (
                "Use an address of this machine with --host; 0.0.0.0 means all."
                if is_address
                else _OTHER_PORT
            )
            raise SetupFailed(
                f"port {port} on {host}: {error.strerror or error}.", hint=hint
            ) from None


def _port(settings: Settings) -> Iterator[Finding]:
    try:
        check_port(settings.host, settings.port)
    except SetupFailed as error:
        yield Finding("warning", error.message, error.hint)
    else:
        yield Finding("ok", f"port {settings.port} is free")


def _outputs(settings: Settings) -> Iterator[Finding]:
    folder = settings.outputs_dir
    there = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        yield Finding(
            "error",
            f"cannot write to {Path(folder).resolve()}: {error.strerror}.",
            "Set outputs_dir to a folder that can.",
        )
        return
    what = f"{free / 2**30:.1f} GiB free for pictures in {folder}"
    yield (
        Finding("ok", what) if free > LITTLE_DISK else Finding("warning", what, "Free some space.")
    )


def _bucket(settings: Settings) -> Iterator[Finding]:
    place = settings.image_location
    try:
        open_storage(place).list(_AFTER_ALL)
    except StorageFailed as error:
        yield Finding(
            "error",
            error.message,
            "Check its name, and the AWS_... variables: address, region and keys.",
        )
    else:
        yield Finding("ok", f"{place} can be read")


def _database(settings: Settings) -> Iterator[Finding]:
    if settings.database is None:
        return
    try:
        # all that a shared queue needs, whether installed or not
        from alphalayer.jobs import connections, postgres  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        yield Finding("error", f"a shared queue needs {error.name}.", install_hint("shared"))
        return

    async def ask(url: str) -> str:
        connection = await connections.connect(url, connections.ANSWER_S)
        try:
            return await connection.fetchval("SHOW server_version")
        finally:
            await connection.close()

    try:
        version = asyncio.run(ask(settings.database.get_secret_value()))
    except (OSError, asyncio.TimeoutError) as error:
        yield Finding(
            "error",
            f"the database cannot be reached: {error}.",
            "Check its address, and that PostgreSQL runs.",
        )
    else:
        yield Finding("ok", f"the database answers: PostgreSQL {version}")
