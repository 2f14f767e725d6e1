"""The command `doctor`: findings about the installation, with hints. It changes nothing."""

from __future__ import annotations

import asyncio
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from alphalayer import catalog
from alphalayer.catalog import download
from alphalayer.cli.checks import ModelsDir, check_models_dir, check_port
from alphalayer.cli.console import show_mark
from alphalayer.config import Settings, load_settings
from alphalayer.core.errors import CommandHint, CorruptFile, SetupFailed, StorageFailed
from alphalayer.core.modes import DECODER_FILES, DEFAULT_MODE, MODES, Mode, mode_for
from alphalayer.core.optional_dependencies import install_hint, is_installed
from alphalayer.storage.objects import open_storage

app = typer.Typer()

LOW_DISK_BYTES = 2 * 1024**3
TIMEOUT_S = 120
_LAST_NAME = "~"
"""Sorts after every image name: the list is empty, but the bucket has to answer."""
# runs in its own process: an import of torch here would take seconds and could crash
_TORCH_SCRIPT = (
    "import json, torch; cuda = torch.cuda.is_available(); "
    "print(json.dumps({'torch': torch.__version__, 'built': torch.version.cuda, "
    "'mps': torch.backends.mps.is_available(), "
    "'gpus': [[torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i)] "
    "for i in range(torch.cuda.device_count())] if cuda else []}))"
)


@dataclass(frozen=True)
class Finding:
    """Result of one check, with a hint if something is wrong."""

    level: Literal["ok", "warning", "error"]
    text: str
    hint: str = ""


@app.command()
def doctor(models_dir: ModelsDir = None) -> None:
    """Diagnose the installation."""
    findings = diagnose(load_settings(models_dir=models_dir))
    for finding in findings:
        show_mark(finding.level, finding.text, finding.hint)
    raise typer.Exit(any(finding.level == "error" for finding in findings))


def diagnose(settings: Settings) -> list[Finding]:
    """Check torch, GPU, models, LayerDiffuse files, port, storage and queue."""
    findings: list[Finding] = []
    storage = _bucket if settings.storage else _outputs
    for check in (_torch, _models, _layer_files, _modes, _port, storage, _database):
        findings += check(settings)
    return findings


