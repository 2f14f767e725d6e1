"""Worker for Runpod's serverless endpoints: the same engine, called through their SDK.

A job's input is the body of `POST /alpha/v1/txt2img`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from alphalayer.api.deps import wire_names
from alphalayer.api.errors import Problem, first_error
from alphalayer.api.info import webui_info
from alphalayer.api.native import FIELDS, Txt2ImgRequest
from alphalayer.config import Settings
from alphalayer.core.errors import AlphalayerError, StorageFailed
from alphalayer.core.job import ImageRef, Job, JobProgress, JobSpec, JobState
from alphalayer.storage import Storage, read
from alphalayer.storage.objects import open_storage
from alphalayer.worker.render import ENGINE, Renderer, load_engine, to_public_error

URL_S = 24 * 3600
"""Seconds that the URL of an image in a bucket is valid."""
MAX_RESULT_BYTES = 10_000_000
"""Runpod refuses larger results."""


class ResultTooLarge(AlphalayerError):
    """The images are generated, and too large for a result."""

    code = "result_too_large"


class Handler:
    """Handler of jobs, one after another. The engine is loaded once, when the worker starts."""

    def __init__(self, settings: Settings, engine: str = ENGINE):
        self._settings = settings
        self._storage: Storage = open_storage(settings.image_location)
        self._engine = load_engine(engine, settings.engine_options())
        self._engine.warm_up()
        self._turn = asyncio.Lock()

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
            request = Txt2ImgRequest.model_validate(job.get("input") or {})
            with wire_names(FIELDS):
                settings = self._settings
                spec = request.to_spec(
                    settings.noise, settings.decode, comments=settings.prompt_comments
                )
                spec.check_pixels(self._settings.max_request_pixels)
                spec.check_cost(self._settings.max_request_cost)
                async with self._turn:
                    return await asyncio.to_thread(
                        self._render, spec, on_progress, request.response_format == "base64"
                    )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            return _failed(first_error({**first, "loc": ("input", *first["loc"])}))
        except AlphalayerError as error:
            return _failed(error)
        except Exception as error:
            # the GPU may be broken, and every later job would fail: restart the worker
            return {**_failed(to_public_error(error)), "refresh_worker": True}

    def _render(
        self, spec: JobSpec, on_progress: Callable[[Job, JobProgress], None], with_data: bool
    ) -> dict[str, Any]:
        job = Job.new(spec)
        result = Renderer(self._engine, self._storage, on_progress).run(job)
        job = job.model_copy(update={"state": JobState.DONE, "result": result})
        images = [self._answer(image, with_data) for image in result.images]
        several = {"images": images} if len(images) > 1 else {}
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
