"""A job: what was asked for, how it stands, what came of it. The vocabulary of queue, worker and API; free of torch and HTTP."""

from __future__ import annotations

import re
import secrets
import time
from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import GenerationRequest, ImageFormat, ModelDefaults
from alphalayer.core.validation import COLOUR

MAX_ITERATIONS = 16
PREVIEW_PREFIX = "preview_"
_MADE_NAME = re.compile(
    rf"(?:alpha_\d+_([0-9a-f]{{10}})[0-9a-f]{{2}}|{PREVIEW_PREFIX}([0-9a-f]{{10}})[0-9a-f]{{14}})\.\w+"
)


class _Frozen(BaseModel):
    # errors go into logs, and what was put in holds prompts
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class Output(_Frozen):
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


class Webhook(_Frozen):
    """Whom to tell when a job is over, and under which address they know the service."""

    url: Annotated[str, Field(max_length=2000)]
    service_url: str


class JobSpec(_Frozen):
    """Everything a worker needs to know: the request, drawn `iterations` times with seeds counting up, and the output."""

    generation: GenerationRequest
    iterations: Annotated[int, Field(ge=1, le=MAX_ITERATIONS)] = 1
    output: Output = Output()
    previews: bool = False
    with_data: bool = False
    """Whether the answer is to hold the pictures themselves."""
    webhook: Webhook | None = None
    traceparent: str | None = None
    """The request that it came with, for traces."""
    request_digest: str | None = None
    """SHA-256 of what the client sent, without what the service adds: that may change before the same request comes again."""

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


class ImageRef(_Frozen):
    """A stored picture: its storage key, and what is known of it without opening it."""

    key: str
    seed: int
    subseed: int
    width: int
    height: int
    size_bytes: int
    parameters: str


class JobResult(_Frozen):
    """The pictures of a job, the request with nothing left open, and the seconds of each stage."""

    images: tuple[ImageRef, ...]
    generation: GenerationRequest
    model_name: str
    model_hash: str
    seconds: dict[str, float] = {}


class JobProgress(_Frozen):
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


class Job(_Frozen):
    """One job of the journal. Times are Unix seconds."""

    id: str
    spec: JobSpec
    state: JobState = JobState.QUEUED
    owner: str = ""
    idempotency_key: str | None = None
    digest: str | None = None
    """Of the request that the key came with."""
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    starts: int = 0
    cancel_asked: bool = False
    """Somebody wanted it to stop while it ran."""
    result: JobResult | None = None
    error: dict[str, Any] | None = None

    @classmethod
    def new(cls, spec: JobSpec, owner: str = "", idempotency_key: str | None = None, job_id: str | None = None) -> Job:
        """A fresh job. Its seeds are drawn here, so that a second run draws the same picture."""
        drawn = spec.model_copy(update={"generation": spec.generation.with_seeds()})
        return cls(
            id=job_id or new_id(),
            spec=drawn,
            owner=owner,
            idempotency_key=idempotency_key,
            digest=spec.request_digest if idempotency_key is not None else None,
            created_at=time.time(),
        )

    def repeated_by(self, new: Job) -> Job:
        """This job, where `new` came with its key and asks for the same. Raises `InvalidRequest` where it asks for something else."""
        if self.digest not in (None, new.digest):
            raise InvalidRequest(
                "this key came with another request before.",
                hint="Give each request a key of its own, and send it again unchanged with the same key.",
                field="Idempotency-Key",
            )
        return self

    @property
    def batch_key(self) -> str | None:
        """Jobs of one key may be drawn together. None: alone, as several rounds are asked for, or as it took an engine down before."""
        return self.spec.generation.batch_key if self.spec.iterations == 1 and self.starts == 0 else None

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
