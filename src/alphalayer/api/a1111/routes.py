"""The AUTOMATIC1111 dialect, `/sdapi/v1`, with LayerDiffuse as that ecosystem sends it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, field_validator

from alphalayer.api.a1111 import lists
from alphalayer.api.a1111.lists import ALIASES
from alphalayer.api.a1111.script import SCRIPT, layerdiffuse_of
from alphalayer.api.deps import (
    IdempotencyKey,
    Service,
    ServiceDep,
    User,
    find_model,
    read_file,
    read_preview,
    require_user,
    run_job,
    wire_names,
)
from alphalayer.api.dialect import Dialect
from alphalayer.api.errors import ErrorResponse, Problem
from alphalayer.api.schemas import Body
from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest, NotImplementedYet
from alphalayer.core.job import MAX_ITERATIONS, JobSpec, JobState, Submission
from alphalayer.core.request import AUTOMATIC, OPAQUE, parse_request, split_sampler_name
from alphalayer.images import codecs, infotext
from alphalayer.jobs.base import JobView

FIELDS = {
    "sampler": "sampler_name",
    "model": "override_settings.sd_model_checkpoint",
    "iterations": "n_iter",
    "loras": "prompt",
    "layerdiffuse_method": f"alwayson_scripts.{SCRIPT}.args",
}
"""What a field is called here, where that differs from `GenerationRequest`."""


class Detail(BaseModel):
    """What every error answers."""

    detail: Annotated[str, Field(description="What is wrong, and what to do.")]


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Detail, "description": "What is wrong."} for status in (422, "4XX")
}
router = APIRouter(
    prefix="/sdapi/v1",
    tags=["AUTOMATIC1111"],
    responses=ERRORS,
    dependencies=[Depends(require_user)],
)
router.include_router(lists.router)


def _render_error(problem: Problem, headers: Mapping[str, str]) -> ErrorResponse:
    """Return the response for an error in AUTOMATIC1111's form."""
    content = {"detail": f"{problem.detail} {problem.hint}".strip()}
    return ErrorResponse(content, problem.status, dict(headers))


DIALECT = Dialect("/sdapi", router, _render_error, FIELDS)


@dataclass
class Options:
    """What this dialect keeps between requests; one for each application, as the original has one for each process."""

    sd_model_checkpoint: str | None = None
    clip_skip: int = 1
    previews: bool = False


async def options_of(request: Request) -> Options:
    """The options of this application."""
    state = request.app.state
    if not hasattr(state, "a1111"):
        state.a1111 = Options()
    return state.a1111


OptionsDep = Annotated[Options, Depends(options_of)]


class OverrideSettings(BaseModel):
    """Settings for one request. Others of the original are ignored."""

    sd_model_checkpoint: Annotated[
        str | None, Field(max_length=500, description="A model by name, title or hash.")
    ] = None
    sd_vae: Annotated[
        str | None, Field(description='"Automatic" alone; another one is not there yet.')
    ] = None
    CLIP_stop_at_last_layers: (
        Annotated[int, Field(ge=1, le=12, description="The layer to stop at; 1: the last.")] | None
    ) = None
    live_previews_enable: Annotated[
        StrictBool | None, Field(description="Whether `progress` has a picture.")
    ] = None
    forge_additional_modules: Annotated[Any, Field(description="Not there yet.")] = None

    def refuse_what_is_not_there(self, place: str = "") -> None:
        """Raise `InvalidRequest` for a setting that would change the picture and is not there yet; `place` is where it was sent."""
        other_vae = self.sd_vae not in (None, "", "None", "Automatic")
        for name, wanted in (
            ("sd_vae", other_vae),
            ("forge_additional_modules", self.forge_additional_modules),
        ):
            if wanted:
                raise InvalidRequest(
                    "this is not there yet.", hint="Leave it out.", field=f"{place}{name}"
                )


class Script(BaseModel):
    """What one script is given."""

    args: Annotated[
        list[Any],
        Field(description="In the order of `script-info`; a missing tail keeps its defaults."),
    ] = []


