"""Answers of the native requests: images with their URLs, and layers with their documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import BaseModel, Field

from alphalayer.api.deps import Service, base_url, embed_file
from alphalayer.api.embedded_files import EmbeddedFiles
from alphalayer.api.file_urls import UrlSigner, file_url
from alphalayer.api.info import webui_info
from alphalayer.api.schemas import StageSeconds
from alphalayer.core.job import ImageRef, Job
from alphalayer.core.modes import LayerRole
from alphalayer.images.layered import is_visible

Info = Annotated[str, Field(description="JSON string: seeds, size, sampler, model and infotexts.")]
Warnings = Annotated[
    list[str] | None, Field(description="What of the request was ignored, if anything.")
]


class ImageAnswer(BaseModel):
    """One image."""

    url: Annotated[str, Field(description="URL of the image.")]
    filename: Annotated[str, Field(description="Storage key of the image.")]
    seed: Annotated[int, Field(description="Seed of the image.")]
    width: Annotated[int, Field(description="Pixels.")]
    height: Annotated[int, Field(description="Pixels.")]
    role: Annotated[
        LayerRole,
        Field(description="What a layer is: image is one alone, composite shows two together."),
    ] = "image"
    base64: Annotated[str | None, Field(description="The file, if requested.")] = None


class Txt2ImgResponse(BaseModel):
    """The image's URL and name, and `info`, a JSON string of all its settings."""

    url: Annotated[str, Field(description="URL of the first image.")]
    filename: Annotated[str, Field(description="Storage key of the first image.")]
    info: Info
    base64: Annotated[str | None, Field(description="The first file, if requested.")] = None
    images: Annotated[
        list[ImageAnswer] | None, Field(description="All images, if there are several.")
    ] = None
    seconds: StageSeconds = {}
    warnings: Warnings = None


class Documents(BaseModel):
    """URLs of files with all layers of a set. They are made on request."""

    psd: Annotated[str, Field(description="Photoshop document.")]
    ora: Annotated[str, Field(description="OpenRaster document.")]
    tiff: Annotated[str, Field(description="TIFF with a page for each layer.")]
    zip: Annotated[str, Field(description="ZIP with a PNG for each layer.")]


class LayerAnswer(ImageAnswer):
    """One layer."""

    seed: Annotated[int, Field(description="Seed of the layer, or of its set if it was given.")]
    is_opaque: Annotated[bool, Field(description="Whether every pixel is opaque.")]
    is_visible: Annotated[bool, Field(description="Whether it is visible in documents.")]


class LayerSet(BaseModel):
    """Layers that belong together, and files with all of them."""

    layers: Annotated[
        list[LayerAnswer],
        Field(description="Bottom to top: background, foreground, blended, composite."),
    ]
    documents: Documents


class LayersResponse(LayerSet):
    """The layers of the first set, and `info`, a JSON string of all settings."""

    sets: Annotated[list[LayerSet] | None, Field(description="All sets, if there are several.")] = (
        None
    )
    info: Info
    seconds: StageSeconds = {}
    warnings: Warnings = None


def image_answers(job: Job, base: str, signer: UrlSigner | None) -> list[ImageAnswer]:
    """Return the images of a job with their URLs; none before it is done."""
    images = job.result.images if job.result else ()
    return [ImageAnswer(**_describe(image, base, signer)) for image in images]


def layer_sets(job: Job, base: str, signer: UrlSigner | None) -> list[LayerSet]:
    """Return the sets of layers of a job that stores layers; none before it is done."""
    return [
        LayerSet(
            layers=[
                LayerAnswer(
                    **_describe(image, base, signer),
                    is_opaque=bool(image.is_opaque),
                    is_visible=is_visible(image, images),
                )
                for image in images
            ],
            documents=_documents(job, number, base, signer),
        )
        for number, images in enumerate(split_sets(job), 1)
    ]


def split_sets(job: Job) -> list[tuple[ImageRef, ...]]:
    """Return the layers of each set of a job that stores layers, bottom to top."""
    if job.result is None or not job.spec.stores_layers:
        return []
    images, count = job.result.images, job.spec.iterations * job.spec.sets
    size = len(images) // count
    return [images[number * size : (number + 1) * size] for number in range(count)]


def _describe(image: ImageRef, base: str, signer: UrlSigner | None) -> dict[str, Any]:
    return {
        "url": file_url(base, image.key, signer),
        "filename": image.key,
        "seed": image.seed,
        "width": image.width,
        "height": image.height,
        "role": image.role,
    }


def document_key(job_id: str, kind: str) -> str:
    """Return the name of a document of a job, which is signed."""
    return f"{job_id}/layers.{kind}"


def _documents(job: Job, number: int, base: str, signer: UrlSigner | None) -> Documents:
    urls: dict[str, str] = {}
    for kind in Documents.model_fields:
        key = document_key(job.id, kind)
        query = signer.query(key) if signer else ""
        if number > 1:
            query += f"{'&' if query else '?'}set={number}"
        urls[kind] = f"{base}/alpha/v1/jobs/{key}{query}"
    return Documents(**urls)


async def add_data(images: Sequence[ImageAnswer], service: Service, files: EmbeddedFiles) -> None:
    """Add placeholders of files to images. Raises `FileMissing`, `StorageFailed`."""
    for image in images:
        image.base64 = await embed_file(service, files, image.filename)


async def answer_images(job: Job, request: Request, service: Service) -> Response:
    """Return the answer of txt2img and img2img."""
    assert job.result is not None, job.id
    images = image_answers(job, base_url(service, request), service.url_signer)
    files = EmbeddedFiles()
    if job.delivery.with_data:
        await add_data(images, service, files)
    first = images[0]
    answer = Txt2ImgResponse(
        url=first.url,
        filename=first.filename,
        info=json.dumps(webui_info(job), ensure_ascii=False),
        base64=first.base64,
        images=images if len(images) > 1 else None,
        seconds=job.result.seconds,
        warnings=list(job.result.warnings) or None,
    )
    return files.respond(answer, exclude_none=True)


async def answer_layers(job: Job, request: Request, service: Service) -> Response:
    """Return the answer of layers."""
    assert job.result is not None, job.id
    sets = layer_sets(job, base_url(service, request), service.url_signer)
    files = EmbeddedFiles()
    if job.delivery.with_data:
        await add_data([layer for one in sets for layer in one.layers], service, files)
    answer = LayersResponse(
        layers=sets[0].layers,
        documents=sets[0].documents,
        sets=sets if len(sets) > 1 else None,
        info=json.dumps(webui_info(job), ensure_ascii=False),
        seconds=job.result.seconds,
        warnings=list(job.result.warnings) or None,
    )
    return files.respond(answer, exclude_none=True)
