"""Documents with the layers of a job, made from the stored layers on request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import IO, Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from alphalayer.api.deps import Service, ServiceDep, while_connected
from alphalayer.api.document_files import DocumentFile
from alphalayer.api.file_urls import Expires, Signature
from alphalayer.api.guard import GuardedRoute
from alphalayer.api.native.answers import document_key, split_sets
from alphalayer.api.native.files import FOREVER_S
from alphalayer.core.errors import FileMissing, JobMissing
from alphalayer.core.job import MAX_LAYERS, ImageRef, Job, JobState, is_job_id
from alphalayer.core.layers import STACK
from alphalayer.images import codecs
from alphalayer.images.codecs import Rgba
from alphalayer.images.layered import (
    DOCUMENT_MIME_TYPES,
    DocumentKind,
    describe_layers,
    document_bytes,
    write_document,
)
from alphalayer.storage import Storage, read

router = APIRouter(route_class=GuardedRoute)


class _DocumentResponse(StreamingResponse):
    """Response with a document, which is released once it is sent or the client is gone."""

    def __init__(self, file: DocumentFile, opened: AsyncExitStack, kind: DocumentKind):
        super().__init__(file.chunks(), media_type=DOCUMENT_MIME_TYPES[kind])
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the document."""
        async with self._opened:
            await super().__call__(scope, receive, send)


@router.head("/jobs/{job_id}/layers.{kind}", include_in_schema=False)
@router.get(
    "/jobs/{job_id}/layers.{kind}",
    summary="Download layers as one file",
    response_class=Response,
    responses={
        200: {
            "content": {mime: {} for mime in DOCUMENT_MIME_TYPES.values()},
            "description": "The document.",
        }
    },
)
async def document(
    job_id: Annotated[str, Path(description="Id of the job.")],
    kind: Annotated[DocumentKind, Path(description="Format of the file.")],
    request: Request,
    service: ServiceDep,
    number: Annotated[
        int,
        Query(
            alias="set",
            ge=1,
            le=MAX_LAYERS // len(STACK),
            description="Number of the set of layers.",
        ),
    ] = 1,
    expires: Expires = None,
    signature: Signature = None,
) -> Response:
    """Return the layers of a job as PSD, OpenRaster, TIFF or ZIP, without a key.

    The id of the job is the secret, or the URL is signed.
    """
    signer = service.url_signer
    lifetime_s = (
        signer.check(document_key(job_id, kind), expires, signature) if signer else FOREVER_S
    )
    job, layers = await _find_layers(service, job_id, number)
    if request.method == "HEAD":
        response = Response(media_type=DOCUMENT_MIME_TYPES[kind])
        # unknown until the document is made
        del response.headers["Content-Length"]
    else:
        response = await _respond(request, service, kind, layers)
    name = f"{job.file_name(0).rpartition('_')[0]}_{job.id[:10]}.{kind}"
    caching = f"{'private' if signer else 'public'}, max-age={lifetime_s}, immutable"
    response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    response.headers["Cache-Control"] = caching
    return response


async def _find_layers(
    service: Service, job_id: str, number: int
) -> tuple[Job, tuple[ImageRef, ...]]:
    """Return a job and the layers of one of its sets.

    Raises:
        JobMissing: There is no such job.
        FileMissing: It has no such layers.
    """
    view = await service.job_queue.view(job_id) if is_job_id(job_id) else None
    if view is None:
        raise JobMissing(f'there is no job "{job_id[:100]}".', hint="Use the URL as it was given.")
    job = view.job
    if not job.spec.stores_layers:
        raise FileMissing("the job has no layers.", hint="Jobs of /alpha/v1/layers have some.")
    if job.state is not JobState.DONE:
        raise FileMissing(
            f"the job is {job.state.value}, so it has no layers.",
            hint="Download them when it is done.",
        )
    sets = split_sets(job)
    if number > len(sets):
        raise FileMissing(f"there is no set {number} of layers; the job has {len(sets)}.")
    return job, sets[number - 1]


async def _respond(
    request: Request, service: Service, kind: DocumentKind, layers: Sequence[ImageRef]
) -> Response:
    """Return the response with a document, which equal requests share."""
    opened = AsyncExitStack()
    opening = service.documents.open(
        (kind, *(layer.key for layer in layers)), partial(_write, service, kind, layers)
    )
    try:
        file = await while_connected(request, opened.enter_async_context(opening))
    except BaseException:
        await opened.aclose()
        raise
    response = _DocumentResponse(file, opened, kind)
    response.headers["Content-Length"] = str(file.size_bytes)
    return response


async def _write(
    service: Service, kind: DocumentKind, layers: Sequence[ImageRef], file: IO[bytes]
) -> None:
    """Write the document of layers, within a turn of the pool."""
    loop = asyncio.get_running_loop()
    parts = describe_layers(layers, partial(_load, service.storage, loop))
    memory = document_bytes(
        max(layer.width * layer.height for layer in layers), sum(part.is_visible for part in parts)
    )
    async with service.pixels.turn():
        await service.pixels.run(memory, write_document, file, kind, parts)


def _load(storage: Storage, loop: asyncio.AbstractEventLoop, key: str) -> Rgba:
    """Read and decode an image in a thread of the pool."""
    return codecs.decode(asyncio.run_coroutine_threadsafe(read(storage, key), loop).result())[0]
