"""Vocabulary of jobs: specification, delivery, state and result. Free of torch and HTTP."""

from __future__ import annotations

import math
import re
import secrets
import time
from enum import Enum
from typing import Annotated, Any, get_args

from pydantic import Field

from alphalayer.core.cost import extras_cost, image_cost, inputs_cost
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.modes import MODES, ConditionRole, LayerRole
from alphalayer.core.request import (
    LAYER_PROMPTS,
    PROMPTS,
    GenerationRequest,
    ImageFormat,
    ImageInput,
    ImageSeed,
    LayerdiffuseStopAt,
    ModelDefaults,
    ModeName,
    ResolvedRequest,
)
from alphalayer.core.validation import COLOUR
from alphalayer.core.values import Frozen

MAX_ITERATIONS = 16
MAX_LAYERS = 256
"""Most layers of a job, whose number has two digits in the name of a file."""
HALF_DIGEST = 32
"""Length of each half of a digest."""
PREVIEW_PREFIX = "preview_"
_SUFFIXES = (*get_args(ImageFormat), "jpeg")
"""Suffixes of stored images. OpenAI's dialect also stores JPEG files."""
_STORED_NAME = re.compile(
    r"(?:alpha_[0-9]{1,20}_([0-9a-f]{10})[0-9a-f]{2}"
    rf"|{PREVIEW_PREFIX}([0-9a-f]{{10}})[0-9a-f]{{14}})\.(?:{'|'.join(_SUFFIXES)})"
)
_ID = re.compile("[0-9a-f]{24}")


class Postprocessing(Frozen, frozen=True):
    """Changes to finished images, in this order: defringe, trim, composite."""

    defringe: Annotated[
        bool, Field(description="Remove the old background's colour from soft edges.")
    ] = False
    trim: Annotated[bool, Field(description="Cut empty borders away.")] = False
    trim_threshold: Annotated[
        int, Field(ge=0, le=254, description="Highest alpha that counts as empty.")
    ] = 0
    trim_padding: Annotated[
        int, Field(ge=0, le=1024, description="Pixels left around the object.")
    ] = 0
    background: (
        Annotated[
            str, Field(pattern=COLOUR, description="Colour behind the image, which becomes opaque.")
        ]
        | None
    ) = None


class Output(Postprocessing, frozen=True):
    """How finished images become files: postprocessing and encoding."""

    format: Annotated[ImageFormat, Field(description="All three have alpha.")] = "png"


Iterations = Annotated[
    int, Field(ge=1, le=MAX_ITERATIONS, description="Batches generated in turn.")
]
Previews = Annotated[bool, Field(description="Generate a small preview at every step.")]


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
    """Digest of the client's request, without what the service adds; see `check_repeated`."""
    traceparent: str | None = None
    """W3C trace context of the request."""


class Stage(Frozen, frozen=True):
    """A request that follows in a chain. Layers of the stages before are its input images.

    What it does not name is as in the job's first request. It has no second pass.
    """

    mode: ModeName
    prompt: str
    sampler: str | None = None
    scheduler: str | None = None
    layerdiffuse_stop_at: LayerdiffuseStopAt = 1.0

    def request(self, first: GenerationRequest) -> GenerationRequest:
        """Return its request for one set of layers, in a chain that begins with `first`."""
        mode = MODES[self.mode]
        uploaded = {image.role: image for image in first.inputs}
        values = {
            "mode": self.mode,
            "prompt": self.prompt,
            "sampler": self.sampler or first.sampler,
            "scheduler": self.scheduler or first.scheduler,
            "layerdiffuse_stop_at": self.layerdiffuse_stop_at,
            "batch_size": len(mode.layers),
            "inputs": tuple(uploaded.get(role) or _layer_input(role) for role in mode.needs),
            **{"hires_scale": 1.0, "hires_width": 0, "hires_height": 0},
        }
        return first.model_copy(update=values)


