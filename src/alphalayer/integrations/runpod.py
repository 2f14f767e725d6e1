"""A worker for Runpod's serverless endpoints: the same engine, asked through their SDK.

A job's input is the body of `POST /alpha/v1/txt2img`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from typing import Any

from pydantic import ValidationError

from alphalayer.api.deps import wire_names
from alphalayer.api.errors import Problem, first_error
from alphalayer.api.native import FIELDS, Txt2ImgRequest
from alphalayer.config import Settings
from alphalayer.core.errors import AlphalayerError, StorageFailed
from alphalayer.core.job import ImageRef, Job, JobSpec, JobState
from alphalayer.engine.base import Progress, RenderTask
from alphalayer.images import infotext
from alphalayer.storage import Storage, read
from alphalayer.storage.objects import open_storage
from alphalayer.worker.engine_process import load_attribute, store_pictures, to_public_error

URL_S = 24 * 3600
"""How long the URL of a picture in a bucket opens it."""
MOST_BYTES = 10_000_000
"""Runpod refuses results of more than 10 MB."""


class ResultTooLarge(AlphalayerError):
    """The pictures are drawn, and too large for a result."""

    code = "result_too_large"


class Handler:
    """Draws what jobs ask for, one after another. The engine is opened once, when the worker starts."""

    def __init__(
        self, settings: Settings, engine: str = "alphalayer.engine.pipeline:create_engine"
    ):
        self._settings = settings
        self._storage: Storage = open_storage(settings.image_location)
        self._engine: Any = load_attribute(engine)(settings.engine_options())
        self._engine.warm_up()
        self._turn = asyncio.Lock()

    async def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer of txt2img, or `{"error": …}` with the problem as JSON; pictures as URLs of the bucket, without one as base64
        and nowhere else."""
        import runpod

        def on_progress(progress: Progress) -> None:
            # none at the end: it could arrive after the result
            if progress.stage == "sample" and progress.step < progress.steps:
                runpod.serverless.progress_update(
                    job, {"step": progress.step, "steps": progress.steps}
                )

        try:
            wanted = Txt2ImgRequest.model_validate(job.get("input") or {})
            with wire_names(FIELDS):
                spec = wanted.to_spec(self._settings.noise, self._settings.decode)
                spec.check_pixels(self._settings.max_request_pixels)
                async with self._turn:
                    return await asyncio.to_thread(
                        self._render, spec, on_progress, wanted.response_format == "base64"
                    )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            return _failed(first_error({**first, "loc": ("input", *first["loc"])}))
        except AlphalayerError as error:
            return _failed(error)
        except Exception as error:
            # it may be the GPU, and then every later job would fail, too: the worker is started again
            return {**_failed(to_public_error(error)), "refresh_worker": True}

    def _render(self, spec: JobSpec, on_progress: Any, with_data: bool) -> dict[str, Any]:
        drawing = Job.new(spec)
        tasks = [
            RenderTask(
                drawing.spec.generation,
                seeds,
                lambda progress, i=i: on_progress(progress.within(i, spec.iterations)),
            )
            for i, seeds in enumerate(drawing.spec.batches())
        ]
        results = [self._engine.render([task])[0] for task in tasks]
        result = store_pictures(self._storage, drawing, results)
        done = drawing.model_copy(update={"state": JobState.DONE, "result": result})
        pictures = [self._answer(image, with_data) for image in result.images]
        several = {"images": pictures} if len(pictures) > 1 else {}
        info = json.dumps(infotext.webui_info(done), ensure_ascii=False)
        return _checked({**pictures[0], **several, "info": info})

    def _answer(self, image: ImageRef, with_data: bool) -> dict[str, Any]:
        url = self._storage.presign(image.key, URL_S)
        told = {
            "filename": image.key,
            "seed": image.seed,
            "width": image.width,
            "height": image.height,
        }
        if url and not with_data:
            return {**told, "url": url}
        data = asyncio.run(read(self._storage, image.key))
        if not url:
            with contextlib.suppress(StorageFailed):  # nobody would ever come for it
                self._storage.delete(image.key)
        return {**told, **({"url": url} if url else {}), "base64": base64.b64encode(data).decode()}


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, if Runpod takes it. Raises `ResultTooLarge`."""
    if (size := len(json.dumps(answer))) > MOST_BYTES:
        raise ResultTooLarge(
            f"the result has {size / 1e6:.1f} MB and Runpod takes {MOST_BYTES / 1e6:g}.",
            hint="Set ALPHALAYER_STORAGE to a bucket and ask for URLs, or ask for fewer pictures or webp.",
        )
    return answer


def _failed(error: AlphalayerError) -> dict[str, Any]:
    return {"error": Problem.of(error).model_dump_json()}


def serve(settings: Settings) -> None:
    """Take jobs from Runpod until stopped; the SDK reads its own flags, as --rp_serve_api and --test_input."""
    import runpod

    runpod.serverless.start({"handler": Handler(settings)})