class Txt2ImgRequest(Body):
    """The body of `POST /sdapi/v1/txt2img`, with the defaults of that API. Fields that are not here are ignored, as there."""

    model_config = ConfigDict(
        allow_inf_nan=False,
        title="A1111Txt2ImgRequest",
        json_schema_extra={
            "examples": [
                {"prompt": "an apple, high quality", "steps": 20, "width": 1024, "height": 1024}
            ]
        },
    )

    prompt: Annotated[str, Field(description="What to draw.")] = ""
    negative_prompt: Annotated[str, Field(description="What to keep out.")] = ""
    seed: Annotated[int, Field(description="Same seed, same picture; -1 draws a fresh one.")] = -1
    subseed: Annotated[int, Field(description="Variation seed.")] = -1
    subseed_strength: Annotated[float, Field(description="How far to go to the variation.")] = 0.0
    sampler_name: Annotated[
        str | None, Field(max_length=100, description="One of `samplers`; may carry its scheduler.")
    ] = None
    sampler_index: Annotated[
        str, Field(max_length=100, description="The old name of sampler_name.")
    ] = "Euler"
    scheduler: Annotated[
        str | None, Field(max_length=100, description="One of `schedulers`, by name or label.")
    ] = None
    batch_size: Annotated[int, Field(description="Pictures drawn together; seeds count up.")] = 1
    n_iter: Annotated[
        int, Field(ge=1, le=MAX_ITERATIONS, description="Batches drawn one after another.")
    ] = 1
    steps: Annotated[int, Field(description="Sampling steps.")] = 50
    cfg_scale: Annotated[float, Field(description="How strictly the prompt is followed.")] = 7.0
    width: Annotated[int, Field(description="Pixels.")] = 512
    height: Annotated[int, Field(description="Pixels.")] = 512
    override_settings: Annotated[
        OverrideSettings, Field(description="Settings for this request alone.")
    ] = OverrideSettings()
    send_images: Annotated[bool, Field(description="Whether the answer holds the pictures.")] = True
    save_images: Annotated[bool, Field(description="Every picture is kept anyway.")] = False
    force_task_id: Annotated[
        str | None,
        Field(max_length=100, description="The same id and request give the same job again."),
    ] = None
    alwayson_scripts: Annotated[
        dict[str, Script],
        Field(description="LayerDiffuse, by its name, with positional arguments."),
    ] = {}  # noqa: RUF012 - pydantic copies it
    layerdiffuse_enabled: Annotated[
        bool, Field(description="Draw with transparency, also where the script is not named.")
    ] = True
    enable_hr: Annotated[
        Any,
        Field(
            description="This and those below: not there yet, and refused where they would change the picture."
        ),
    ] = False
    restore_faces: Annotated[Any, Field(description="Not there yet.")] = False
    tiling: Annotated[Any, Field(description="Not there yet.")] = False
    styles: Annotated[Any, Field(description="Not there yet.")] = ()
    script_name: Annotated[Any, Field(description="Not there yet.")] = None
    refiner_checkpoint: Annotated[Any, Field(description="Not there yet.")] = None
    infotext: Annotated[Any, Field(description="Not there yet.")] = None
    seed_resize_from_w: Annotated[int, Field(description="Not there yet.")] = -1
    seed_resize_from_h: Annotated[int, Field(description="Not there yet.")] = -1
    s_churn: Annotated[float, Field(description="Not there yet.")] = 0
    s_noise: Annotated[float, Field(description="1 is ignored; others are not there yet.")] = 1
    eta: Annotated[float | None, Field(description="0 and 1 are ignored.")] = None

    @field_validator("alwayson_scripts", mode="before")
    @classmethod
    def _is_unicode(cls, scripts: Any) -> Any:
        # what is in it may be anything, and goes back to the client
        validation.check_unicode(scripts)
        return scripts

    def to_spec(self, service: Service, options: Options) -> JobSpec:
        """The job that does this. Raises `InvalidRequest`."""
        self._refuse_what_is_not_there()
        override = self.override_settings
        name = self.sampler_name or self.sampler_index
        sampler, scheduler = split_sampler_name(
            ALIASES.get(name.lower(), name), self.scheduler or AUTOMATIC
        )
        same = (
            "prompt",
            "negative_prompt",
            "seed",
            "subseed",
            "subseed_strength",
            "batch_size",
            "steps",
            "cfg_scale",
            "width",
            "height",
        )
        fields = {
            **{name: getattr(self, name) for name in same},
            "sampler": sampler,
            "scheduler": scheduler,
            "clip_skip": override.CLIP_stop_at_last_layers or options.clip_skip,
            "model": override.sd_model_checkpoint or options.sd_model_checkpoint,
            "noise": service.noise,
            "decode": service.decode,
            **self._layerdiffuse(),
        }
        with wire_names(FIELDS):
            generation = parse_request(fields)
        previews = (
            options.previews
            if override.live_previews_enable is None
            else override.live_previews_enable
        )
        return JobSpec(generation=generation, iterations=self.n_iter, previews=previews)

    def _layerdiffuse(self) -> dict[str, Any]:
        for title, script in self.alwayson_scripts.items():
            if title.lower() != SCRIPT.lower():
                raise InvalidRequest(
                    f'there is no script "{title}" here.',
                    hint=f"Use {SCRIPT}.",
                    field="alwayson_scripts",
                )
            options = layerdiffuse_of(script.args)
            if (
                script.args
                and (options["mode"] != OPAQUE) != self.layerdiffuse_enabled
                and "layerdiffuse_enabled" in self.model_fields_set
            ):
                raise InvalidRequest(
                    f"it is {str(self.layerdiffuse_enabled).lower()}, and the script {SCRIPT} says otherwise.",
                    hint="Say it in one place.",
                    field="layerdiffuse_enabled",
                )
            return options if self.layerdiffuse_enabled else {"mode": OPAQUE}
        return {} if self.layerdiffuse_enabled else {"mode": OPAQUE}

    def _refuse_what_is_not_there(self) -> None:
        names = [
            "enable_hr",
            "restore_faces",
            "tiling",
            "styles",
            "script_name",
            "refiner_checkpoint",
            "infotext",
        ]
        wanted = [name for name in (*names, "s_churn") if getattr(self, name)]
        wanted += [
            name for name in ("seed_resize_from_w", "seed_resize_from_h") if getattr(self, name) > 0
        ]
        wanted += ["s_noise"] if self.s_noise != 1 else []
        wanted += ["eta"] if self.eta not in (None, 0, 1) else []
        self.override_settings.refuse_what_is_not_there("override_settings.")
        if wanted:
            raise InvalidRequest("this is not there yet.", hint="Leave it out.", field=wanted[0])