def _layer_input(role: ConditionRole) -> ImageInput:
    """Return a layer of one stage as the input image of another.

    It is not in the storage.
    """
    return ImageInput.model_construct(role=role, file_name="")


class JobSpec(Frozen, frozen=True):
    """What a worker needs: the request, its iterations, their seeds, and the output."""

    generation: GenerationRequest
    stages: Annotated[tuple[Stage, ...], Field(max_length=2)] = ()
    """Requests that follow, in their order."""
    stores_layers: bool = False
    """Whether input layers and the composite are stored, too."""
    iterations: Iterations = 1
    output: Output = Output()
    previews: Previews = False
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
    def requests(self) -> tuple[GenerationRequest, ...]:
        """Return the request of each stage."""
        return self.generation, *(stage.request(self.generation) for stage in self.stages)

    @property
    def sets(self) -> int:
        """Return the number of sets of layers of an iteration."""
        return self.generation.batch_size // len(MODES[self.generation.mode].layers)

    @property
    def pixels(self) -> int:
        """Return the pixels of one batch, at its largest. Open sides count as SDXL's."""
        request = self.generation
        largest = max(math.prod(request.largest_size), request.result_pixels)
        return largest * request.batch_size

    def check_pixels(self, limit: int) -> None:
        """Raise `InvalidRequest` for more than `limit` pixels in all; 0 means no limit.

        The error names the first field to reduce.
        """
        pixels = self.pixels * self.iterations * len(self.requests)
        if not limit or pixels <= limit:
            return
        counts = {"iterations": self.iterations, "batch_size": self.sets}
        raise InvalidRequest(
            f"the request has {pixels:,} pixels in all; at most {limit:,}.",
            hint="Request fewer or smaller images.",
            field=_first_above_one(counts) or self.generation.size_field,
        )

    @property
    def cost(self) -> float:
        """Return the cost of all stages in megapixel-steps, see `alphalayer.core.cost`."""
        first, *later = self.requests
        images = first.batch_size * image_cost(first).total + inputs_cost(first)
        for one in later:
            images += self.sets * (one.batch_size * image_cost(one).total + inputs_cost(one))
        previews = self.iterations if self.previews else 0
        extras = sum(extras_cost(one, previews) for one in self.requests)
        return round(self.iterations * images + extras, 4)

    def check_cost(self, limit: float) -> None:
        """Raise `InvalidRequest` for a cost above `limit`; 0 means no limit.

        The error names the first field to reduce.
        """
        if not limit or self.cost <= limit:
            return
        request, image = self.generation, image_cost(self.generation)
        steps = {"steps": request.steps or 1}
        if request.uses_hires and request.hires_steps > (request.steps or ModelDefaults().steps):
            steps = {"hires_steps": request.hires_steps}
        counts = {"iterations": self.iterations, "batch_size": self.sets, **steps}
        if image.prompt > image.pixels:
            prompts = (*PROMPTS, *LAYER_PROMPTS)
            counts = {max(prompts, key=lambda name: len(getattr(request, name))): 2}
        raise InvalidRequest(
            f"the request costs {self.cost:,.0f} megapixel-steps; at most {limit:,.0f}.",
            hint="Request fewer or smaller images, fewer steps, or a shorter prompt.",
            field=_first_above_one(counts) or request.size_field,
        )


class JobState(str, Enum):
    """State of a job; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Return whether the job is over."""
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
    is_opaque: bool | None = None
    """Whether every pixel is opaque. Known of the layers of a chain."""


class JobResult(Frozen, frozen=True):
    """The images of a job, the model that generated them, and the seconds of each stage."""

    images: tuple[ImageRef, ...]
    settings: ModelDefaults
    """Values of the request's open fields, as they were used."""
    model_name: str
    model_hash: str
    seconds: dict[str, float] = Field(default_factory=dict[str, float])
    warnings: tuple[str, ...] = ()
    """What was ignored of the request or of its files, one sentence each."""


