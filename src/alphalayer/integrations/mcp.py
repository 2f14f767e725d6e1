"""The Model Context Protocol, for assistants: one tool that draws and returns the picture. Mounted at `/mcp`, and over stdio.

The tool is a client of the service's own HTTP API, with the key of whoever calls it: there is no second way to draw. Needs the
extra `mcp` (fastmcp).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Annotated, Any

import anyio
import httpx
from fastmcp import Context, FastMCP
from fastmcp.exceptions import ToolError
from fastmcp.exceptions import ValidationError as FastMCPValidationError
from fastmcp.server.dependencies import get_http_headers, get_http_request
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.utilities.types import Image
from pydantic import Field, ValidationError

from alphalayer import __version__
from alphalayer.api.addresses import address
from alphalayer.api.deps import file_url
from alphalayer.api.errors import first_error
from alphalayer.client import TIMEOUT_S, AsyncClient, ImageInfo, JobStatus
from alphalayer.core.errors import AlphalayerError
from alphalayer.core.request import MAX_PROMPT_CHARACTERS, MAX_SEED, MAX_SIDE

PATH = "/mcp"
INSTRUCTIONS = "Draws single objects, stickers, sprites and product art as PNG files with a real transparent background."
PASSED_ON = ("authorization", "x-api-key")
"""Headers of the caller that go on to the API: who it is."""


def create_server(
    connect: Callable[[], AsyncClient], outside: Callable[[], str] | None = None
) -> FastMCP[Any]:
    """A server with the tool; `connect` makes the client that a call is answered with, `outside` says under which address the caller
    knows the service, where that is not for the API to say."""
    server: FastMCP[Any] = FastMCP("Alphalayer", version=__version__, instructions=INSTRUCTIONS)
    server.add_middleware(_OwnWords())

    async def draw_transparent_picture(
        context: Context,
        prompt: Annotated[
            str,
            Field(
                max_length=MAX_PROMPT_CHARACTERS,
                description="What to draw, in a few words: one object.",
            ),
        ],
        negative_prompt: Annotated[
            str, Field(description="What should not be in it.")
        ] = "bad, ugly",
        width: Annotated[
            int | None,
            Field(ge=64, le=MAX_SIDE, description="Pixels; left out: as the model likes."),
        ] = None,
        height: Annotated[
            int | None,
            Field(ge=64, le=MAX_SIDE, description="Pixels; left out: as the model likes."),
        ] = None,
        steps: Annotated[
            int | None,
            Field(ge=1, le=150, description="More take longer; left out: as the model likes."),
        ] = None,
        seed: Annotated[
            int,
            Field(
                ge=-1,
                le=MAX_SEED,
                description="The same seed gives the same picture; -1: another each time.",
            ),
        ] = -1,
    ) -> list[Any]:
        """Draw a picture with a transparent background. Returns the PNG, and its address, size and seed."""
        wanted = {
            "negative_prompt": negative_prompt,
            "width": width,
            "height": height,
            "steps": steps,
            "seed": seed,
        }
        try:
            async with connect() as client:
                fields = {name: each for name, each in wanted.items() if each is not None}
                data, picture = await _render(client, context, prompt, fields)
        except AlphalayerError as error:
            raise ToolError(str(error)) from None
        url = file_url(outside(), picture.filename) if outside else picture.url
        return [
            Image(data=data, format="png"),
            f"{url} ({picture.width}x{picture.height}, seed {picture.seed})",
        ]

    server.tool(
        draw_transparent_picture,
        title="Draw a transparent picture",
        annotations={"openWorldHint": False},
    )
    return server


class _OwnWords(Middleware):
    """Says in the service's words what is wrong with the arguments of a call."""

    async def on_call_tool(
        self, context: MiddlewareContext[Any], call_next: CallNext[Any, Any]
    ) -> Any:
        """Pass a call on."""
        try:
            return await call_next(context)
        except FastMCPValidationError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
            first = error.__cause__.errors(include_url=False)[0]
            raise ToolError(
                str(first_error({**first, "loc": ("arguments", *first["loc"])}))
            ) from None


async def _render(
    client: AsyncClient, context: Context, prompt: str, fields: dict[str, Any]
) -> tuple[bytes, ImageInfo]:
    """Submit, tell the progress, bring the file; a caller that goes away takes its job along, unless others wait for it."""
    status = await client.submit(prompt, idempotency_key=_job_key(context), **fields)
    step = steps = 0
    try:
        async for change in client.events(status.id):
            status = change
            # that protocol's progress only grows; stages after the steps count none
            step, steps = max(step, status.step), max(steps, status.steps)
            await context.report_progress(step, steps or None, _say(status))
    except asyncio.CancelledError:
        # a cancelled scope would cancel this, too
        with anyio.CancelScope(shield=True):
            await client.withdraw(status.id)
        raise
    (picture,) = status.check().images
    # not at its own address: that is for those outside
    return await client.download(file_url(client.base_url, picture.filename)), picture


def _job_key(context: Context) -> str | None:
    """The same for a call that a proxy sends twice, with the `Idempotency-Key` of its HTTP request; None where there is none."""
    key = get_http_headers().get("idempotency-key")
    return hashlib.sha256(f"{key} {context.request_id}".encode()).hexdigest() if key else None


def _say(status: JobStatus) -> str:
    return f"waiting, number {status.position}" if status.position else status.stage


def connect_to_caller() -> AsyncClient:
    """The API of the service that the tool is mounted in, as the caller of the tool."""
    request = get_http_request()
    headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
    http = httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S)
    return AsyncClient(address(*request.scope["server"]), headers=headers, http=http)


def outside(public_url: str | None) -> str:
    """The service's address for whoever calls the tool, without a slash at its end: the public URL if one is set, else as it reached us."""
    return (public_url or str(get_http_request().base_url)).rstrip("/")
