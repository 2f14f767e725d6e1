"""Multipart forms: their parts, limits, and the JSON body that a route gets."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from alphalayer.api.forms import FormRequest, is_form, read_form, uploads_of
from alphalayer.core.errors import InvalidRequest

CONTENT = b"\0\r\n\xff"
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\none\r\n'
    b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\ntwo\r\n'
    b'--b\r\nContent-Disposition: form-data; name="empty"\r\n\r\n\r\n'
    b'--b\r\nContent-Disposition: form-data; name="f"; filename="f.png"\r\n\r\n\0\r\n\xff\r\n'
    b'--b\r\nContent-Disposition: form-data; name="g"; filename=""\r\n\r\n\r\n--b--\r\n'
)


def request_of(content: bytes, kind: str = "multipart/form-data; boundary=b") -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content}

    headers = [(b"content-type", kind.encode()), (b"host", b"x")]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


async def test_form_has_fields_and_files():
    request = request_of(FORM)
    form = await read_form(request)
    name = f"{hashlib.sha256(CONTENT).hexdigest()}.upload"
    assert form == {"a": ["one", "two"], "f": [name]}
    assert uploads_of(request)[name] == CONTENT


async def test_form_becomes_a_json_body():
    request = request_of(b"")
    request.state.client = "ann"
    converted = FormRequest(request, {"prompt": "x"})
    assert await converted.json() == {"prompt": "x"}
    assert dict(converted.headers) == {"host": "x", "content-type": "application/json"}
    assert converted.state.client == "ann"
    assert is_form(request)
    assert is_form(request_of(b"", "Multipart/Form-Data"))
    assert not is_form(converted)


@pytest.mark.parametrize("files", [True, False])
async def test_form_with_too_many_parts_is_refused(files: bool):
    part = b'--b\r\nContent-Disposition: form-data; name="a"%s\r\n\r\nx\r\n'
    content = part % (b'; filename="a"' if files else b"") * 101 + b"--b--\r\n"
    with pytest.raises(InvalidRequest, match="Too many f"):
        await read_form(request_of(content))


async def test_form_with_a_long_field_is_refused():
    part = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n'
    with pytest.raises(InvalidRequest, match="Part exceeded"):
        await read_form(request_of(part + b"x" * 1_000_001 + b"\r\n--b--\r\n"))


async def test_form_of_a_disconnected_client_is_an_http_error():
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(HTTPException, match="ended early"):
        await read_form(Request(request_of(b"").scope, receive))


async def test_form_with_a_file_in_another_field_is_refused():
    with pytest.raises(InvalidRequest, match="got a file") as error:
        await read_form(request_of(FORM), ["a", "f"])
    assert (error.value.field, error.value.hint) == ("f", "Send it without a file name.")


@pytest.mark.parametrize(
    ("charset", "text", "words"),
    [
        ("", b"\xe9", 'the text of "a" is not UTF-8'),
        ("; charset=utf-16", b"x", 'the charset is "utf-16"'),
        ("; charset=no-such", b"x", 'the charset is "no-such"'),
    ],
)
async def test_form_in_another_charset_is_refused(charset: str, text: bytes, words: str):
    content = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + text
    kind = f"multipart/form-data; boundary=b{charset}"
    with pytest.raises(InvalidRequest, match=words):
        await read_form(request_of(content + b"\r\n--b--\r\n", kind))
    utf8 = request_of(content.replace(text, b"\xc3\xa9") + b"\r\n--b--\r\n")
    assert await read_form(utf8) == {"a": ["\xe9"]}