class JobProgress(Frozen, frozen=True):
    """Progress of a running job, in steps over all its iterations.

    `preview` is the storage key of a small image.
    """

    stage: str = "start"
    step: int = 0
    steps: int = 0
    preview: str | None = None

    def following(self, before: JobProgress) -> JobProgress:
        """Return this progress; without steps of its own it keeps those of `before`."""
        return self if self.steps else before.model_copy(update={"stage": self.stage})


def new_id() -> str:
    """Return a job id that cannot be guessed."""
    return secrets.token_hex(12)


def is_job_id(text: str) -> bool:
    """Return whether a text has the form of a job's id."""
    return _ID.fullmatch(text) is not None


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
        """Create a job. Its seeds are expanded here, the same for every run."""
        return cls.model_construct(
            id=job_id or new_id(),
            spec=spec.with_seeds(),
            submission=submission,
            delivery=delivery,
            created_at=time.time(),
        )

    @property
    def owner(self) -> str:
        """Return the name of the client that submitted it; "" without authentication."""
        return self.submission.owner

    @property
    def request(self) -> ResolvedRequest:
        """Return the request as it was generated. Only of a job that is done."""
        assert self.result is not None, self.id
        return self.spec.generation.resolve(self.result.settings, self.spec.seeds)

    def request_of(self, image: ImageRef) -> ResolvedRequest | None:
        """Return the request that generated an image. None: it was given, or composited.

        Only of a job that is done.
        """
        assert self.result is not None, self.id
        if not self.spec.stores_layers:
            return self.request
        for one in self.spec.requests:
            if image.role in MODES[one.mode].layer_roles:
                return one.resolve(self.result.settings)
        return None

    def with_key(self, idempotency_key: str | None) -> Job:
        """Return the job with another idempotency key."""
        submission = self.submission.model_copy(update={"idempotency_key": idempotency_key})
        return self.model_copy(update={"submission": submission})

    def check_repeated(self, new: Job) -> Job:
        """Return this job if `new`, of the same idempotency key, is the same request.

        A digest has two halves. The request is the same if one of them is equal: the JSON as
        sent, whatever this version adds, or the fields, whatever form they were sent in.
        Earlier versions stored a digest of the fields alone.

        Raises:
            InvalidRequest: It is another request.
        """
        stored, digest = self.submission.digest, new.submission.digest
        if stored is not None and not _halves(stored) & _halves(digest or ""):
            raise InvalidRequest(
                "this key came with another request before.",
                hint="Give each request its own key. Repeat a request unchanged with the same key.",
                field="Idempotency-Key",
            )
        return self

    @property
    def batch_key(self) -> str | None:
        """Return a key that is equal for jobs that may be generated together.

        None: the job is generated alone. It has several iterations or stages, or ended an engine
        before.
        """
        is_alone = self.spec.iterations > 1 or self.spec.stages or self.starts
        return None if is_alone else self.spec.generation.batch_key

    @property
    def preview_name(self) -> str:
        """Return the name of its preview, which is overwritten at every step."""
        return f"{PREVIEW_PREFIX}{self.id}.webp"

    def file_name(self, index: int) -> str:
        """Return the name of image `index`, the same in every run of the job."""
        return f"alpha_{int(self.created_at)}_{self.id[:10]}{index:02x}.{self.spec.output.format}"


def _first_above_one(counts: dict[str, int]) -> str | None:
    return next((name for name, count in counts.items() if count > 1), None)


def _halves(digest: str) -> set[str]:
    return {digest[:HALF_DIGEST], digest[HALF_DIGEST:]} - {""}


def job_prefix_of(name: str) -> str | None:
    """Return the first ten digits of the id of a file's job; None without a job."""
    match = _STORED_NAME.fullmatch(name)
    return match and (match[1] or match[2])
