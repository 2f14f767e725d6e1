"""Input images of requests: read, checked, and stored under the hash of their content."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass

from alphalayer.api.deps import ENCODE_BYTES, Service, error_field
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import job_prefix_of
from alphalayer.core.modes import InputRole
from alphalayer.core.request import ImageInput
from alphalayer.images import codecs
from alphalayer.images.codecs import InputFile
from alphalayer.storage import is_input, read
from alphalayer.storage.inputs import store_input

MAX_NAME = 200
"""Longest text that may be the name of a file. Longer ones are base64."""


@dataclass(frozen=True)
class StoredInput:
    """An input image in the storage."""

    file_name: str
    width: int
    height: int
    is_opaque: bool

    def as_role(self, role: InputRole) -> ImageInput:
        """Return the image as an input of a request."""
        return ImageInput(role=role, file_name=self.file_name)


async def store_upload(
    service: Service,
    source: str | bytes,
    field: str,
    encode: Callable[[bytes], InputFile] = codecs.encode_input,
) -> StoredInput:
    """Store an input image of a request.

    Args:
        service: The service.
        source: A PNG, WebP, AVIF or JPEG file, as it is, as base64, or as a data URL, or the name
            of a stored image.
        field: Field of the request with the image, for errors.
        encode: Function of the file that returns what is stored, see `codecs.encode_mask`.

    Raises:
        InvalidRequest: The file is not readable, or there is no image of that name.
        Busy: Too many requests wait for work on images.
        StorageFailed: The file cannot be read or stored.
    """
    pixels = service.pixels
    async with pixels.turn():
        with error_field(field):
            data = await _read_source(service, source)
            file = await pixels.process(data, ENCODE_BYTES, encode)
        name = await pixels.run(len(file.data), store_input, service.storage, file.data)
    return StoredInput(name, file.width, file.height, file.is_opaque)


async def _read_source(service: Service, source: str | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    if len(source) <= MAX_NAME and (is_input(source) or job_prefix_of(source)):
        return await read(service.storage, source)
    return await service.pixels.run(len(source), decode_base64, source)


def decode_base64(text: str) -> bytes:
    """Decode a file as base64 or as a data URL, also with line breaks.

    Raises:
        InvalidRequest: It is not base64.
    """
    try:
        return base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("not base64.") from None
