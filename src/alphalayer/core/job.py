"""A job: what was asked for, how it stands, what came of it. The vocabulary of queue, worker and API; free of torch and HTTP."""

from __future__ import annotations

import re
import secrets
import time
from enum import Enum
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.modes import LayerRole
from alphalayer.core.request import (
    Frozen,
    GenerationRequest,
    ImageFormat,
    ImageSeed,
    ModelDefaults,
    ResolvedRequest,
)
from alphalayer.core.validation import COLOUR

MAX_ITERATIONS = 16
PREVIEW_PREFIX = "preview_"
_MADE_NAME = re.compile(
    rf"(?:alpha_\d+_([0-9a-f]{{10}})[0-9a-f]{{2}}|{PREVIEW_PREFIX}([0-9a-f]{{10}})[0-9a-f]{{14}})\.\w+"
)


class Output(Frozen, frozen=True):
    """What is done to the finished pictures, in this order: defringe, trim, composite, encode."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    format: ImageFormat = "png"
    """All three have alpha."""
    defringe: bool = False
    """Take the old background's colour out of soft edges."""
    trim: bool = False
    """Cut empty borders away."""
    trim_threshold: Annotated[int, Field(ge=0, le=254)] = 0
    """Alpha up to this counts as empty."""
    trim_padding: Annotated[int, Field(ge=0, le=1024)] = 0
    """Pixels left around what is not empty."""
    background: Annotated[str, Field(pattern=COLOUR)] | None = None
    """A colour to lay the picture on; the result is opaque."""


class Webhook(Frozen, frozen=True):
    """Receiver of a job's outcome, and the service's address as the client knows it."""

    url: Annotated[str, Field(max_length=2000)]
    service_url: str


class Delivery(Frozen, frozen=True):
    """How the outcome reaches the client. Workers do not need it."""

    webhook: Webhook | None = None
    with_data: bool = False
    """Whether the answer holds the images themselves."""


class Submission(Frozen, frozen=True):
    """Where a job came from."""

    owner: str = ""
    idempotency_key: str | None = None
    digest: str | None = None
    """SHA-256 of the client's request as sent, without what the service adds."""
    traceparent: str | None = None
    """W3C trace context of the request."""


class JobSpec(Frozen, frozen=True):
    """What a worker needs: the request, its iterations, their seeds, and the output."""

    generation: GenerationRequest
    iterations: Annotated[
        int, Field(ge=1, le=MAX_ITERATIONS, description="Batches generated in turn.")
    ] = 1
    output: Output = Output()
    previews: Annotated[bool, Field(description="Generate a small preview at every step.")] = False
    seeds: tuple[ImageSeed, ...] = ()
    """Seeds of all images; filled once, at submission."""

    def with_seeds(self) -> JobSpec:
        """Replace random seeds by numbers and expand them to one pair an image."""
        generation = self.generation.with_seeds()
        return self.model_copy(
            update={"generation": generation, "seeds": generation.image_seeds(self.iterations)}
        )

    def batches(self) -> list[tuple[ImageSeed, ...]]:
        """Return the seeds of each iteration."""
        size = self.generation.batch_size
        return [self.seeds[i : i + size] for i in range(0, len(self.seeds), size)]

    @property
    def pixels(self) -> int:
        """How much is drawn at once, in pixels; a side that is left to the model counts as SDXL's."""
        side = ModelDefaults()
        wanted = self.generation
        return (wanted.width or side.width) * (wanted.height or side.height) * wanted.batch_size

    def check_pixels(self, most: int) -> None:
        """Raise `InvalidRequest` if all rounds together are more than `most` pixels (0: no limit), naming the first thing to make less."""
        wanted = self.pixels * self.iterations
        if not most or wanted <= most:
            return
        fields = {"iterations": self.iterations, "batch_size": self.generation.batch_size}
        raise InvalidRequest(
            f"{wanted:,} pixels in all are asked for, and one request may have {most:,}.",
            hint="Ask for fewer or smaller pictures.",
            field=next((name for name, count in fields.items() if count > 1), "width"),
        )


