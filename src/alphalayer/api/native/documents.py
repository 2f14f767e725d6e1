"""Documents with the layers of a job, made from the stored layers on request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from alphalayer.api.deps import Service, ServiceDep, while_connected
from alphalayer.api.file_urls import Expires, Signature
from alphalayer.api.guard import GuardedRoute
from alphalayer.api.native.answers import document_key, is_visible, split_sets
from alphalayer.api.native.files import FOREVER_S
from alphalayer.core.errors import FileMissing, JobMissing
from alphalayer.core.job import ImageRef, Job, is_job_id
from alphalayer.images import codecs
from alphalayer.images.layered import (
    DOCUMENT_BYTES,
    DOCUMENT_MIME_TYPES,
    DocumentKind,
    DocumentLayer,
    encode_document,
)
from alphalayer.storage import read

router = APIRouter(route_class=GuardedRoute)


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
        int, Query(alias="set", ge=1, le=256, description="Number of the set of layers.")
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
    data = await while_connected(request, _encode(service, kind, layers))
    name = f"{job.file_name(0).rpartition('_')[0]}_{job.id[:10]}.{kind}"
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Cache-Control": f"{'private' if signer else 'public'}, max-age={lifetime_s}, immutable",
    }
    return Response(data, media_type=DOCUMENT_MIME_TYPES[kind], headers=headers)


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
    sets = split_sets(view.job)
    if number > len(sets):
        raise FileMissing(
            f"there is no set {number} of layers; the job has {len(sets)}.",
            hint="Jobs of layers have some when they are done.",
        )
    return view.job, sets[number - 1]


async def _encode(service: Service, kind: DocumentKind, layers: Sequence[ImageRef]) -> bytes:
    """Read the layers and encode the document, within a turn of the pool."""
    pixels = sum(layer.width * layer.height for layer in layers)
    async with service.pixels.turn():
        files = [await read(service.storage, layer.key) for layer in layers]
        visible = [is_visible(layer, layers) for layer in layers]
        names = [layer.role.capitalize() for layer in layers]
        return await service.pixels.run(
            pixels * DOCUMENT_BYTES, _encode_files, kind, names, files, visible
        )


def _encode_files(
    kind: DocumentKind, names: Sequence[str], files: Sequence[bytes], visible: Sequence[bool]
) -> bytes:
    """Decode the files of layers, bottom to top, and encode the document."""
    layers = [
        DocumentLayer(name, codecs.decode(data)[0], is_shown)
        for name, data, is_shown in zip(names, files, visible, strict=True)
    ]
    return encode_document(kind, layers)
