"""Download and conversion of stored images."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from alphalayer.api.deps import ServiceDep, error_field, while_connected
from alphalayer.api.file_urls import Expires, Signature
from alphalayer.api.guard import Converter, GuardedRoute
from alphalayer.api.schemas import reject_unused_options
from alphalayer.core.job import PREVIEW_PREFIX, Output
from alphalayer.images import codecs, postprocess
from alphalayer.images.codecs import MIME_TYPES
from alphalayer.storage import check_image_key, read

router = APIRouter(route_class=GuardedRoute)
FileName = Annotated[str, Path(description="Name of an image, from a response.")]
REDIRECT_S = 3600
"""Lifetime of a signed URL."""
FOREVER_S = 31_536_000
"""Lifetime of an image in caches, a year: it never changes."""
CONVERT_BYTES = 40
"""Memory for a conversion, in bytes a pixel: as measured for WebP and AVIF, the largest."""
FROM = "Sec-Fetch-Site"
"""Header with which browsers mark requests of this service's own page."""


@router.head("/file/{filename}", include_in_schema=False)
@router.get(
    "/file/{filename}",
    summary="Download an image",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {mime: {} for mime in MIME_TYPES.values()},
            "description": "The image.",
        },
        307: {"description": "URL of the image for an hour, if the service redirects."},
    },
)
async def file(
    filename: FileName,
    request: Request,
    service: ServiceDep,
    expires: Expires = None,
    signature: Signature = None,
) -> Response:
    """Return a stored image without a key.

    The name is the secret, or the URL is signed. Other files of the folder or bucket are not
    served.
    """
    key = check_image_key(filename)
    signer = service.url_signer
    lifetime_s = signer.check(filename, expires, signature) if signer else FOREVER_S
    # the page's policy and a bucket without CORS would block a redirect
    # a URL that is signed for GET does not open with HEAD
    is_page = request.headers.get(FROM) == "same-origin"
    if (
        request.method == "GET"
        and service.redirect_files
        and not is_page
        and (url := service.storage.presign(key, min(lifetime_s + 1, REDIRECT_S)))
    ):
        caching = f"max-age={min(lifetime_s, REDIRECT_S // 2)}"
        return RedirectResponse(url, 307, {"Cache-Control": caching, "Vary": FROM})
    stored = await service.storage.open(key)
    # a preview is overwritten at every step; an image never changes
    scope = "private" if signer else "public"
    caching = (
        "no-store"
        if filename.startswith(PREVIEW_PREFIX)
        else f"{scope}, max-age={lifetime_s}, immutable"
    )
    headers = {"Cache-Control": caching, "Content-Length": str(stored.size_bytes)}
    headers |= {"Vary": FROM} if service.redirect_files else {}
    mime = codecs.mime_type(filename)
    if request.method == "HEAD":
        return Response(media_type=mime, headers=headers)
    return StreamingResponse(stored.chunks, media_type=mime, headers=headers)


class ConvertQuery(Output, frozen=True):
    """Query of `convert`: the output, and the signature of the image's URL if it has one."""

    expires: Expires = None
    signature: Signature = None


@router.get(
    "/convert/{filename}",
    summary="Convert an image",
    response_class=Response,
    responses={
        200: {
            "content": {mime: {} for mime in MIME_TYPES.values()},
            "description": "The converted image.",
        }
    },
)
async def convert(
    filename: FileName,
    output: Annotated[ConvertQuery, Query()],
    request: Request,
    service: ServiceDep,
    _user: Converter,
) -> Response:
    """Return an image in another format, trimmed, defringed or on a colour.

    Its embedded settings stay. The stored image does not change.
    """
    reject_unused_options(output, "trim", "trim_threshold", "trim_padding")
    if service.url_signer:
        service.url_signer.check(filename, output.expires, output.signature)
    key = check_image_key(filename)

    async def work() -> bytes:
        async with service.pixels.turn():
            data = await read(service.storage, key)
            with error_field("filename"):
                return await service.pixels.process(
                    data, CONVERT_BYTES, postprocess.convert, output
                )

    converted = await while_connected(request, work())
    name = f"{PurePath(filename).stem}.{output.format}"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(converted, media_type=MIME_TYPES[output.format], headers=headers)
