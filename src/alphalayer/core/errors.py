"""Errors that the service answers with, independent of HTTP.

`alphalayer.client` adds `ServiceUnreachable`.

    AlphalayerError
    ├── InvalidRequest         a field of a request is wrong
    ├── ModelNotFound          no model has that name, or there is no model
    ├── ModelUnusable          a model file exists and cannot be used
    │   ├── CorruptFile        truncated, unreadable, or not what its name promises
    │   ├── UnsupportedFamily  a checkpoint of a family that this version cannot load
    │   └── PickleRefused      .ckpt and .pt files can run code when they are opened
    ├── LayerDiffuseMissing    the patch or the transparent decoder is missing
    ├── OutOfMemory            the request exceeds the device, even in the smallest mode
    ├── Cancelled              a client cancelled the job
    ├── QueueFull              the queue has reached its limit
    ├── Unauthorized           credentials are missing or wrong
    ├── HostUnknown            the service does not answer to that host name
    ├── OriginRefused          a web page of another origin may not change anything
    ├── NotImplementedYet      a route of a dialect that this version does not implement
    ├── RateLimited            a key exceeded its rate
    ├── Busy                   too many requests wait for work on images
    ├── Stopping               the service is shutting down
    ├── FileMissing            no image has that name
    ├── JobMissing             no job has that id
    ├── StorageFailed          disk full, folder read-only
    │   └── DatabaseAway       the shared database cannot be reached
    ├── EngineFailed           the engine process died, or failed in an unexpected way
    └── SetupFailed            the service cannot start as configured

Each error has a stable `code`, a `message` with the cause, and a `hint` with the next step.
Errors of requests also have the `field`. Errors cross processes as plain dictionaries.
"""

from __future__ import annotations

from typing import Any

PROGRAM = "alphalayer"
STARTED_BY = "ALPHALAYER_STARTED_BY"
"""Name of the variable in which run.py passes the command that started it, for hints."""


class CommandHint(str):
    """Hint that ends with a command of this program.

    As text it names the program `alphalayer`. A terminal shows it with `render`.

    Attributes:
        text: The hint up to the command.
        command: The command and its arguments, without the name of the program.
    """

    text: str
    command: str

    def __new__(cls, text: str, command: str) -> CommandHint:
        """Return the hint with its command."""
        hint = super().__new__(cls, f"{text} {PROGRAM} {command}")
        hint.text, hint.command = text, command
        return hint

    def render(self, program: str) -> str:
        """Return the hint for a user who starts the program as `program`."""
        return f"{self.text} {program} {self.command}"


class AlphalayerError(Exception):
    """Base of all errors meant for users."""

    code = "error"

    def __init__(self, message: str, *, hint: str = "", field: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field

    def __str__(self) -> str:
        return f"{self.describe()} {self.hint}".rstrip()

    def describe(self) -> str:
        """Return the message with the field's name, without the hint."""
        return f"{self.field}: {self.message}" if self.field else self.message

    def to_dict(self) -> dict[str, Any]:
        """Return the error as JSON-ready data, the inverse of `from_dict`."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "field": self.field}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> AlphalayerError:
        """Return the error that `to_dict` described.

        An unknown code gives the base class with that code.
        """
        kind = next(
            (kind for kind in _subclasses(AlphalayerError) if kind.code == data.get("code")),
            AlphalayerError,
        )
        error = kind(data["message"], hint=data.get("hint", ""), field=data.get("field"))
        error.code = data.get("code", kind.code)
        return error


def _subclasses(kind: type[AlphalayerError]) -> list[type[AlphalayerError]]:
    return [
        subclass for child in kind.__subclasses__() for subclass in (child, *_subclasses(child))
    ]


class InvalidRequest(AlphalayerError):
    """Wrong value of the request field that `field` names."""

    code = "invalid_request"


class ModelNotFound(AlphalayerError):
    """Name of a model that the models folder does not hold."""

    code = "model_not_found"


class ModelUnusable(AlphalayerError):
    """Model file that exists and cannot be used."""

    code = "model_unusable"


class CorruptFile(ModelUnusable):
    """Model file that is truncated, unreadable or not what its name promises."""

    code = "corrupt_file"


class UnsupportedFamily(ModelUnusable):
    """Checkpoint of a family that this version cannot load."""

    code = "unsupported_family"


class PickleRefused(ModelUnusable):
    """Pickle file, which could run code when it is opened."""

    code = "pickle_refused"


class LayerDiffuseMissing(AlphalayerError):
    """Missing LayerDiffuse patch, transparent decoder or transparent encoder."""

    code = "layerdiffuse_missing"


class OutOfMemory(AlphalayerError):
    """Request that exceeds the device, even in the smallest memory mode."""

    code = "out_of_memory"


class Cancelled(AlphalayerError):
    """Job that a client cancelled."""

    code = "cancelled"


class QueueFull(AlphalayerError):
    """Queue that has reached its limit."""

    code = "queue_full"


class Unauthorized(AlphalayerError):
    """Missing or wrong credentials."""

    code = "unauthorized"


class Forbidden(AlphalayerError):
    """Key without the scope that a request needs, or a URL without a valid signature."""

    code = "forbidden"


class HostUnknown(AlphalayerError):
    """Host name that the service does not answer to."""

    code = "host_unknown"


class OriginRefused(AlphalayerError):
    """Change by a web page of another origin, which CORS does not allow."""

    code = "origin_refused"


class NotImplementedYet(AlphalayerError):
    """Route of a dialect that this version does not implement."""

    code = "not_implemented"


class RateLimited(AlphalayerError):
    """Key that exceeded its rate; the client may retry after `retry_after_s` seconds."""

    code = "rate_limited"
    retry_after_s = 60


class Busy(AlphalayerError):
    """Work on images that cannot wait; the client may retry after `retry_after_s` seconds."""

    code = "busy"
    retry_after_s = 1


class Stopping(AlphalayerError):
    """Service that shuts down; the client may retry after `retry_after_s` seconds."""

    code = "stopping"
    retry_after_s = 10


class FileMissing(AlphalayerError):
    """Name of an image that is not in storage."""

    code = "file_not_found"


class JobMissing(AlphalayerError):
    """Id of no job, or of another client's job."""

    code = "job_not_found"


class StorageFailed(AlphalayerError):
    """Image that could not be written or read, as on a full disk."""

    code = "storage_failed"


class DatabaseAway(StorageFailed):
    """Shared database out of reach; the client may retry after `retry_after_s` seconds."""

    code = "database_away"
    retry_after_s = 10


class EngineFailed(AlphalayerError):
    """Engine process that died, or failed in an unexpected way."""

    code = "engine_failed"


class SetupFailed(AlphalayerError):
    """Configuration with which the service or a command cannot start."""

    code = "setup_failed"
