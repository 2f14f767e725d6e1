"""The flags of the stack that this replaces: which are honoured, which mean nothing here, and none that stops a start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HONOURED: dict[str, str] = {
    "--port": "port",
    "--server-name": "host",
    "--api-auth": "api_auth",
    "--cors-allow-origins": "cors_allow_origins",
    "--ckpt": "default_model",
    "--embeddings-dir": "embeddings_dir",
    "--models-dir": "models_dir",
}
"""Flags with a value, and the setting that takes it."""

SWITCHES: dict[str, dict[str, str]] = {
    "--listen": {"host": "0.0.0.0"},
    "--api": {},
    "--nowebui": {},
    "--always-cpu": {"device": "cpu"},
    "--no-half": {"dtype": "fp32"},
    "--all-in-fp32": {"dtype": "fp32"},
    "--all-in-fp16": {"dtype": "fp16"},
    "--unet-in-fp16": {"dtype": "fp16"},
    "--unet-in-bf16": {"dtype": "bf16"},
    "--lowvram": {"memory": "low"},
    "--medvram": {"memory": "balanced"},
    "--medvram-sdxl": {"memory": "balanced"},
    "--always-low-vram": {"memory": "low"},
    "--always-no-vram": {"memory": "low"},
    "--always-high-vram": {"memory": "high"},
    "--always-gpu": {"memory": "high"},
}
"""Flags without a value, and what they set."""

MEANINGLESS = frozenset(
    """
    --xformers --disable-xformers --opt-sdp-attention --opt-sdp-no-mem-attention --opt-split-attention --attention-pytorch
    --attention-split --attention-quad --cuda-malloc --cuda-stream --pin-shared-memory --disable-ipex-hijack --upcast-sampling
    --no-half-vae --vae-in-fp32 --vae-in-bf16 --clip-in-fp32 --precision-full --skip-torch-cuda-test --skip-python-version-check
    --skip-install --skip-prepare-environment --reinstall-torch --update-check --no-download-sd-model --disable-safe-unpickle
    --enable-insecure-extension-access --api-log --api-server-stop --share --autolaunch --theme-dark --quiet
    """.split()
)
"""Flags of the old stack that have nothing to change here."""


@dataclass(frozen=True)
class Translation:
    """Settings for the new service, and a line for each flag that was left out."""

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    warnings: list[str] = field(default_factory=list[str])


def translate(arguments: Sequence[str]) -> Translation:
    """Read old flags, as `--flag value` or `--flag=value`. Unknown ones are named and left out, with their values."""
    translation = Translation()
    waiting = _split_equals(arguments)
    while waiting:
        flag = waiting.pop(0)
        value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else None
        _take(flag, value, translation)
    return translation


def _take(flag: str, value: str | None, translation: Translation) -> None:
    if flag in HONOURED and value is not None:
        translation.settings[HONOURED[flag]] = value
    elif flag in ("--device-id", "--gpu-device-id") and value is not None:
        translation.settings["device"] = f"cuda:{value}"
    elif flag == "--use-cpu" and value == "all":
        translation.settings["device"] = "cpu"
    elif flag in SWITCHES:
        # --listen keeps an address given before it
        for name, setting in SWITCHES[flag].items():
            translation.settings.setdefault(name, setting)
    elif flag in HONOURED:
        translation.warnings.append(f"{flag} needs a value and is ignored.")
    elif flag in MEANINGLESS:
        translation.warnings.append(f"{flag} has nothing to change here and is ignored.")
    else:
        given = flag if value is None else f"{flag} {value}"
        translation.warnings.append(f"{given} is not known and is ignored.")


def _split_equals(arguments: Sequence[str]) -> list[str]:
    parts: list[str] = []
    for argument in arguments:
        parts += argument.split("=", 1) if argument.startswith("--") and "=" in argument else [argument]
    return parts
