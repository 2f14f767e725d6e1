"""Generation of images from a prompt."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict

from alphalayer.api.deps import IdempotencyKey, ServiceDep
from alphalayer.api.guard import GuardedRoute, Submitter
from alphalayer.api.native.answers import Txt2ImgResponse, answer_images
from alphalayer.api.native.fields import LayerdiffuseRequest, SpecContext, run_request
from alphalayer.core.job import JobSpec, Output
from alphalayer.core.request import HiresFields
from alphalayer.core.values import copy_fields

router = APIRouter(route_class=GuardedRoute)


class Txt2ImgRequest(HiresFields, LayerdiffuseRequest, frozen=True):
    """Body of `POST /alpha/v1/txt2img`. Only the prompt is required.

    Fields that are null take the model's default.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "an apple, high quality"}]},
    )

    def to_spec(self, context: SpecContext) -> JobSpec:
        """Return the job of this request. See `NativeRequest.to_spec`."""
        generation = self.generation(context)
        return copy_fields(self, JobSpec, generation=generation, output=copy_fields(self, Output))


@router.post(
    "/txt2img",
    response_model=Txt2ImgResponse,
    response_model_exclude_none=True,
    summary="Generate a transparent image",
)
async def txt2img(
    body: Txt2ImgRequest,
    request: Request,
    service: ServiceDep,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Wait for the image. A client that disconnects cancels its job."""
    job = await run_request(service, request, body, user, idempotency_key)
    return await answer_images(job, request, service)
