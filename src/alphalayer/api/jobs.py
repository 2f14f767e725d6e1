"""Jobs API, `/alpha/v1/jobs`: submit, show, list, cancel, and follow as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from alphalayer.api.deps import (
    IdempotencyKey,
    PendingJob,
    Service,
    ServiceDep,
    base_url,
    follow,
    submit_job,
    wire_names,
)
from alphalayer.api.dialect import Dialect
from alphalayer.api.embedded_files import EmbeddedFiles
from alphalayer.api.errors import PROBLEMS, Problem
from alphalayer.api.file_urls import UrlSigner, file_url
from alphalayer.api.guard import Generator, GuardedRoute, Reader, Submitter
from alphalayer.api.native.answers import (
    Documents,
    ImageAnswer,
    add_data,
    image_answers,
    layer_sets,
)
from alphalayer.api.native.fields import FIELDS, describe_form, prepare_job
from alphalayer.api.native.img2img import Img2ImgRequest
from alphalayer.api.native.layers import LAYER_FIELDS, LayersRequest
from alphalayer.api.native.txt2img import Txt2ImgRequest
from alphalayer.api.schemas import StageSeconds
from alphalayer.core.errors import (
    AlphalayerError,
    FileMissing,
    InvalidRequest,
    JobMissing,
    Stopping,
)
from alphalayer.core.job import Delivery, Job, JobState, Previews, Webhook, is_job_id
from alphalayer.core.values import Frozen
from alphalayer.jobs.base import JobView
from alphalayer.observability.logging import log

router = APIRouter(
    prefix="/alpha/v1/jobs", tags=["Jobs"], responses=PROBLEMS, route_class=GuardedRoute
)
DIALECT = Dialect(router.prefix, router, field_names=FIELDS)
JobId = Annotated[str, Path(description="Id of the job.")]


class ListQuery(BaseModel):
    """Query of the list of jobs."""

    model_config = ConfigDict(extra="forbid")

    state: Annotated[JobState | None, Field(description="Only jobs in this state.")] = None
    limit: Annotated[int, Field(ge=1, le=200, description="Largest number of jobs of a page.")] = 50
    before: Annotated[
        float | None,
        Field(
            allow_inf_nan=False, description="Only jobs created before this time, in Unix seconds."
        ),
    ] = None


class JobFields(Frozen, frozen=True):
    """Fields of all jobs besides those of their requests."""

    previews: Previews = False
    webhook_url: (
        Annotated[
            str,
            Field(max_length=2000, description="Receives the signed JSON of the finished job."),
        ]
        | None
    ) = None

    def webhook(self, service: Service, base: str) -> Webhook | None:
        """Return the webhook to call, if any.

        Raises:
            InvalidRequest: webhooks are off, or the address is not allowed.
        """
        if self.webhook_url is None:
            return None
        if service.check_webhook is None:
            raise InvalidRequest(
                "webhooks are off.", hint="The service needs a webhook_secret.", field="webhook_url"
            )
        service.check_webhook(self.webhook_url)
        return Webhook(url=self.webhook_url, service_url=base)


class JobRequest(JobFields, Txt2ImgRequest, frozen=True):
    """Body of `POST /alpha/v1/jobs`: the fields of txt2img, previews and a webhook."""


class Img2ImgJobRequest(JobFields, Img2ImgRequest, frozen=True):
    """Body of `POST /alpha/v1/jobs/img2img`: the fields of img2img, previews and a webhook."""


class LayersJobRequest(JobFields, LayersRequest, frozen=True):
    """Body of `POST /alpha/v1/jobs/layers`: the fields of layers, previews and a webhook."""


class JobAnswer(BaseModel):
    """Job with its state, progress and result."""

    id: Annotated[str, Field(description="Id of the job.")]
    state: Annotated[JobState, Field(description="State of the job.")]
    position: Annotated[
        int, Field(description="Position in the queue: 1 is next, 0 is not queued.")
    ]
    stage: Annotated[
        str,
        Field(
            description="waiting, start, load, text, sample, upscale, vae, decode, store, or final "
            "state."
        ),
    ]
    step: Annotated[int, Field(description="Last finished step.")]
    steps: Annotated[int, Field(description="Steps of all iterations; 0 before they are known.")]
    eta_s: Annotated[
        float | None, Field(description="Estimated seconds until it has finished, if known.")
    ] = None
    preview_url: Annotated[
        str | None,
        Field(description="URL of the newest preview, if previews were requested."),
    ] = None
    created_at: Annotated[float, Field(description="Time of submission in Unix seconds.")]
    started_at: Annotated[float | None, Field(description="Time of the start in Unix seconds.")] = (
        None
    )
    finished_at: Annotated[float | None, Field(description="Time of the end in Unix seconds.")] = (
        None
    )
    images: Annotated[list[ImageAnswer], Field(description="Images of a finished job.")] = []
    documents: Annotated[
        list[Documents],
        Field(description="Files with all layers of each set, of a finished job with layers."),
    ] = []
    seconds: StageSeconds = {}
    warnings: Annotated[
        list[str], Field(description="What of the request of a finished job was ignored.")
    ] = []
    error: Annotated[Problem | None, Field(description="Error of a failed job.")] = None
    url: Annotated[str, Field(description="URL of the job.")]
    events_url: Annotated[str, Field(description="URL of its events.")]


class JobList(BaseModel):
    """Page of jobs."""

    jobs: Annotated[list[JobAnswer], Field(description="Jobs, newest first.")]
    next_before: Annotated[
        float | None,
        Field(description="`before` of the next page; null on the last page."),
    ] = None


@router.post("", status_code=202, summary="Submit a job")
async def submit(
    body: JobRequest,
    request: Request,
    response: Response,
    service: ServiceDep,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
) -> JobAnswer:
    """Queue a job and return it at once.

    The job stays queued when the client disconnects or the service restarts.
    """
    return await _submit(body, request, response, service, user, idempotency_key)


@router.post(
    "/img2img",
    status_code=202,
    summary="Submit a change of an image",
    openapi_extra=describe_form("Img2ImgJobRequest", *Img2ImgRequest.image_fields),
)
async def submit_img2img(
    body: Img2ImgJobRequest,
    request: Request,
    response: Response,
    service: ServiceDep,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
) -> JobAnswer:
    """Queue a job that changes an image. The body is JSON or multipart/form-data."""
    return await _submit(body, request, response, service, user, idempotency_key)


@router.post(
    "/layers",
    status_code=202,
    summary="Submit layers",
    openapi_extra=describe_form("LayersJobRequest", *LayersRequest.image_fields),
)
async def submit_layers(
    body: LayersJobRequest,
    request: Request,
    response: Response,
    service: ServiceDep,
    user: Submitter,
    idempotency_key: IdempotencyKey = None,
) -> JobAnswer:
    """Queue a job that generates layers. The body is JSON or multipart/form-data."""
    return await _submit(body, request, response, service, user, idempotency_key)


async def _submit(
    body: JobRequest | Img2ImgJobRequest | LayersJobRequest,
    request: Request,
    response: Response,
    service: Service,
    user: str,
    idempotency_key: str | None,
) -> JobAnswer:
    """Queue the job of a body and return it."""
    delivery = Delivery(
        webhook=body.webhook(service, base_url(service, request)), with_data=body.with_data
    )
    with wire_names(body.wire_fields):
        spec, submission = await prepare_job(service, request, body, user, idempotency_key)
        spec = spec.model_copy(update={"previews": body.previews})
        job = await submit_job(service, spec, submission, delivery)
    job_answer = answer(
        await _view(service, job.id, user), base_url(service, request), service.url_signer
    )
    response.headers["Location"] = job_answer.url
    return job_answer


@router.get("/{job_id}", response_model=JobAnswer, summary="Show a job")
async def show(job_id: JobId, request: Request, service: ServiceDep, user: Reader) -> Response:
    """Return position, step, remaining time, and finally the images or the error.

    The images include their data if the job requested `response_format` base64.
    """
    view = await _view(service, job_id, user)
    job_answer = answer(view, base_url(service, request), service.url_signer)
    files = EmbeddedFiles()
    if view.job.delivery.with_data:
        # retention may remove images before their job
        with suppress(FileMissing):
            await add_data(job_answer.images, service, files)
    return files.respond(job_answer)


@router.get("", summary="List jobs")
async def listing(
    request: Request,
    service: ServiceDep,
    user: Reader,
    query: Annotated[ListQuery, Query()],
) -> JobList:
    """Return the jobs of the client, newest first."""
    views = await service.job_queue.list(owner=user, **query.model_dump())
    next_before = views[-1].job.created_at if len(views) == query.limit else None
    jobs = [answer(view, base_url(service, request), service.url_signer) for view in views]
    return JobList(jobs=jobs, next_before=next_before)


@router.delete("/{job_id}", summary="Cancel a job")
async def cancel(
    job_id: JobId,
    request: Request,
    service: ServiceDep,
    user: Generator,
    leave: Annotated[
        bool,
        Query(
            description="Only withdraw this request. "
            "The job continues if another request has the same Idempotency-Key."
        ),
    ] = False,
) -> JobAnswer:
    """Stop a job and return it.

    A running job stops within a step, or with its batch if other jobs are in it.
    A finished job is unchanged.
    """
    await _view(service, job_id, user)
    if leave:
        await PendingJob(service, job_id).withdraw()
    else:
        await service.job_queue.cancel(job_id)
        log.info("audit.job_cancelled", key=user, job=job_id)
    return answer(
        await _view(service, job_id, user), base_url(service, request), service.url_signer
    )


async def check_job(job_id: JobId, service: ServiceDep, user: Reader) -> None:
    """Check that the client has this job, before a stream starts with status 200.

    Raises:
        JobMissing: it has not.
    """
    await _view(service, job_id, user)


@router.get(
    "/{job_id}/events",
    summary="Follow a job",
    response_class=EventSourceResponse,
    dependencies=[Depends(check_job)],
)
async def events(
    job_id: JobId, request: Request, service: ServiceDep
) -> AsyncIterator[ServerSentEvent]:
    """Send an event at every change of the job, named after its state.

    The last event is `done`, `failed` or `cancelled`. Reconnect if the stream closes earlier: the
    first event has the current state.
    """
    # the shutdown closes the stream and the client reconnects
    with suppress(Stopping):
        async for view in follow(service, job_id):
            data = answer(view, base_url(service, request), service.url_signer).model_dump(
                mode="json"
            )
            yield ServerSentEvent(data=data, event=view.job.state.value)


async def _view(service: Service, job_id: str, user: str) -> JobView:
    """Return a job of the user.

    Raises:
        JobMissing: the user has no job with that id.
    """
    # no other text reaches the database, which cannot hold each character
    view = await service.job_queue.view(job_id) if is_job_id(job_id) else None
    if view is None or view.job.owner != user:
        raise JobMissing(f'there is no job "{job_id[:100]}".', hint="Use the id as it was given.")
    return view


def answer(view: JobView, base: str, signer: UrlSigner | None) -> JobAnswer:
    """Return the JSON of a job, for a client that uses the address `base`."""
    job, progress = view.job, view.progress
    url = f"{base}{router.prefix}/{job.id}"
    stage = "waiting" if view.position else progress.stage
    return JobAnswer(
        id=job.id,
        state=job.state,
        position=view.position,
        stage=job.state.value if job.state.is_final else stage,
        step=progress.step,
        steps=progress.steps,
        eta_s=view.eta_s,
        preview_url=file_url(base, progress.preview, signer)
        if progress.preview and not job.state.is_final
        else None,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        images=image_answers(job, base, signer),
        documents=[one.documents for one in layer_sets(job, base, signer)],
        seconds=job.result.seconds if job.result else {},
        warnings=list(job.result.warnings) if job.result else [],
        error=_problem(job),
        url=url,
        events_url=f"{url}/events",
    )


def _problem(job: Job) -> Problem | None:
    if job.error is None:
        return None
    names = LAYER_FIELDS if job.spec.stores_layers else FIELDS
    field = job.error["field"]
    return Problem.of(AlphalayerError.from_dict({**job.error, "field": names.get(field, field)}))
