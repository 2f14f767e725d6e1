"""Generation of layers: foreground, background, the blended image, and their composite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from alphalayer.api.deps import IdempotencyKey, ServiceDep
from alphalayer.api.guard import GuardedRoute, Submitter
from alphalayer.api.native.answers import LayersResponse, answer_layers
from alphalayer.api.native.fields import (
    FIELDS,
    ImageField,
    SpecContext,
    UploadRequest,
    describe_form,
    run_request,
)
from alphalayer.api.uploads import Images, ImageSource
from alphalayer.core.edits import LayerFields
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import MAX_LAYERS, JobSpec, Output, Stage
from alphalayer.core.layers import CONDITIONS, STACK, Want, plan_chain
from alphalayer.core.modes import ConditionRole, Mode
from alphalayer.core.prompts import MAX_PROMPT_BYTES
from alphalayer.core.request import (
    LAYER_PROMPTS,
    MAX_BATCH,
    BatchSize,
    GenerationRequest,
    ImageFormat,
)
from alphalayer.core.samplers import AUTOMATIC, choose_sampler
from alphalayer.core.values import copy_fields

router = APIRouter(route_class=GuardedRoute)
LAYER_FIELDS = {**FIELDS, "mode": "want", "resize_mode": "resize_mode"}
"""Names of fields on the wire, where they differ from those of `JobSpec`."""
_GIVEN = (
    "a PNG, WebP, AVIF or JPEG file as base64 or data URL, or the name of a stored image. "
    "In a form: the file."
)


class LayersRequest(LayerFields, UploadRequest, frozen=True):
    """Body of `POST /alpha/v1/layers`. Only the prompt is required.

    It is JSON, or a form with files. Layers that are given are not generated.
    """

    model_config = ConfigDict(
        alias_generator=lambda name: LAYER_FIELDS.get(name, name),
        json_schema_extra={"examples": [{"prompt": "an apple on a table"}]},
    )
    wire_fields: ClassVar[Mapping[str, str]] = LAYER_FIELDS
    is_chain: ClassVar[bool] = True
    image_fields: ClassVar[Mapping[str, ImageField]] = {
        role: ImageField(role) for role in CONDITIONS
    }

    batch_size: Annotated[
        BatchSize, Field(description="Sets of layers generated together; seeds count up.")
    ] = 1
    want: Annotated[
        Want, Field(description="Layer to generate, with those that it needs, or all layers.")
    ] = "layers"
    foreground: Annotated[
        ImageSource | None, Field(description=f"Foreground with transparency: {_GIVEN}")
    ] = None
    background: Annotated[ImageSource | None, Field(description=f"Background: {_GIVEN}")] = None
    blended: Annotated[
        ImageSource | None,
        Field(description=f"Foreground and background in one image: {_GIVEN}"),
    ] = None
    format: Annotated[ImageFormat, Field(description="All three have alpha.")] = "png"

    def to_spec(self, context: SpecContext) -> JobSpec:
        """Return the job of this request. See `NativeRequest.to_spec`."""
        images = context.images
        roles: list[ConditionRole] = [role for role in CONDITIONS if role in images]
        modes = plan_chain(self.want, roles, context.family)
        self._check(images, modes[0])
        width, height = self.width, self.height
        if roles:
            width, height = self.size_for(images[roles[0]])
        first, *later = modes
        request = GenerationRequest.of(
            self,
            comments=context.comments,
            mode=first.name,
            noise=context.noise,
            decode=context.decode,
            inputs=tuple(images[role].as_role(role) for role in roles),
            width=width,
            height=height,
            batch_size=self.batch_size * len(first.layers),
            **self._sampling(first),
        )
        stages = tuple(
            Stage(mode=mode.name, prompt=_prompt_of(mode, request), **self._sampling(mode))
            for mode in later
        )
        if len(first.layers) == 1:
            combined = {"prompt": _prompt_of(first, request), **dict.fromkeys(LAYER_PROMPTS, "")}
            request = request.model_copy(update=combined)
        return copy_fields(
            self,
            JobSpec,
            generation=request.model_copy(
                update={"warnings": (*request.warnings, *self._unused_prompts(modes))}
            ),
            stages=stages,
            stores_layers=True,
            output=Output(format=self.format),
        )

    def _sampling(self, mode: Mode) -> dict[str, Any]:
        """Return sampler, schedule and end of the patch, of the client or the mode."""
        name, schedule = self.sampler or mode.sampler, self.scheduler
        if mode.sampler and self.sampler is None and schedule is None:
            schedule = AUTOMATIC
        sampler, scheduler = choose_sampler(name, schedule)
        is_sent = "layerdiffuse_stop_at" in self.model_fields_set
        return {
            "sampler": sampler,
            "scheduler": scheduler,
            "layerdiffuse_stop_at": self.layerdiffuse_stop_at if is_sent else mode.stop_at,
        }

    def _unused_prompts(self, modes: Sequence[Mode]) -> list[str]:
        """Return a warning for each additional prompt of a layer that is not generated."""
        roles = {role for mode in modes for role in mode.layer_roles}
        return [
            f"{role}_prompt: ignored, because no {role} is generated."
            for role in CONDITIONS
            if getattr(self, f"{role}_prompt") and role not in roles
        ]

    def _check(self, images: Images, first: Mode) -> None:
        """Raise `InvalidRequest` for what no chain has."""
        if "foreground" in images and images["foreground"].is_opaque:
            raise InvalidRequest(
                "the foreground is opaque, so that no background can be seen.",
                hint="Remove its background first.",
                field="foreground",
            )
        layers = self.iterations * self.batch_size * len(STACK)
        if layers > MAX_LAYERS or self.batch_size * len(first.layers) > MAX_BATCH:
            raise InvalidRequest(
                f"got {self.iterations * self.batch_size} sets of layers; at most "
                f"{MAX_LAYERS // len(STACK)}, and {MAX_BATCH // len(first.layers)} at a time.",
                hint="Request fewer.",
                field="iterations" if self.iterations > 1 else "batch_size",
            )


def _prompt_of(mode: Mode, request: GenerationRequest) -> str:
    """Return the prompt of a mode of one layer, with its additional prompt.

    Raises:
        InvalidRequest: Both together are too long.
    """
    field = f"{mode.layer_roles[0]}_prompt"
    additional = getattr(request, field)
    prompt = f"{additional}, {request.prompt}" if additional else request.prompt
    if (size := len(prompt.encode())) > MAX_PROMPT_BYTES:
        raise InvalidRequest(
            f"with the prompt it has {size:,} bytes of UTF-8; at most {MAX_PROMPT_BYTES:,}.",
            field=field,
        )
    return prompt


@router.post(
    "/layers",
    response_model=LayersResponse,
    response_model_exclude_none=True,
    summary="Generate layers",
    openapi_extra=describe_form("LayersRequest", *LayersRequest.image_fields),
)
async def layers(
    body: LayersRequest,
    request: Request,
    service: ServiceDep,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Generate foreground and background of one image, or those that are not given.

    The body is JSON or multipart/form-data. A client that disconnects cancels its job.
    """
    job = await run_request(service, request, body, user, idempotency_key)
    return await answer_layers(job, request, service)
