"""Worker for Runpod's serverless endpoints: the same engine, called through their SDK.

A job's input is the body of `POST /alpha/v1/txt2img`. With `"task": "img2img"` or `"layers"` it is
the body of that route, with images as base64 or as names of images in the bucket.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from alphalayer.api.deps import wire_names
from alphalayer.api.errors import Problem, first_error
from alphalayer.api.file_urls import UrlSigner
from alphalayer.api.info import webui_info
from alphalayer.api.native.fields import FIELDS, NativeRequest, SpecContext, store_images
from alphalayer.api.native.img2img import Img2ImgRequest
from alphalayer.api.native.layers import LAYER_FIELDS, LayersRequest
from alphalayer.api.native.txt2img import Txt2ImgRequest
from alphalayer.api.pixel_pool import PixelPool
from alphalayer.catalog import find_models, resolve_model
from alphalayer.config import Settings
from alphalayer.core import validation
from alphalayer.core.errors import AlphalayerError, InvalidRequest, StorageFailed
from alphalayer.core.job import ImageRef, Job, JobProgress, JobSpec, JobState
from alphalayer.core.layers import DEFAULT_FAMILY
from alphalayer.storage import Storage, StoredFile, is_input, read
from alphalayer.storage.objects import open_storage
from alphalayer.worker.render import ENGINE, Renderer, load_engine, to_public_error

URL_S = 24 * 3600
"""Seconds that the URL of an image in a bucket is valid."""
MAX_RESULT_BYTES = 10_000_000
"""Runpod refuses larger results."""
TASKS: dict[str, type[NativeRequest]] = {
    "txt2img": Txt2ImgRequest,
    "img2img": Img2ImgRequest,
    "layers": LayersRequest,
}
IMAGE_MEMORY = 250_000_000


class ResultTooLarge(AlphalayerError):
    """The images are generated, and too large for a result."""

    code = "result_too_large"


@dataclass(frozen=True)
class _Uploads:
    """What stores the input images of a job. See `alphalayer.api.uploads.Uploads`."""

    storage: Storage
    pixels: PixelPool
    url_signer: UrlSigner | None = None


class _JobFiles:
    """The storage, with the input images of one job in memory.

    Nothing of a refused or finished job stays.
    """

    def __init__(self, storage: Storage):
        self._storage = storage
        self._inputs: dict[str, bytes] = {}

    def put(self, key: str, data: bytes, *, replace: bool = False, renew: bool = False) -> None:
        """Write an image, or keep an input image."""
        if is_input(key):
            self._inputs[key] = data
        else:
            self._storage.put(key, data, replace=replace, renew=renew)

    async def open(self, key: str) -> StoredFile:
        """Open a file. See `Storage`."""
        if key not in self._inputs:
            return await self._storage.open(key)
        data = self._inputs[key]

        async def chunks() -> AsyncIterator[bytes]:
            yield data

        return StoredFile(len(data), time.time(), chunks())


class Handler:
    """Handler of jobs, one after another. The engine is loaded once, when the worker starts."""

    def __init__(self, settings: Settings, engine: str = ENGINE):
        self._settings = settings
        self._storage: Storage = open_storage(settings.image_location)
        self._engine = load_engine(engine, settings.engine_options())
        self._engine.warm_up()
        self._turn = asyncio.Lock()
        self._pixels = PixelPool(IMAGE_MEMORY)

    async def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the answer of txt2img, or `{"error": …}` with the problem as JSON.

        Images are URLs of the bucket. Without a bucket they are base64 and not kept.
        """
        import runpod

        def on_progress(_job: Job, progress: JobProgress) -> None:
            # the last step is left out: it could arrive after the result
            if progress.stage == "sample" and progress.step < progress.steps:
                runpod.serverless.progress_update(
                    job, {"step": progress.step, "steps": progress.steps}
                )

        try:
            request = _read_input({} if job.get("input") is None else job["input"])
            with wire_names(LAYER_FIELDS if request.is_chain else FIELDS):
                async with self._turn:
                    return await self._run(request, on_progress)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            return _failed(first_error({**first, "loc": ("input", *first["loc"])}))
        except AlphalayerError as error:
            return _failed(error)
        except Exception as error:
            # the GPU may be broken, and every later job would fail: restart the worker
            return {**_failed(to_public_error(error)), "refresh_worker": True}

    async def _run(
        self, request: NativeRequest, on_progress: Callable[[Job, JobProgress], None]
    ) -> dict[str, Any]:
        """Read the input images of a request, and run it."""
        settings, files = self._settings, _JobFiles(self._storage)
        uploads = _Uploads(cast(Storage, files), self._pixels)
        context = SpecContext(
            settings.noise,
            settings.decode,
            settings.prompt_comments,
            await store_images(uploads, request),
            await asyncio.to_thread(self._find_family, request),
        )
        spec = request.to_spec(context)
        spec.check_pixels(settings.max_request_pixels)
        spec.check_cost(settings.max_request_cost)
        renderer = Renderer(self._engine, files, on_progress)
        return await asyncio.to_thread(self._render, renderer, spec, request.with_data)

    def _find_family(self, request: NativeRequest) -> str:
        """Return the family of the model of a chain. Raises `AlphalayerError`."""
        if not request.is_chain:
            return DEFAULT_FAMILY
        folder = self._settings.models_dir
        name = request.model or self._settings.default_model
        return resolve_model(name, find_models(folder), folder).family

    def _render(self, renderer: Renderer, spec: JobSpec, with_data: bool) -> dict[str, Any]:
        job = Job.new(spec)
        result = renderer.run(job)
        job = job.model_copy(update={"state": JobState.DONE, "result": result})
        images = [self._answer(image, with_data) for image in result.images]
        several = {"images": images} if len(images) > 1 or spec.stores_layers else {}
        info = json.dumps(webui_info(job), ensure_ascii=False)
        warnings = {"warnings": list(result.warnings)} if result.warnings else {}
        return _check_size({**images[0], **several, **warnings, "info": info})

    def _answer(self, image: ImageRef, with_data: bool) -> dict[str, Any]:
        url = self._storage.presign(image.key, URL_S)
        answer: dict[str, Any] = {
            "filename": image.key,
            "seed": image.seed,
            "width": image.width,
            "height": image.height,
            "role": image.role,
        }
        if url:
            answer["url"] = url
            if not with_data:
                return answer
        data = asyncio.run(read(self._storage, image.key))
        if not url:
            with contextlib.suppress(StorageFailed):  # no client could fetch it later
                self._storage.delete(image.key)
        return {**answer, "base64": base64.b64encode(data).decode()}


