"""Input images of commands: read from files, and given to the renderer like stored ones."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from alphalayer.core.errors import InvalidRequest, StorageFailed
from alphalayer.core.modes import InputRole
from alphalayer.images import codecs
from alphalayer.images.codecs import InputFile
from alphalayer.storage import StoredFile
from alphalayer.storage.inputs import input_name


class InputImages:
    """Input images of a request by role, and their content by the name that requests have."""

    def __init__(self, images: Mapping[InputRole, InputFile]):
        self.by_role = images
        self._data = {input_name(image.data): image.data for image in images.values()}

    @property
    def fields(self) -> list[dict[str, str]]:
        """Return the value of a request's `inputs`."""
        return [
            {"role": role, "file_name": input_name(image.data)}
            for role, image in self.by_role.items()
        ]

    async def open(self, key: str) -> StoredFile:
        """Open an input image."""
        data = self._data[key]

        async def chunks() -> AsyncIterator[bytes]:
            yield data

        return StoredFile(len(data), time.time(), chunks())


def read_images(paths: Mapping[tuple[InputRole, str], Path | None]) -> InputImages:
    """Read the input images that a user named.

    Args:
        paths: Files by role and name of the option.

    Raises:
        InvalidRequest: A file is no image, or there is a mask without an image to change.
        StorageFailed: A file cannot be read.
    """
    images: dict[InputRole, InputFile] = {
        role: _read_image(path, field, _encoder(role))
        for (role, field), path in paths.items()
        if path
    }
    if "mask" in images and "init" not in images:
        raise InvalidRequest(
            "it needs an image to change.", hint="Name one with --image.", field="mask"
        )
    return InputImages(images)


def _encoder(role: InputRole) -> Callable[[bytes], InputFile]:
    return codecs.encode_mask if role == "mask" else codecs.encode_input


def _read_image(path: Path, field: str, encode: Callable[[bytes], InputFile]) -> InputFile:
    try:
        return encode(path.read_bytes())
    except InvalidRequest as error:
        error.field = field
        raise
    except OSError as error:
        raise StorageFailed(
            f"cannot read {path}: {error.strerror}.", hint="Name an image file.", field=field
        ) from None
