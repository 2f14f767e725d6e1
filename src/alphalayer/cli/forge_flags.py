"""Translation of the flags of Forge and AUTOMATIC1111 into settings.

Unknown flags are ignored with a warning.
Only an empty --api-auth is an error, because the service would start without authentication.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from alphalayer.core.errors import SetupFailed

VARIABLE = "COMMANDLINE_ARGS"


def _folder(value: str) -> str:
    """Return an absolute path, because the service changes its working folder."""
    return str(Path(value).absolute())


def _user_data(value: str) -> dict[str, Any]:
    base = Path(value).absolute()
    names = {"models_dir": "models", "embeddings_dir": "embeddings", "outputs_dir": "outputs"}
    return {setting: str(base / name) for setting, name in names.items()}


def _number_format(value: str) -> dict[str, Any]:
    dtype = {"full": "fp32", "half": "auto", "autocast": "auto"}.get(value)
    return {"dtype": dtype} if dtype else {}


def _log_level(value: str) -> dict[str, Any]:
    level = {"critical": "error"}.get(value.lower(), value.lower())
    return {"log_level": level} if level in ("debug", "info", "warning", "error") else {}


HONOURED: dict[str, Callable[[str], dict[str, Any]]] = {
    "--port": lambda value: {"port": value},
    "--server-name": lambda value: {"host": value},
    "--api-auth": lambda value: {"api_auth": value},
    "--cors-allow-origins": lambda value: {"cors_allow_origins": value},
    # a path of either system; a model is found by its file name
    "--ckpt": lambda value: {"default_model": PureWindowsPath(value).name},
    "--models-dir": lambda value: {"models_dir": _folder(value)},
    "--embeddings-dir": lambda value: {"embeddings_dir": _folder(value)},
    "--data-dir": _user_data,
    "--device-id": lambda value: {"device": f"cuda:{value}"},
    "--gpu-device-id": lambda value: {"device": f"cuda:{value}"},
    "--use-cpu": lambda value: {"device": "cpu"} if value == "all" else {},
    "--precision": _number_format,
    "--loglevel": _log_level,
}
"""Flags with a value, and the settings from that value; none if the value has no meaning here."""

DEFAULTS = ("--data-dir", "--listen", "--precision")
"""Flags with less priority than others that change the same setting, in any order."""

SWITCHES: dict[str, dict[str, str]] = {
    "--listen": {"host": "0.0.0.0"},  # nosec B104 # the flag means all addresses
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
    "--always-normal-vram": {"memory": "auto"},
    "--always-high-vram": {"memory": "high"},
    "--always-gpu": {"memory": "high"},
}
"""Flags without a value, and the settings that they change."""

_TLS = "TLS is off; put a proxy such as Nginx in front (docs/guides/reverse-proxy.md)"
_AUTH = "the page needs no password; --api-auth user:password protects the API that the page uses"
_FOLDER = "that folder is not read; put its files, or a link to each, into"
UNSUPPORTED = {
    "--ckpt-dir": f"{_FOLDER} models/Stable-diffusion/",
    "--lora-dir": f"{_FOLDER} models/Lora/",
    "--vae-dir": "that folder is not read; the VAE in the checkpoint is used",
    "--vae-path": "that VAE is not used; the one in the checkpoint is",
    "--forge-ref-a1111-home": "that installation is not read; name its models with --models-dir",
    "--tls-keyfile": _TLS,
    "--tls-certfile": _TLS,
    "--gradio-auth": _AUTH,
    "--gradio-auth-path": _AUTH,
    "--cors-allow-origins-regex": "list the origins with --cors-allow-origins",
    "--subpath": "the path does not change; a proxy that serves it below a path sends "
    "X-Forwarded-Prefix (docs/guides/reverse-proxy.md)",
    "--share": "no public address is created",
    "--ngrok": "no public address is created",
}
"""Flags for features that Alphalayer does not have, with the consequence."""

NO_EFFECT = frozenset(
    """
    --xformers --disable-xformers --force-enable-xformers --xformers-flash-attention
    --reinstall-xformers --opt-sdp-attention --opt-sdp-no-mem-attention --opt-split-attention
    --opt-split-attention-v1 --opt-sub-quad-attention --opt-channelslast --attention-pytorch
    --attention-split --attention-quad --force-upcast-attention --disable-attention-upcast
    --upcast-sampling --cuda-malloc --cuda-stream --pin-shared-memory --always-offload-from-vram
    --pytorch-deterministic --disable-ipex-hijack --disable-gpu-warning --no-half-vae --vae-in-fp16
    --vae-in-fp32 --vae-in-bf16 --vae-in-cpu --clip-in-fp16 --clip-in-fp32 --lowram
    --disable-nan-check --disable-model-loading-ram-optimization --skip-load-model-at-start
    --no-hashing --skip-torch-cuda-test --skip-python-version-check --skip-version-check
    --skip-install --skip-prepare-environment --reinstall-torch --update-check
    --update-all-extensions --log-startup --do-not-download-clip --no-download-sd-model
    --disable-safe-unpickle --enable-insecure-extension-access --allow-code
    --disable-all-extensions --disable-extra-extensions --api-log --api-server-stop
    --add-stop-route --autolaunch --theme --theme-dark --quiet --gradio-debug --gradio-queue
    --no-gradio-queue --no-progressbar-hiding --disable-console-progressbars --no-prompt-history
    --hide-ui-dir-config --freeze-settings --ui-config-file --ui-settings-file --styles-file
    --timeout-keep-alive --config -f
    """.split()
)
"""Flags that need no replacement here."""


@dataclass(frozen=True)
class Translation:
    """Settings of the service, and a warning for each ignored flag."""

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    warnings: list[str] = field(default_factory=list[str])


def split(line: str) -> list[str]:
    """Split a line such as COMMANDLINE_ARGS into flags, as a shell does.

    Raises:
        SetupFailed: A quote is not closed.
    """
    try:
        return shlex.split(line)
    except ValueError as error:
        hint = "Close the quote. Put a value with spaces in quotes of the same kind."
        # the message does not repeat the line, which may hold a password
        raise SetupFailed(f"{VARIABLE} cannot be read: {str(error).lower()}.", hint=hint) from None


def translate(arguments: Sequence[str]) -> Translation:
    """Translate flags of the form `--flag value` or `--flag=value`.

    Raises:
        SetupFailed: --api-auth has no value.
    """
    settings_by_flag: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    rest = _split_equals(arguments)
    while rest:
        flag = rest.pop(0)
        takes_value = (
            flag.startswith("-") and flag not in SWITCHES and rest and not rest[0].startswith("-")
        )
        value = rest.pop(0) if takes_value else ""
        if flag == "--api-auth" and not value:
            raise SetupFailed(
                "--api-auth needs a value, user:password.",
                hint="Without the flag, requests need no password.",
            )
        settings = SWITCHES.get(flag) or (
            HONOURED[flag](value) if value and flag in HONOURED else {}
        )
        settings_by_flag[flag] = settings
        if not settings and flag not in SWITCHES:
            warnings.append(_describe_ignored(flag, value))
    order = sorted(settings_by_flag, key=lambda flag: flag not in DEFAULTS)
    return Translation(
        {name: value for flag in order for name, value in settings_by_flag[flag].items()}, warnings
    )


def _describe_ignored(flag: str, value: str) -> str:
    if flag in HONOURED and not value:
        return f"{flag} needs a value and is ignored."
    if flag in UNSUPPORTED:
        # without its value, which may be a password
        return f"{flag} is ignored: {UNSUPPORTED[flag]}."
    if flag in NO_EFFECT:
        return f"{flag} has no effect here and is ignored."
    return f"{f'{flag} {value}'.strip()} is not known and is ignored."


def _split_equals(arguments: Sequence[str]) -> list[str]:
    parts: list[str] = []
    for argument in arguments:
        parts += (
            argument.split("=", 1) if argument.startswith("--") and "=" in argument else [argument]
        )
    return parts
