"""Model Context Protocol server whose tools generate and change transparent images.

It is mounted at `/mcp` and runs over stdio. Its tools are clients of the service's HTTP API with
the API key of their caller, so that there is one way to generate. It needs the extra `mcp`
(fastmcp).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import anyio
import httpx
from fastmcp import Context, FastMCP
from fastmcp.exceptions import ToolError
from fastmcp.server.dependencies import get_context, get_http_headers, get_http_request
from fastmcp.tools import Tool, ToolResult
from fastmcp.utilities.types import Image
from mcp.types import ToolAnnotations
from pydantic import Field

from alphalayer import __version__
from alphalayer.api.addresses import address
from alphalayer.api.file_urls import file_url
from alphalayer.api.native.fields import NativeRequest
from alphalayer.api.native.img2img import Img2ImgRequest
from alphalayer.api.native.layers import LayersRequest
from alphalayer.api.native.txt2img import Txt2ImgRequest
from alphalayer.client import JOBS, TIMEOUT_S, AsyncClient, ImageInfo, JobKind, JobStatus
from alphalayer.core.errors import AlphalayerError

PATH = "/mcp"
INSTRUCTIONS = (
    "Generates single objects, stickers, sprites and product art as image files with a real "
    "transparent background."
)
PASSED_ON = ("authorization", "x-api-key")
"""Headers of the caller that are sent to the API."""
NOT_OFFERED = {"layerdiffuse_resize_mode", "layerdiffuse_output_origin", "response_format"}
"""Fields of the native API without effect in a tool."""
RANDOM_SEED = -1


class _Offer(NamedTuple):
    """A tool: what it generates, and how an assistant sees it."""

    kind: JobKind
    body: type[NativeRequest]
    name: str
    title: str
    description: str


OFFERS = (
    _Offer(
        "txt2img",
        Txt2ImgRequest,
        "draw_transparent_picture",
        "Generate a transparent image",
        "Generate images with a transparent background. "
        "Returns the files, and the URL, size and seed of each.",
    ),
    _Offer(
        "img2img",
        Img2ImgRequest,
        "change_image",
        "Change an image",
        "Change an image, or the part of it under a mask, and keep its transparency. "
        "An image is base64, or the file name at the end of the URL of an earlier result.",
    ),
    _Offer(
        "layers",
        LayersRequest,
        "generate_layers",
        "Generate layers",
        "Generate foreground and background of one image as layers, or those that are not given. "
        "Returns the layers, bottom to top, and the URL of a Photoshop document.",
    ),
)


def parameters(body: type[NativeRequest] = Txt2ImgRequest) -> dict[str, Any]:
    """Return the JSON schema of a tool: the native API with random seeds."""
    schema = body.model_json_schema()
    properties = {
        name: field for name, field in schema["properties"].items() if name not in NOT_OFFERED
    }
    properties["seed"]["default"] = RANDOM_SEED
    kept = {name: schema[name] for name in ("type", "required", "additionalProperties", "$defs")}
    return {**kept, "properties": properties}


class _GenerateTool(Tool):
    """A tool. The API validates its arguments."""

    kind: Annotated[JobKind, Field(exclude=True)]
    connect: Annotated[Callable[[], AsyncClient], Field(exclude=True)]
    outside: Annotated[Callable[[], str] | None, Field(exclude=True)]

    async def run(self, arguments: dict[str, Any]) -> ToolResult:
        """Generate images. Raises `ToolError` with the message of the API."""
        for name in arguments.keys() - self.parameters["properties"]:
            raise ToolError(f"{name}: there is no such argument.")
        fields = {name: value for name, value in arguments.items() if value is not None}
        try:
            async with self.connect() as client:
                files, status = await _render(
                    client, get_context(), self.kind, {"seed": RANDOM_SEED, **fields}
                )
        except AlphalayerError as error:
            raise ToolError(str(error)) from None
        format = str(fields.get("format", "png"))
        return self.convert_result(
            [
                *(Image(data=file, format=format) for file in files),
                "\n".join([*self._describe_images(status), *status.warnings]),
            ]
        )

    def _describe_images(self, status: JobStatus) -> list[str]:
        """Return a line for each image, and for each Photoshop document."""
        base = self.outside() if self.outside else None
        lines = [
            f"{_move(image.url, base) if base else image.url} ({_describe_image(image)})"
            for image in status.images
        ]
        return lines + [
            base + document["psd"][document["psd"].index(JOBS) :] if base else document["psd"]
            for document in status.documents
        ]


def create_server(
    connect: Callable[[], AsyncClient], outside: Callable[[], str] | None = None
) -> FastMCP[Any]:
    """Create a server with the tools.

    Args:
        connect: Returns the API client of one call.
        outside: Returns the service's address as the caller knows it; None for that of the API.
    """
    server: FastMCP[Any] = FastMCP("Alphalayer", version=__version__, instructions=INSTRUCTIONS)
    for offer in OFFERS:
        tool = _GenerateTool(
            kind=offer.kind,
            name=offer.name,
            title=offer.title,
            description=offer.description,
            parameters=parameters(offer.body),
            annotations=ToolAnnotations.model_validate({"openWorldHint": False}),
            connect=connect,
            outside=outside,
        )
        server.add_tool(tool)
    return server


async def _render(
    client: AsyncClient, context: Context, kind: JobKind, fields: dict[str, Any]
) -> tuple[list[bytes], JobStatus]:
    """Submit a job, report its progress and download its files.

    A caller that cancels withdraws the job.
    """
    prompt = fields.pop("prompt", None)
    status = await client.submit(prompt, kind=kind, idempotency_key=_job_key(context), **fields)
    step = steps = 0
    try:
        async for change in client.events(status.id):
            status = change
            # the protocol's progress only grows, and stages after the steps count none
            step, steps = max(step, status.step), max(steps, status.steps)
            await context.report_progress(step, steps or None, _describe(status))
    except asyncio.CancelledError:
        # a cancelled scope would cancel this, too
        with anyio.CancelScope(shield=True):
            await client.withdraw(status.id)
        raise
    # their own URLs are for clients outside
    urls = [_move(image.url, client.base_url) for image in status.check().images]
    return [await client.download(url) for url in urls], status


def _job_key(context: Context) -> str | None:
    """Return an idempotency key that is the same if a proxy repeats a call.

    It is made of the HTTP request's `Idempotency-Key`; None without one.
    """
    key = get_http_headers().get("idempotency-key")
    return hashlib.sha256(f"{key} {context.request_id}".encode()).hexdigest() if key else None


def _describe(status: JobStatus) -> str:
    return f"waiting, number {status.position}" if status.position else status.stage


def _describe_image(image: ImageInfo) -> str:
    role = "" if image.role == "image" else f"{image.role}, "
    return f"{role}{image.width}x{image.height}, seed {image.seed}"


def _move(url: str, base: str) -> str:
    """Return the URL of an image at another address, with its signature."""
    return file_url(base, url.rpartition("/")[2])


def connect_to_caller() -> AsyncClient:
    """Return a client of this service's API with the caller's credentials."""
    request = get_http_request()
    headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
    if request.client:
        # wrong keys count against the address of the caller, if this host is a trusted proxy
        headers["x-forwarded-for"] = request.client.host
    http = httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S)
    return AsyncClient(address(*request.scope["server"]), headers=headers, http=http)


def outside(public_url: str | None) -> str:
    """Return the service's address for the caller, without a slash at its end.

    It is the public URL if one is set, otherwise the address of the request.
    """
    return (public_url or str(get_http_request().base_url)).rstrip("/")