def _read_input(fields: Any) -> NativeRequest:
    """Validate the input of a job.

    Raises:
        InvalidRequest: It is no object, or the task is unknown.
        ValidationError: A field is wrong.
    """
    if not isinstance(fields, dict):
        raise InvalidRequest(f"got {validation.shown(fields)}; an object.", field="input")
    fields = cast(dict[str, Any], fields)
    task = fields.get("task", "txt2img")
    if not isinstance(task, str) or task not in TASKS:
        raise InvalidRequest(f"use one of: {', '.join(TASKS)}.", field="task")
    body = {name: value for name, value in fields.items() if name != "task"}
    return TASKS[task].model_validate(body)


def _check_size(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer. Raises `ResultTooLarge` if Runpod would refuse it."""
    if (size := len(json.dumps(answer))) > MAX_RESULT_BYTES:
        raise ResultTooLarge(
            f"the result has {size / 1e6:.1f} MB and Runpod takes {MAX_RESULT_BYTES / 1e6:g}.",
            hint="Set ALPHALAYER_STORAGE to a bucket and request URLs, or request fewer images "
            "or webp.",
        )
    return answer


def _failed(error: AlphalayerError) -> dict[str, Any]:
    return {"error": Problem.of(error).model_dump_json()}


def serve(settings: Settings) -> None:
    """Take jobs from Runpod until stopped.

    The SDK reads its own flags, such as --rp_serve_api and --test_input.
    """
    import runpod

    runpod.serverless.start({"handler": Handler(settings)})
