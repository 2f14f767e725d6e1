"""Jobs of one's own, `/alpha/v1/jobs`: submit, look, list, cancel, and follow as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from alphalayer.api.deps import (
    IdempotencyKey,
    PendingJob,
    Service,
    ServiceDep,
    User,
    base_url,
    file_url,
    follow,
    submit_job,
    wire_names,
)
from alphalayer.api.errors import PROBLEMS, Problem
from alphalayer.api.native import FIELDS, ImageAnswer, Txt2ImgRequest, add_data, image_answers
from alphalayer.core.errors import (
    AlphalayerError,
    FileMissing,
    InvalidRequest,
    JobMissing,
    Stopping,
)
from alphalayer.core.job import Delivery, JobState, Submission, Webhook
from alphalayer.jobs.base import JobView

router = APIRouter(prefix="/alpha/v1/jobs", tags=["Jobs"], responses=PROBLEMS)


JobId = Annotated[str, Path(description="The id of a job, as it was given.")]


class ListQuery(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    state: Annotated[JobState | None, Field(description="Only jobs that stand there.")] = None
    limit: Annotated[int, Field(ge=1, le=200, description="Jobs of a page at most.")] = 50
    before: Annotated[
        float | None,
        Field(
            allow_inf_nan=False, description="Only jobs created before this time, in Unix seconds."
        ),
    ] = None


class JobRequest(Txt2ImgRequest):
    """The body of `POST /alpha/v1/jobs`: the fields of txt2img, and what is wanted while it runs."""

    previews: Annotated[bool, Field(description="Draw a small preview at every step.")] = False
    webhook_url: (
        Annotated[
            str,
            Field(max_length=2000, description="Gets this job's JSON, signed, when it is over."),
        ]
        | None
    ) = None

    def webhook(self, service: Service, base: str) -> Webhook | None:
        """Whom to tell. Raises `InvalidRequest`."""
        if self.webhook_url is None:
            return None
        if service.check_webhook is None:
            raise InvalidRequest(
                "webhooks are off.", hint="The service needs a webhook_secret.", field="webhook_url"
            )
        service.check_webhook(self.webhook_url)
        return Webhook(url=self.webhook_url, service_url=base)


class JobAnswer(BaseModel):
    """How a job stands."""

    id: Annotated[str, Field(description="Of this job alone.")]
    state: Annotated[JobState, Field(description="Where it stands.")]
    position: Annotated[int, Field(description="Place in the queue; 1 is next, 0 is not in it.")]
    stage: Annotated[
        str,
        Field(
            description="waiting, start, load, text, sample, vae, decode, store, or the state once it is over."
        ),
    ]
    step: Annotated[int, Field(description="The last step done.")]
    steps: Annotated[
        int, Field(description="Steps in all, over all iterations; 0 before they are known.")
    ]
    eta_s: Annotated[float | None, Field(description="Seconds left, where that can be said.")] = (
        None
    )
    preview_url: Annotated[
        str | None,
        Field(description="A small picture of how it stands, where previews were asked for."),
    ] = None
    created_at: Annotated[float, Field(description="Unix seconds, as all times.")]
    started_at: Annotated[float | None, Field(description="When an engine began with it.")] = None
    finished_at: Annotated[float | None, Field(description="When it was over.")] = None
    images: Annotated[list[ImageAnswer], Field(description="The pictures, once it is done.")] = []
    error: Annotated[Problem | None, Field(description="What went wrong.")] = None
    url: Annotated[str, Field(description="Ask here how it stands.")]
    events_url: Annotated[str, Field(description="Follow it here.")]


class JobList(BaseModel):
    """Jobs, newest first. `next_before` is the `before` of the next page."""

    jobs: Annotated[list[JobAnswer], Field(description="Newest first.")]
    next_before: Annotated[
        float | None,
        Field(description="The `before` of the next page; null where this one is not full."),
    ] = None


@router.post("", status_code=202, summary="Submit a job")
async def submit(
    body: JobRequest,
    request: Request,
    response: Response,
    service: ServiceDep,
    user: User,
    idempotency_key: IdempotencyKey = None,
) -> JobAnswer:
    """Answers at once. The job is kept whatever happens to the client or the service."""
    delivery = Delivery(webhook=body.webhook(service, base_url(request)), with_data=body.with_data)
    submission = Submission(owner=user, idempotency_key=idempotency_key, digest=body.digest)
    with wire_names(FIELDS):
        spec = body.to_spec(service.noise, service.decode).model_copy(
            update={"previews": body.previews}
        )
        job = await submit_job(service, spec, submission, delivery)
    shown = answer(await _view(service, job.id, user), base_url(request))
    response.headers["Location"] = shown.url
    return shown


@router.get("/{job_id}", summary="How a job stands")
async def show(job_id: JobId, request: Request, service: ServiceDep, user: User) -> JobAnswer:
    """Position, step, time left, and in the end the pictures (as base64, too, where the job asked for that) or the error."""
    view = await _view(service, job_id, user)
    shown = answer(view, base_url(request))
    if view.job.delivery.with_data:
        # pictures may be removed before their job is forgotten
        with suppress(FileMissing):
            await add_data(shown.images, service)
    return shown


@router.get("", summary="List jobs")
async def listing(
    request: Request,
    service: ServiceDep,
    user: User,
    query: Annotated[ListQuery, Query()],
) -> JobList:
    """One's own jobs, newest first."""
    views = await service.job_queue.list(owner=user, **query.model_dump())
    more = views[-1].job.created_at if len(views) == query.limit else None
    return JobList(jobs=[answer(view, base_url(request)) for view in views], next_before=more)