def _describe_torch() -> dict[str, Any] | str:
    """Return the version and GPUs of torch, or the error message."""
    command = [sys.executable, "-c", _TORCH_SCRIPT]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"torch does not answer within {TIMEOUT_S} s."
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        return (
            f"torch cannot be imported: {lines[-1] if lines else f'exit code {result.returncode}'}"
        )
    try:
        # other imported packages may print, too
        return json.loads(result.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return f"torch did not report its version: {result.stdout[-200:]!r}"


def _torch(settings: Settings) -> Iterator[Finding]:
    if not is_installed("torch"):
        if settings.role == "api":
            yield Finding("ok", "torch is not installed; the role api does not need it")
        else:
            yield Finding("error", "torch is not installed.", install_hint("engine"))
        return
    torch = _describe_torch()
    if isinstance(torch, str):
        yield Finding(
            "error",
            torch,
            "Check nvidia-smi, because a driver that hangs blocks torch. "
            "Or remove .venv and run: python3 run.py doctor",
        )
        return
    yield Finding("ok", f"torch {torch['torch']}")
    for name, free, total in torch["gpus"]:
        yield Finding("ok", f"GPU {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    if torch["mps"]:
        yield Finding("ok", "GPU of Apple silicon (mps)")
    if torch["gpus"] or torch["mps"] or settings.device == "cpu":
        return
    if shutil.which("nvidia-smi"):
        build = f"built for CUDA {torch['built']}" if torch["built"] else "a CPU build"
        yield Finding(
            "error",
            f"this machine has an NVIDIA driver, but torch ({build}) finds no GPU.",
            "Check CUDA_VISIBLE_DEVICES and nvidia-smi, or remove .venv and run: "
            "python3 run.py --cuda doctor",
        )
    else:
        yield Finding(
            "warning",
            "no GPU; images are generated on the CPU.",
            "SDXL needs a GPU with 8 GB or more.",
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
            is_built_in = entry.path == catalog.EMBEDDED_MODEL
            text = f"model {entry.title}{' (small, built in)' if is_built_in else ''}"
            hint = CommandHint("For SDXL run:", catalog.PULL) if is_built_in else ""
            yield Finding("ok", text, hint)
    if not any(entry.problem is None for entry in entries):
        folder = settings.models_dir / catalog.CHECKPOINTS
        yield Finding(
            "error",
            f"no usable model in {folder}.",
            CommandHint("Put an SDXL checkpoint there, or run:", catalog.PULL),
        )


def _layer_files(settings: Settings) -> Iterator[Finding]:
    folder = settings.models_dir / "layer_model"
    configs: dict[catalog.ModelEntry, dict[str, Any]] = {}
    for entry in catalog.find_models(settings.models_dir):
        if entry.problem is None:
            try:
                configs[entry] = catalog.layer_config(entry.path)
            except CorruptFile as error:
                yield Finding("error", error.message, error.hint)
    for key, kind, names, mode in _layer_kinds():
        pull = f"models pull {mode.download}"
        required = {
            catalog.layer_file(entry.path, names, config.get(key), settings.models_dir)
            for entry, config in configs.items()
            if entry.family == mode.family
        }
        for missing in sorted(path for path in required if not path.is_file()):
            yield Finding(
                "error",
                f"the LayerDiffuse {kind} ({missing.name}) is not in {missing.parent}.",
                CommandHint("Run:", pull) if missing.parent == folder else "Get the model again.",
            )
    yield from _existing_layer_files(settings.models_dir)


def _existing_layer_files(models_dir: Path) -> Iterator[Finding]:
    kinds = {name: (kind, mode) for _, kind, names, mode in _layer_kinds() for name in names}
    for result in download.verify_layer_files(models_dir):
        kind, mode = kinds.get(result.path.name, ("file", None))
        if not result.is_ok:
            pull = (
                CommandHint("Remove it. Then run:", f"models pull {mode.download}") if mode else ""
            )
            yield Finding(
                "error", f"LayerDiffuse {kind}: {result}", pull or "Rename it, or remove it."
            )
        elif mode:
            yield Finding("ok", f"LayerDiffuse {kind}")


def _layer_kinds() -> Iterator[tuple[str, str, Sequence[str], Mode]]:
    """Yield key, kind, names and mode of each file of the default modes."""
    for family, decoders in DECODER_FILES.items():
        for mode in [mode for mode in MODES.values() if mode.family == family][:1]:
            yield "patch", "patch", mode.files, mode
            yield "decoder", "transparent decoder", decoders, mode


def _modes(settings: Settings) -> Iterator[Finding]:
    """Report which modes of LayerDiffuse a model can run."""
    entries = [entry for entry in catalog.find_models(settings.models_dir) if not entry.problem]
    ready: list[str] = []
    without_model: list[str] = []
    missing: dict[str, list[catalog.MissingFile]] = {}
    for name, mode, encodes in _uses():
        lacks = [
            files
            for entry in entries
            if (files := _missing_files(entry, mode, settings.models_dir, encodes)) is not None
        ]
        if [] in lacks:
            ready.append(name)
        elif lacks:
            missing[name] = lacks[0]
        else:
            without_model.append(name)
    if ready:
        yield Finding("ok", f"modes that are ready: {', '.join(ready)}")
    if missing:
        shown = [
            f"{name} ({', '.join(file.path.name for file in missing[name])})" for name in missing
        ]
        names = dict.fromkeys(file.download for files in missing.values() for file in files)
        yield Finding(
            "ok",
            f"modes whose files are missing: {', '.join(shown)}",
            CommandHint("To use them run:", f"models pull {' '.join(names)}"),
        )
    if without_model:
        yield Finding("ok", f"modes without a model that has them: {', '.join(without_model)}")


def _uses() -> Iterator[tuple[str, Mode, bool]]:
    """Yield name and mode of what models can do, and whether it changes an image."""
    for mode in MODES.values():
        if mode.files:
            yield mode.name, mode, False
    for name, family in (("img2img", "sdxl"), ("img2img of SD 1.5", "sd15")):
        yield name, mode_for(family, DEFAULT_MODE), True


def _missing_files(
    entry: catalog.ModelEntry, mode: Mode, models_dir: Path, encodes: bool
) -> list[catalog.MissingFile] | None:
    try:
        return catalog.missing_files(entry, mode, models_dir, encodes=encodes)
    except CorruptFile:  # which `_layer_files` reports
        return None


def _port(settings: Settings) -> Iterator[Finding]:
    try:
        check_port(settings.host, settings.port)
    except SetupFailed as error:
        yield Finding("warning", error.message, error.hint)
    else:
        yield Finding("ok", f"port {settings.port} is free")


def _outputs(settings: Settings) -> Iterator[Finding]:
    folder = settings.outputs_dir
    path = folder.resolve()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        settings.check_folders()
        with tempfile.TemporaryFile(dir=existing):
            pass
        free = shutil.disk_usage(existing).free
    except SetupFailed as error:
        yield Finding("error", error.message, error.hint)
        return
    except OSError as error:
        yield Finding(
            "error",
            f"cannot write to {path}: {error.strerror}.",
            "Set outputs_dir to a writable folder.",
        )
        return
    text = f"{free / 2**30:.1f} GiB free for images in {folder}"
    if free > LOW_DISK_BYTES:
        yield Finding("ok", text)
    else:
        yield Finding("warning", text, "Free some space.")


def _bucket(settings: Settings) -> Iterator[Finding]:
    location = settings.image_location
    try:
        open_storage(location).list(_LAST_NAME)
    except StorageFailed as error:
        yield Finding(
            "error",
            f"{location}: {error.message}",
            "Check its name, and the AWS_... variables: address, region and keys.",
        )
    else:
        yield Finding("ok", f"{location} can be read")


def _database(settings: Settings) -> Iterator[Finding]:
    if settings.database is None:
        return
    try:
        # the packages that a shared queue needs
        from alphalayer.jobs import connections

        importlib.import_module("alphalayer.jobs.postgres")
    except ImportError as error:
        yield Finding("error", f"a shared queue needs {error.name}.", install_hint("shared"))
        return

    async def fetch_version(url: str) -> str:
        connection = await connections.connect(url, connections.STATEMENT_S)
        try:
            return await connection.fetchval("SHOW server_version")
        finally:
            await connection.close()

    try:
        version = asyncio.run(fetch_version(settings.database.get_secret_value()))
    except (OSError, asyncio.TimeoutError) as error:
        yield Finding(
            "error",
            f"the database cannot be reached: {error}.",
            "Check its address, and that PostgreSQL runs.",
        )
    else:
        yield Finding("ok", f"the database answers: PostgreSQL {version}")
