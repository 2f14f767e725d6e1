"""Input images of requests: read, checked, and stored under the hash of their content."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol
from urllib.parse import parse_qs

from fastapi import Request
from pydantic import PlainValidator, WithJsonSchema

from alphalayer.api.deps import ENCODE_BYTES, error_field
from alphalayer.api.file_urls import UrlSigner
from alphalayer.api.middleware.body_limit import release_body
from alphalayer.api.pixel_pool import PixelPool
from alphalayer.api.schemas import Body
from alphalayer.core import validation
from alphalayer.core.errors import FileMissing, Forbidden, InvalidRequest
from alphalayer.core.job import job_prefix_of
from alphalayer.core.modes import InputRole
from alphalayer.core.request import MIN_SIDE, ImageInput
from alphalayer.images import codecs
from alphalayer.images.codecs import InputFile
from alphalayer.storage import Storage, is_input, read
from alphalayer.storage.inputs import input_name, store_input

MAX_NAME = 200
"""Longest text that may be the name of a file. Longer ones are base64."""
MAX_UPLOAD_BYTES = 20_000_000
"""Largest file of an input image."""
BASE64_BYTES = MAX_UPLOAD_BYTES * 3 // 2
"""Largest text with an input image as base64, also with line breaks."""
_URL = re.compile(r"(?!data:)[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def check_source(source: Any) -> str:
    """Check the form of an image of a request, in any dialect. Raises `ValueError`."""
    if not isinstance(source, str):
        raise ValueError(f"got {validation.shown(source)}; a text with an image")
    if not source:
        raise ValueError("it is empty. Send a PNG, WebP, AVIF or JPEG file")
    # the whole text could be a name of 30 MB
    if _URL.match(source[:20]):
        raise ValueError(
            "URLs are not fetched. Send the file itself, or the name of a stored image"
        )
    if len(source) > BASE64_BYTES:
        raise ValueError(f"the file is larger than {MAX_UPLOAD_BYTES // 1_000_000} MB")
    return source


ImageSource = Annotated[str, PlainValidator(check_source), WithJsonSchema({"type": "string"})]
"""Field with an image: base64, data URL, name of a stored image, or name of a file of a form."""


class Uploads(Protocol):
    """The parts of a service that store input images."""

    @property
    def storage(self) -> Storage:
        """Return the storage of images."""
        ...

    @property
    def pixels(self) -> PixelPool:
        """Return the pool for work on images."""
        ...

    @property
    def url_signer(self) -> UrlSigner | None:
        """Return the signer of URLs. None: the name alone opens an image."""
        ...


@dataclass(frozen=True)
class Upload:
    """An input image as a request has it."""

    role: InputRole
    field: str
    """Field of the request, for errors."""
    source: str | bytes
    """See `store_upload`."""
    encode: Callable[[bytes], InputFile] = codecs.encode_input


@dataclass(frozen=True)
class StoredInput:
    """An input image in the storage."""

    file_name: str
    width: int
    height: int
    is_opaque: bool
    content_digest: str
    """SHA-256 of the file as it was sent, in whatever form."""

    def as_role(self, role: InputRole) -> ImageInput:
        """Return the image as an input of a request."""
        return ImageInput(role=role, file_name=self.file_name, width=self.width, height=self.height)


Images = dict[InputRole, StoredInput]
"""Input images of a request."""
_EXPECTED = StoredInput(input_name(b""), MIN_SIDE, MIN_SIDE, is_opaque=False, content_digest="")


def expect_images(uploads: Iterable[Upload]) -> Images:
    """Return images that fit any request.

    With them a request is checked before its own are stored.
    """
    return {upload.role: _EXPECTED for upload in uploads}


async def store_uploads(service: Uploads, uploads: Sequence[Upload]) -> Images:
    """Store the input images of a request.

    Raises:
        AlphalayerError: See `store_upload`.
    """
    for upload in uploads:
        _check_form(upload.source, upload.field)
    return {
        upload.role: await store_upload(service, upload.source, upload.field, upload.encode)
        for upload in uploads
    }


def release_images(request: Request, body: Body, fields: Iterable[str]) -> None:
    """Drop the images of a request, whose job may wait for long.

    Args:
        request: The request, whose body is then counted no longer.
        body: Its body.
        fields: Fields with images.
    """
    body.drop(fields)
    request.state.uploads = {}
    # the framework keeps the JSON until the response is complete
    request.state.fields.clear()
    release_body(request.scope)


async def store_upload(
    service: Uploads,
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
        InvalidRequest: The file is too large or not readable, or there is no image of that name.
        Forbidden: The name is not signed, and the service signs its URLs.
        Busy: Too many requests wait for work on images.
        StorageFailed: The file cannot be read or stored.
    """
    _check_form(source, field)
    pixels = service.pixels
    async with pixels.turn():
        with error_field(field):
            data = await _read_source(service, source, field)
            digest = await pixels.run(0, _sha256, data)
            file = await pixels.process(data, ENCODE_BYTES, encode)
        name = await pixels.run(len(file.data), store_input, service.storage, file.data)
    return StoredInput(name, file.width, file.height, file.is_opaque, digest)


def _check_form(source: str | bytes, field: str) -> None:
    try:
        if isinstance(source, str):
            check_source(source)
    except ValueError as error:
        raise InvalidRequest(f"{error}.", field=field) from None


async def _read_source(service: Uploads, source: str | bytes, field: str) -> bytes:
    if isinstance(source, bytes):
        return _check_bytes(source)
    name, _, query = source[: MAX_NAME + 1].partition("?")
    # base64 has no dot, and a data URL has a colon
    if len(source) > MAX_NAME or "." not in name or ":" in name:
        return _check_bytes(await service.pixels.run(len(source), decode_base64, source))
    missing = InvalidRequest(f'there is no stored image "{name}".', hint="Send the file itself.")
    if not (is_input(name) or job_prefix_of(name)):
        raise missing
    if service.url_signer:
        _check_signature(service.url_signer, name, query, field)
    try:
        return await read(service.storage, name)
    except FileMissing:
        raise missing from None


def _check_bytes(data: bytes) -> bytes:
    if len(data) > MAX_UPLOAD_BYTES:
        raise InvalidRequest(f"the file has {len(data):,} bytes; at most {MAX_UPLOAD_BYTES:,}.")
    return data


def _check_signature(signer: UrlSigner, name: str, query: str, field: str) -> None:
    """Check the signature of a name, the query of its URL. Raises `Forbidden`."""
    values = {key: texts[0] for key, texts in parse_qs(query).items()}
    expires = values.get("expires", "")
    try:
        signer.check(name, int(expires) if expires.isdecimal() else None, values.get("signature"))
    except Forbidden as error:
        error.field = field
        raise


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def decode_base64(text: str) -> bytes:
    """Decode a file as base64 or as a data URL, also with line breaks.

    Raises:
        InvalidRequest: It is not base64.
    """
    try:
        return base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("not base64.") from None