@router.delete("/{job_id}", summary="Cancel a job")
async def cancel(
    job_id: JobId,
    request: Request,
    service: ServiceDep,
    user: User,
    leave: Annotated[
        bool,
        Query(
            description="Only take one's own request back: the job goes on if another one came with its key."
        ),
    ] = False,
) -> JobAnswer:
    """Stops this job and no other: within a step if it runs, and with the others of its batch if it is drawn with some. One that is over
    stays as it is."""
    await _view(service, job_id, user)
    if leave:
        await PendingJob(service, job_id).withdraw()
    else:
        await service.job_queue.cancel(job_id)
    return answer(await _view(service, job_id, user), base_url(request))


async def own_job(job_id: JobId, service: ServiceDep, user: User) -> JobView:
    """A dependency, so that the answer is 404 before a stream has begun."""
    return await _view(service, job_id, user)


@router.get(
    "/{job_id}/events",
    summary="Follow a job",
    response_class=EventSourceResponse,
    dependencies=[Depends(own_job)],
)
async def events(
    job_id: JobId, request: Request, service: ServiceDep
) -> AsyncIterator[ServerSentEvent]:
    """An event at every change, named after the state; the last one is `done`, `failed` or `cancelled`."""
    # a service that ends ends the stream; the client opens it again
    with suppress(Stopping):
        async for view in follow(service, job_id):
            shown = answer(view, base_url(request))
            yield ServerSentEvent(data=shown.model_dump(mode="json"), event=view.job.state.value)


async def _view(service: Service, job_id: str, user: str) -> JobView:
    """The job, if it is the user's. Raises `JobMissing`."""
    view = await service.job_queue.view(job_id)
    if view is None or view.job.owner != user:
        raise JobMissing(f'there is no job "{job_id[:100]}".', hint="Use the id as it was given.")
    return view


def answer(view: JobView, base: str) -> JobAnswer:
    """The JSON of a job, for a client that knows the service as `base`."""
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
        preview_url=file_url(base, progress.preview)
        if progress.preview and not job.state.is_final
        else None,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        images=image_answers(job, base),
        error=_problem(job.error),
        url=url,
        events_url=f"{url}/events",
    )


def _problem(error: dict[str, Any] | None) -> Problem | None:
    if error is None:
        return None
    return Problem.of(
        AlphalayerError.from_dict({**error, "field": FIELDS.get(error["field"], error["field"])})
    )
