"""Every error that the service answers with, and nothing of HTTP. (`alphalayer.client` adds `ServiceUnreachable`.)

    AlphalayerError
    ├── InvalidRequest         a field of a request is wrong
    ├── ModelNotFound          no model of that name, or none at all
    ├── ModelUnusable          a model file that is there cannot be used
    │   ├── CorruptFile        truncated, unreadable, not what its name says
    │   ├── UnsupportedFamily  a known kind of checkpoint that this version does not draw with
    │   └── PickleRefused      .ckpt and .pt files can run code when they are opened
    ├── LayerDiffuseMissing    the patch or the transparent decoder is not there
    ├── OutOfMemory            the request does not fit the device, in the smallest mode either
    ├── Cancelled              somebody asked for it
    ├── QueueFull              no room; come back later
    ├── Unauthorized           no credentials, or wrong ones
    ├── NotImplementedYet      a route that clients know from elsewhere and that does nothing here yet
    ├── RateLimited            this key asked too often
    ├── Stopping               the service is being stopped; ask again
    ├── FileMissing            no picture of that name
    ├── JobMissing             no job of that id
    ├── StorageFailed          disk full, folder read-only
    │   └── DatabaseAway       the database that many machines share cannot be reached; ask again
    ├── EngineFailed           the engine process died, raised something internal_error, or its numbers overflowed
    └── SetupFailed            the service cannot start as configured

Each has a stable `code`, a `message` that says what happened and why, a `hint` that says what to do next, and for
requests the `field`. They cross processes as plain dictionaries.
"""

from __future__ import annotations

from typing import Any

PROGRAM = "alphalayer"


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
        """The error as JSON-ready data, the inverse of `from_dict`."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "field": self.field}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> AlphalayerError:
        """Rebuild the error of the class that `code` names; an unknown code gives the base class with this code."""
        kind = next(
            (kind for kind in _subclasses(AlphalayerError) if kind.code == data.get("code")),
            AlphalayerError,
        )
        error = kind(data["message"], hint=data.get("hint", ""), field=data.get("field"))
        error.code = data.get("code", kind.code)
        return error


def _subclasses(kind: type[AlphalayerError]) -> list[type[AlphalayerError]]:
    return [found for child in kind.__subclasses__() for found in (child, *_subclasses(child))]


class InvalidRequest(AlphalayerError):
    """A field of a request is wrong; `field` names it."""

    code = "invalid_request"


class ModelNotFound(AlphalayerError):
    """No model of that name is in the models folder."""

    code = "model_not_found"


class ModelUnusable(AlphalayerError):
    """A model file that is there cannot be used."""

    code = "model_unusable"


class CorruptFile(ModelUnusable):
    """A model file is truncated, unreadable or not what its name says."""

    code = "corrupt_file"


class UnsupportedFamily(ModelUnusable):
    """A known kind of checkpoint that this version does not draw with."""

    code = "unsupported_family"


class PickleRefused(ModelUnusable):
    """A pickle file: opening it could run code."""

    code = "pickle_refused"


class LayerDiffuseMissing(AlphalayerError):
    """The LayerDiffuse patch or the transparent decoder is not there."""

    code = "layerdiffuse_missing"


class OutOfMemory(AlphalayerError):
    """The request does not fit the device, in the smallest memory mode either."""

    code = "out_of_memory"


class Cancelled(AlphalayerError):
    """Somebody asked for the job to stop."""

    code = "cancelled"


class QueueFull(AlphalayerError):
    """There is no room for another job now."""

    code = "queue_full"


class Unauthorized(AlphalayerError):
    """No credentials, or wrong ones."""

    code = "unauthorized"


class NotImplementedYet(AlphalayerError):
    """A route that clients know from elsewhere and that does nothing here yet."""

    code = "not_implemented"


class RateLimited(AlphalayerError):
    """A key asked more often than it may; `retry_after_s` says when it may again."""

    code = "rate_limited"
    retry_after_s = 60


class Stopping(AlphalayerError):
    """The service is being stopped; `retry_after_s` says when to ask again."""

    code = "stopping"
    retry_after_s = 10


class FileMissing(AlphalayerError):
    """No stored picture has that name."""

    code = "file_not_found"


class JobMissing(AlphalayerError):
    """No job has that id, or it is somebody else's."""

    code = "job_not_found"


class StorageFailed(AlphalayerError):
    """A picture could not be written or read: disk full, folder read-only."""

    code = "storage_failed"


class DatabaseAway(StorageFailed):
    """The database that many machines share cannot be reached; `retry_after_s` says when to ask again."""

    code = "database_away"
    retry_after_s = 10


class EngineFailed(AlphalayerError):
    """The engine process died, raised something internal_error, or its numbers overflowed."""

    code = "engine_failed"


class SetupFailed(AlphalayerError):
    """The service or command cannot start as it is configured."""

    code = "setup_failed"
