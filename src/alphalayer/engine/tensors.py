"""Tensors of a safetensors file that is not trusted."""

from __future__ import annotations

import errno
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from alphalayer.catalog import printable, read_header
from alphalayer.core.errors import CorruptFile


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU.

    The header is checked before: the library would wait for a pipe.

    Raises:
        CorruptFile: It is missing, damaged or no file, or its header is too large.
        OSError: The machine has too little memory.
    """
    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise  # of the machine, not of the file
        raise CorruptFile(
            f"{printable(str(path))} cannot be read: {printable(str(error))[:300]}.",
            hint="Download it again.",
        ) from None
