"""Messages between a supervisor and its engine process.

One JSON object a line, over standard input and output of the process.
Each line is validated once, by the process that reads it.
The engine process ends when its input ends.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from alphalayer.core.errors import AlphalayerError, EngineFailed
from alphalayer.core.job import Job, JobProgress, JobResult
from alphalayer.core.validation import describe_validation_error
from alphalayer.core.values import Frozen

T = TypeVar("T")
MAX_LINE_BYTES = 16 * 1024 * 1024
"""Longest line without its end. Batches and accepted requests are limited to fit."""


class _ErrorFields(Frozen, frozen=True):
    """An error as JSON-ready data."""

    code: str
    message: str
    hint: str
    field: str | None


def _read_error(value: Any) -> AlphalayerError:
    if isinstance(value, AlphalayerError):
        return value
    return AlphalayerError.from_dict(_ErrorFields.model_validate(value).model_dump())


def _without_client(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json", include={"id", "created_at", "starts", "spec"})


AssignedJob = Annotated[Job, PlainSerializer(_without_client)]
"""A job without its submission and delivery, which an engine process does not receive."""
ErrorData = Annotated[
    AlphalayerError, PlainValidator(_read_error), PlainSerializer(AlphalayerError.to_dict)
]


class Open(Frozen, frozen=True):
    """First message to an engine process: its name, engine, storage and log settings."""

    kind: Literal["open"] = "open"
    name: str
    engine: str
    options: dict[str, Any]
    storage: str
    logs: dict[str, Any]


class Render(Frozen, frozen=True):
    """Jobs to generate together and to store. Sent ahead of time."""

    kind: Literal["render"] = "render"
    jobs: tuple[AssignedJob, ...]


class Cancel(Frozen, frozen=True):
    """A job to stop."""

    kind: Literal["cancel"] = "cancel"
    id: str


class Ready(Frozen, frozen=True):
    """The engine is loaded and warm."""

    kind: Literal["ready"] = "ready"
    batch_pixels: int
    """Number of pixels that the engine generates together; 0: each job alone."""
    device: str


class Stopped(Frozen, frozen=True):
    """The engine cannot start or continue, and its process ends."""

    kind: Literal["stopped"] = "stopped"
    error: ErrorData


class Started(Frozen, frozen=True):
    """The engine starts a job."""

    kind: Literal["started"] = "started"
    id: str


class ProgressReport(Frozen, frozen=True):
    """The progress of a job."""

    kind: Literal["progress"] = "progress"
    id: str
    progress: JobProgress


class Done(Frozen, frozen=True):
    """The images of a job are stored."""

    kind: Literal["done"] = "done"
    id: str
    result: JobResult
    memory_bytes: int


class Failed(Frozen, frozen=True):
    """A job has failed or was cancelled."""

    kind: Literal["failed"] = "failed"
    id: str
    error: ErrorData


class _JobId(BaseModel):
    id: str


class _UnreadableRender(BaseModel):
    """What is readable of a `Render` whose jobs are not valid."""

    jobs: list[_JobId]


Command = Render | Cancel
"""A message to the engine process, after `Open`."""
JobReport = Started | ProgressReport | Done | Failed
Report = Ready | Stopped | JobReport
"""A message from the engine process."""
_OPEN: TypeAdapter[Open] = TypeAdapter(Open)
_COMMAND: TypeAdapter[Command] = TypeAdapter(Annotated[Command, Field(discriminator="kind")])
_UNREADABLE = TypeAdapter(_UnreadableRender)
_REPORT: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")])


def write_message(message: Open | Command | Report) -> bytes:
    """Return a message as a line."""
    text = json.dumps(message.model_dump(mode="json"), ensure_ascii=False, separators=(",", ":"))
    # file names that are not Unicode may be part of an error
    return text.encode(errors="replace") + b"\n"


def is_too_long(line: bytes) -> bool:
    """Return whether the reader of a line would refuse it."""
    return len(line) > MAX_LINE_BYTES


def line_too_long(line: bytes) -> EngineFailed:
    """Return the error of a job whose message is too long."""
    return EngineFailed(
        f"a message about the job has {len(line):,} bytes; at most {MAX_LINE_BYTES:,}.",
        hint="Use shorter prompts or fewer images; please report it.",
    )


def write_report(report: Report) -> bytes:
    """Return a report as a line, or an error if the line would be too long."""
    line = write_message(report)
    if not is_too_long(line):
        return line
    error = line_too_long(line)
    is_of_job = isinstance(report, (Started, ProgressReport, Done, Failed))
    return write_message(Failed(id=report.id, error=error) if is_of_job else Stopped(error=error))


def read_open(line: bytes) -> Open:
    """Read the first message to an engine process. Raises `ValueError` if it is none."""
    return _read(_OPEN, line)


def read_command(line: bytes) -> Command:
    """Read a later message to an engine process. Raises `ValueError` if it is none."""
    return _read(_COMMAND, line)


def read_job_ids(line: bytes) -> list[str]:
    """Return the ids of the jobs in a line that is no message as a whole."""
    try:
        return [job.id for job in _UNREADABLE.validate_json(line).jobs]
    except ValidationError:
        return []


def read_report(line: bytes) -> Report:
    """Read a message from an engine process. Raises `ValueError` if it is none."""
    return _read(_REPORT, line)


def _read(messages: TypeAdapter[T], line: bytes) -> T:
    try:
        return messages.validate_json(line)
    except ValidationError as error:
        # its own text quotes the line, which may hold a prompt
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"not a message: {place}: {describe_validation_error(first)}") from None