class Txt2ImgResponse(BaseModel):
    """The pictures as bare base64, the request as it was understood, and `info`, a JSON string."""

    images: Annotated[list[str], Field(description="PNG files as base64.")]
    parameters: Annotated[dict[str, Any], Field(description="The request as it was understood.")]
    info: Annotated[
        str, Field(description="A JSON string: seeds, size, sampler, model and the infotexts.")
    ]


class SdModel(BaseModel):
    """One checkpoint."""

    title: Annotated[str, Field(description="The name, with the short hash once it is known.")]
    model_name: Annotated[str, Field(description="The name.")]
    hash: Annotated[str | None, Field(description="The first ten digits of the SHA-256.")]
    sha256: Annotated[str | None, Field(description="Null until the file was hashed.")]
    filename: Annotated[str, Field(description="Where it lies.")]
    config: Annotated[str | None, Field(description="Always null.")]


class Picture(BaseModel):
    """A picture file as base64, with or without the head of a data URL."""

    image: Annotated[str, Field(description="The file.")]


@router.post("/txt2img", summary="Draw pictures")
async def txt2img(
    body: Txt2ImgRequest,
    request: Request,
    service: ServiceDep,
    options: OptionsDep,
    user: User,
    idempotency_key: IdempotencyKey = None,
) -> Txt2ImgResponse:
    """With transparency, unless `layerdiffuse_enabled` is false. Nothing but the pictures is in `images`."""
    spec = body.to_spec(service, options)
    key = f"{body.force_task_id}:{body.digest}" if body.force_task_id else idempotency_key
    with wire_names(FIELDS):
        job = await run_job(
            request, spec, Submission(owner=user, idempotency_key=key, digest=body.digest)
        )
    keys = [image.key for image in job.result.images] if job.result and body.send_images else []
    return Txt2ImgResponse(
        images=[base64.b64encode(await read_file(service, key)).decode() for key in keys],
        parameters=body.model_dump(mode="json"),
        info=json.dumps(infotext.webui_info(job), ensure_ascii=False),
    )


@router.post("/img2img", summary="Not there yet", status_code=501, response_model=Detail)
@router.post("/extra-single-image", summary="Not there yet", status_code=501, response_model=Detail)
@router.post("/extra-batch-images", summary="Not there yet", status_code=501, response_model=Detail)
@router.post("/interrogate", summary="Not there yet", status_code=501, response_model=Detail)
async def not_there(request: Request) -> None:
    """Answers 501."""
    name = request.url.path.rpartition("/")[2]
    raise NotImplementedYet(f"{name} is not there yet.", hint="Use /sdapi/v1/txt2img.")


