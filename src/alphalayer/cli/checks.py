"""Checks of the settings that commands make before they begin, and a common option."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Annotated

import typer

from alphalayer import catalog
from alphalayer.config import Settings
from alphalayer.core.errors import SetupFailed

ModelsDir = Annotated[
    Path | None, typer.Option(help="Folder with Stable-diffusion/ and layer_model/.")
]
_OTHER_PORT = "Use another one with --port."


def check_models_dir(settings: Settings) -> None:
    """Check the models folder of the settings. The default one may be missing.

    Raises:
        SetupFailed: The folder is missing, or is not a folder.
    """
    folder = settings.models_dir
    if folder.is_dir() or ("models_dir" not in settings.model_fields_set and not folder.exists()):
        return
    raise SetupFailed(
        f"the models folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}.",
        hint=f"Set --models-dir (setting models_dir) to the folder with {catalog.CHECKPOINTS}/.",
    )


def check_port(host: str, port: int) -> None:
    """Check that the port can be listened on.

    Raises:
        SetupFailed: The port is in use, or the address is not one of this machine.
    """
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
