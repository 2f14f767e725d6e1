"""Multipart forms: read within limits, and passed on as JSON bodies."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest

MAX_FILES, MAX_FIELDS = 32, 100
"""Most parts of a form, with and without a file name."""
MAX_FIELD_BYTES = 1_000_000
"""Longest part without a file name."""
Form = dict[str, list[str]]
"""Values of each name. That of a file is its name in `uploads_of`."""


class FormRequest(Request):
    """Request with a JSON body in the place of its form.

    Args:
        request: The request, whose form has been read.
        fields: The body.
    """

    def __init__(self, request: Request, fields: dict[str, Any]):
        headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-type"]
        headers.append((b"content-type", b"application/json"))
        super().__init__({**request.scope, "headers": headers}, request.receive)
        self._body = b"{}"
        self._fields = fields

    async def json(self) -> dict[str, Any]:
        """Return the body."""
        return self._fields


def is_form(request: Request) -> bool:
    """Return whether a request has a multipart body."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    return kind.strip().lower() == "multipart/form-data"


def uploads_of(request: Request) -> Mapping[str, bytes]:
    """Return the files of a form by their names. They depend on the content alone."""
    return getattr(request.state, "uploads", {})


async def read_form(request: Request, text_fields: Collection[str] = ()) -> Form:
    """Read a multipart body and keep its files, see `uploads_of`.

    Parts without content are left out, because many clients send every field that they know.

    Args:
        request: The request.
        text_fields: Fields that cannot be files.

    Raises:
        InvalidRequest: It is not valid, has too many parts, a part is too long, or a text
            field is a file.
        HTTPException: The body is beyond a limit of its size.
    """
    form, uploads = Form(), dict[str, bytes]()
    parser = _FormParser(
        request.headers,
        request.stream(),
        max_files=MAX_FILES,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        parts = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(
            f"the form cannot be read: {error.message}", hint=validation.DESCRIBED
        ) from None
    except ClientDisconnect:
        raise HTTPException(400, "the form ended early.") from None
    try:
        for name, part in parts.multi_items():
            value = part
            if isinstance(part, UploadFile):
                data = await part.read()
                if name in text_fields:
                    raise InvalidRequest(
                        "got a file, and it takes none.",
                        hint="Send it without a file name.",
                        field=name,
                    )
                value = f"{hashlib.sha256(data).hexdigest()}.upload" if data else ""
                uploads[value] = data
            if value:
                form.setdefault(name, []).append(str(value))
    finally:
        await parts.close()
    request.state.uploads = uploads
    return form


class _FormParser(MultiPartParser):
    """Parser of UTF-8 whose files stay in memory, where the body is counted."""

    spool_max_size = 0

    async def parse(self) -> FormData:
        """Return the parts. Raises `MultiPartException` for another charset."""
        _, options = parse_options_header(self.headers.get("content-type"))
        charset = options.get(b"charset", b"utf-8").decode("latin-1")
        if charset.lower() not in ("utf-8", "utf8"):
            raise MultiPartException(f"the charset is {validation.shown(charset)}; only utf-8.")
        return await super().parse()

    def on_part_end(self) -> None:
        """Keep a part. Raises `MultiPartException` if its text is not UTF-8."""
        part = self._current_part
        if part.file is None:
            try:
                part.data.decode()
            except UnicodeDecodeError:
                # the base class would read it as Latin-1
                raise MultiPartException(
                    f"the text of {validation.shown(part.field_name)} is not UTF-8."
                ) from None
        super().on_part_end()
