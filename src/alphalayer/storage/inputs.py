"""Storage of input images under the hash of their content."""

from __future__ import annotations

import hashlib

from alphalayer.storage import Storage

INPUT_PREFIX = "input_"


def input_name(data: bytes) -> str:
    """Return the name of an input image: `input_<sha256>.png`."""
    return f"{INPUT_PREFIX}{hashlib.sha256(data).hexdigest()}.png"


def store_input(storage: Storage, data: bytes) -> str:
    """Store an input image once, and renew its age.

    Args:
        storage: Storage of the service. The call blocks.
        data: A PNG file.

    Returns:
        The name of the image for `ImageInput.file_name`.

    Raises:
        StorageFailed: The image cannot be stored.
    """
    name = input_name(data)
    storage.put(name, data, renew=True)
    return name