@router.get("/sd-models", summary="The models that can be asked for", response_model=list[SdModel])
def sd_models(service: ServiceDep) -> list[dict[str, Any]]:
    """Also the health check that operators of the old stack use."""
    return [entry.webui_json() for entry in service.list_models() if entry.problem is None]


@router.get("/options", summary="The settings of this dialect")
def get_options(service: ServiceDep, options: OptionsDep) -> dict[str, Any]:
    """Those that mean something here."""
    name = options.sd_model_checkpoint or service.readiness()["model"]
    entry = next((each for each in service.list_models() if name in (each.name, each.title)), None)
    return {
        "sd_model_checkpoint": entry.title if entry else name or "",
        "sd_checkpoint_hash": (entry.sha256 if entry else None) or "",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": options.clip_skip,
        "live_previews_enable": options.previews,
        "samples_format": "png",
        "randn_source": service.noise.upper(),
    }


@router.post("/options", summary="Change settings of this dialect")
def set_options(body: OverrideSettings, service: ServiceDep, options: OptionsDep) -> None:
    """Takes a part or the whole of what GET gives. The model is that of later requests here that name none."""
    body.refuse_what_is_not_there()
    name = body.sd_model_checkpoint
    if name and service.knows_models:
        with wire_names({"model": "sd_model_checkpoint"}):
            name = find_model(service, name).name
    options.sd_model_checkpoint = name or options.sd_model_checkpoint
    if body.CLIP_stop_at_last_layers:
        options.clip_skip = body.CLIP_stop_at_last_layers
    if body.live_previews_enable is not None:
        options.previews = body.live_previews_enable


@router.get("/progress", summary="How the picture that is being drawn stands")
async def progress(
    service: ServiceDep,
    user: User,
    skip_current_image: Annotated[bool, Query(description="Leave the preview out.")] = False,
) -> dict[str, Any]:
    """One's own job that runs now; idle is progress 0 and job_count 0. The preview is there if `live_previews_enable` is."""
    view = await _running(service, user)
    step, steps, count = (
        (view.progress.step, view.progress.steps, view.job.spec.iterations) if view else (0, 0, 0)
    )
    steps_each = steps // count if count else 0
    number = min(step // steps_each, count - 1) if steps_each else 0
    preview = None if skip_current_image or view is None else view.progress.preview
    return {
        "progress": round(step / steps, 4) if steps else 0.0,
        "eta_relative": (view.eta_s or 0.0) if view else 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": view.job.id if view else "",
            "job_count": count,
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(view.job.created_at))
            if view
            else "0",
            "job_no": number,
            "sampling_step": step - number * steps_each,
            "sampling_steps": steps_each,
        },
        "current_image": await _preview(service, preview) if preview else None,
        "textinfo": None,
    }


@router.post("/interrupt", summary="Stop the picture that is being drawn")
@router.post("/skip", summary="Stop the picture that is being drawn")
async def interrupt(service: ServiceDep, user: User) -> dict[str, Any]:
    """Stops one's own job that runs now, with all of its iterations; those that wait stay."""
    view = await _running(service, user)
    if view:
        await service.job_queue.cancel(view.job.id)
    return {}


@router.post("/png-info", summary="The settings inside a picture")
def png_info(body: Picture) -> dict[str, Any]:
    """`info` is the text, `parameters` its parts."""
    try:
        data = base64.b64decode(body.image.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("not base64.", field="image") from None
    text = codecs.read_settings(data)[1] or ""
    items = {"parameters": text} if text else {}
    return {
        "info": text,
        "items": items,
        "parameters": infotext.read_parameters(text) if text else {},
    }


async def _running(service: Service, user: str) -> JobView | None:
    """The user's job that runs longest."""
    views = await service.job_queue.list(owner=user, state=JobState.RUNNING)
    return min(views, key=lambda view: view.job.started_at or 0.0, default=None)


async def _preview(service: Service, key: str) -> str | None:
    data = await read_preview(service, key)
    if data is None:
        return None
    png = await asyncio.to_thread(lambda: codecs.encode(codecs.decode(data)[0]))
    return base64.b64encode(png).decode()
