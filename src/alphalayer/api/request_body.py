"""Limits of request bodies, of each route and of the whole service."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, cast

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

from alphalayer.api.forms import FormRequest, is_form, read_form
from alphalayer.core import validation

JSON_BYTES = 1_000_000
"""Largest JSON body of a route without images. The longest prompts take a third of it."""
MAX_DELIMITERS = 25_000
"""Most commas and opening brackets of a body. The longest prompts have 20,000 commas."""
MAX_VALUES = 2_000
"""Most values of a body. Each may need an error of its own, which takes 5 µs."""
MAX_DEPTH = 32
"""Most lists and objects inside each other."""
_TOO_DEEP = f"the body has more than {MAX_DEPTH} levels of lists and objects."


class LimitedRoute(APIRoute):
    """Route with a limit of its body, which fields with images raise.

    The model of the body states it: `carries_images: ClassVar[bool] = True`. Such a body may be as
    large as the service allows, see `BodyLimit`. A model with a class method `from_form` accepts
    multipart bodies, too. The method converts a `Form` to JSON. `image_fields` are the names of
    its fields that can be files.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route, which reads a body with its limits."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model = self.body_field.field_info.annotation
        carries_images = getattr(model, "carries_images", False)
        from_form = getattr(model, "from_form", None)
        names = {info.alias or name for name, info in getattr(model, "model_fields", {}).items()}
        text_fields = names - {*getattr(model, "image_fields", ())}

        async def read_with_limits(request: Request) -> Response:
            receive = request.receive
            if not carries_images:
                check_declared(request.scope, JSON_BYTES)
                receive = count_received(receive, JSON_BYTES)
            if from_form and is_form(request):
                request = Request(request.scope, receive)
                form = await read_form(request, text_fields)
                request.state.fields = from_form(form)
                # the frame of this function must not keep the texts of the form
                del form
                return await handle(FormRequest(request, request.state.fields))
            return await handle(_RouteRequest(request.scope, receive))

        return read_with_limits


class JsonRequest(Request):
    """Request whose JSON has limits of its elements and depth."""

    async def json(self) -> Any:
        """Return the JSON of the body. See `parse`."""
        return parse(await self.body())


class _RouteRequest(Request):
    """Request of a route, whose body is not kept beside its JSON.

    `state.fields` is the JSON of the body, see `alphalayer.api.uploads.release_images`.
    """

    async def body(self) -> bytes:
        """Return the first byte of the body.

        FastAPI only reads whether there is one, and keeps what it reads.
        """
        return (await super().body())[:1]

    async def json(self) -> Any:
        """Return the JSON of the body. See `parse`."""
        body, self._body = await super().body(), b""
        self.state.fields = parse(body)
        return self.state.fields


def parse(body: bytes) -> Any:
    """Return the JSON of a body.

    It is parsed in the event loop: the parser would hold the interpreter in a thread, too.
    Within the limits it takes a few ms, and 35 ms for 16 MB of images.

    Raises:
        HTTPException: It has too many values, commas or brackets, or they are too deep.
        ValueError: It is not valid.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_DELIMITERS:
        raise _invalid(f"the body has more than {MAX_DELIMITERS:,} commas and brackets.")
    try:
        value = json.loads(body)
    except RecursionError:
        raise _invalid(_TOO_DEEP) from None
    level, values = [value], 1
    for _ in range(MAX_DEPTH + 1):
        level = [part for item in level for part in _parts(item)]
        values += len(level)
        if values > MAX_VALUES:
            raise _invalid(f"the body has more than {MAX_VALUES:,} values.")
        if not level:
            return value
    raise _invalid(_TOO_DEEP)


def _parts(value: Any) -> Iterable[Any]:
    """Return the elements of a JSON value."""
    if isinstance(value, dict):
        return cast(dict[str, Any], value).values()
    return cast(list[Any], value) if isinstance(value, list) else ()


def _invalid(detail: str) -> HTTPException:
    # FastAPI passes on no other exception of a body that it reads
    return HTTPException(422, f"{detail} {validation.DESCRIBED}")


def check_declared(scope: Scope, limit: int) -> None:
    """Check the headers of a body before it is read.

    Args:
        scope: The request.
        limit: Most bytes of the body.

    Raises:
        HTTPException: The declared length is over the limit, or the body is compressed.
    """
    headers = dict(scope["headers"])
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if encoding.strip().lower() not in ("", "identity"):
        raise HTTPException(
            415, f'Content-Encoding "{encoding}" is not accepted.', {"Accept-Encoding": "identity"}
        )


def count_received(
    receive: Receive, limit: int, on_received: Callable[[int], None] = lambda _: None
) -> Receive:
    """Return a function that receives the body and counts its bytes.

    Args:
        receive: The function of the request.
        limit: Most bytes of the body. More raise `HTTPException`.
        on_received: Called with the bytes of each part.
    """
    received = 0

    async def receive_counted() -> Message:
        nonlocal received
        message = await receive()
        size = len(message.get("body", b""))
        received += size
        on_received(size)
        if received > limit:
            raise _too_large(limit)
        return message

    return receive_counted


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the request is larger than {limit} bytes.")