class JobState(str, Enum):
    """Where a job stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing will change any more."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class ImageRef(Frozen, frozen=True):
    """A stored image: its storage key, its role, and what is known without opening it."""

    key: str
    seed: int
    subseed: int
    width: int
    height: int
    size_bytes: int
    role: LayerRole = "image"


class JobResult(Frozen, frozen=True):
    """The images of a job, the model that generated them, and the seconds of each stage."""

    images: tuple[ImageRef, ...]
    settings: ModelDefaults
    """Values of the request's open fields, as they were used."""
    model_name: str
    model_hash: str
    seconds: dict[str, float] = Field(default_factory=dict[str, float])


class JobProgress(Frozen, frozen=True):
    """How far a running job is, in steps over all its iterations. `preview` is the storage key of a small picture."""

    stage: str = "start"
    step: int = 0
    steps: int = 0
    preview: str | None = None

    def following(self, before: JobProgress) -> JobProgress:
        """A stage without steps of its own stands where the one before it ended."""
        return self if self.steps else before.model_copy(update={"stage": self.stage})


def new_id() -> str:
    """An id for a job, which cannot be guessed."""
    return secrets.token_hex(12)


class Job(Frozen, frozen=True):
    """One job of the journal. Times are Unix seconds."""

    id: str
    spec: JobSpec
    submission: Submission = Submission()
    delivery: Delivery = Delivery()
    state: JobState = JobState.QUEUED
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    starts: int = 0
    cancel_asked: bool = False
    """Whether a client asked to stop it while it ran."""
    result: JobResult | None = None
    error: dict[str, Any] | None = None

    @classmethod
    def new(
        cls,
        spec: JobSpec,
        submission: Submission = Submission(),
        delivery: Delivery = Delivery(),
        job_id: str | None = None,
    ) -> Job:
        """Create a job. Seeds are expanded here, so that every run generates the same images."""
        return cls.model_construct(
            id=job_id or new_id(),
            spec=spec.with_seeds(),
            submission=submission,
            delivery=delivery,
            created_at=time.time(),
        )

    @property
    def owner(self) -> str:
        """Name of the client that submitted it; "" without authentication."""
        return self.submission.owner

    @property
    def request(self) -> ResolvedRequest:
        """The request as it was generated. Only of a job that is done."""
        assert self.result is not None, self.id
        return self.spec.generation.resolve(self.result.settings, self.spec.seeds)

    def with_key(self, idempotency_key: str | None) -> Job:
        """Return the job with another idempotency key."""
        submission = self.submission.model_copy(update={"idempotency_key": idempotency_key})
        return self.model_copy(update={"submission": submission})

    def check_repeated(self, new: Job) -> Job:
        """Return this job if `new`, which came with its idempotency key, is the same request.

        Raises:
            InvalidRequest: it is another request.
        """
        if self.submission.digest not in (None, new.submission.digest):
            raise InvalidRequest(
                "this key came with another request before.",
                hint="Give each request a key of its own, and send it again unchanged with the same key.",
                field="Idempotency-Key",
            )
        return self

    @property
    def batch_key(self) -> str | None:
        """Jobs of one key may be drawn together. None: alone, as several rounds are asked for, or as it took an engine down before."""
        return (
            self.spec.generation.batch_key
            if self.spec.iterations == 1 and self.starts == 0
            else None
        )

    @property
    def preview_name(self) -> str:
        """The name of its preview, written over at every step."""
        return f"{PREVIEW_PREFIX}{self.id}.webp"

    def file_name(self, index: int) -> str:
        """The name of its picture number `index`: the same each time the job is run; what a first run stored stays."""
        return f"alpha_{int(self.created_at)}_{self.id[:10]}{index:02x}.{self.spec.output.format}"


def job_prefix_of(name: str) -> str | None:
    """The first ten digits of the id of the job that a file was made for, by its name; None for files that no job made."""
    made = _MADE_NAME.fullmatch(name)
    return made and (made[1] or made[2])
