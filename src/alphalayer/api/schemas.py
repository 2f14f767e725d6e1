"""Base of the request bodies of all dialects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, cast

from pydantic import (
    BaseModel,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import HALF_DIGEST
from alphalayer.core.values import Frozen

StageSeconds = Annotated[
    dict[str, float],
    Field(
        description="Seconds of each stage of the finished job: load, text, inputs, sample, "
        "upscale, vae, decode, store."
    ),
]


class Body(Frozen, frozen=True):
    """A request's body. Null means the default, because many clients send every field they know."""

    _sent: dict[str, Any] = PrivateAttr(default_factory=dict[str, Any])

    def sent_digest(self, images: Mapping[str, Any] = {}) -> str:
        """Return the SHA-256 of the JSON as sent. It is the same in every version.

        Args:
            images: Digests of images by field, which take the place of the images.
        """
        return _sha256({**self._sent, **images})

    @property
    def digest(self) -> str:
        """Return the digest of the request, see `Job.check_repeated`."""
        return self.digest_with({})

    def digest_with(self, images: Mapping[str, Any]) -> str:
        """Return the digest of a request with images, see `Job.check_repeated`.

        The first half is of the JSON as sent, the second one of the fields that differ from
        their defaults.

        Args:
            images: Digests of images by field, which take the place of the images.
        """
        fields = self.model_dump(by_alias=True, exclude_defaults=True, exclude=set(images))
        halves = (self.sent_digest(images), _sha256({**fields, **images}))
        return "".join(half[:HALF_DIGEST] for half in halves)

    def drop(self, fields: Iterable[str]) -> None:
        """Replace fields by null, so that their values are no longer in memory."""
        for name in fields:
            self._sent.pop(name, None)
            object.__setattr__(self, name, None)  # it is frozen otherwise

    @model_validator(mode="wrap")
    @classmethod
    def keep_sent(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        """Keep the JSON as sent, without fields that are null."""
        body = handler(data)
        if isinstance(data, dict):
            fields = cast("dict[str, Any]", data)
            body._sent = {name: value for name, value in fields.items() if value is not None}
        return body

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        """Remove fields that are null and refuse unknown ones by name."""
        if not isinstance(data, dict):
            return data
        if cls.model_config.get("extra") == "forbid":
            # before all other errors: a field that seems to be missing may have a wrong name
            names = {field.alias or name: name for name, field in cls.model_fields.items()}
            for name in data:
                if name not in names:
                    raise _unknown_field(name, names)
        return {name: value for name, value in data.items() if value is not None}


def _sha256(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _unknown_field(name: str, names: dict[str, str]) -> InvalidRequest:
    """Return the error of an unknown field.

    Args:
        name: The field as sent.
        names: The names in `alphalayer.core` by those of the dialect.
    """
    same = next(
        (
            sent
            for sent, core in names.items()
            if core == name or name.endswith(f"_{sent}") or sent.endswith(f"_{name}")
        ),
        None,
    )
    # a field of a megabyte would be compared for a second
    like = same or next(iter(get_close_matches(validation.cut(name), names, n=1)), None)
    hint = f'Did you mean "{like}"? {validation.DESCRIBED}' if like else validation.DESCRIBED
    return InvalidRequest("there is no such field.", hint=hint, field=validation.cut(name))


def reject_unused_options(options: BaseModel, switch: str, *names: str) -> None:
    """Raise `InvalidRequest` for options without effect while `switch` is off.

    Args:
        options: A body or a query.
        switch: Name of its boolean field.
        names: Fields that need the switch. At their default they are not rejected.
    """
    for name in names:
        default = type(options).model_fields[name].default
        if not getattr(options, switch) and getattr(options, name) != default:
            raise InvalidRequest(
                f"it has no effect without {switch}.", hint="Leave it out.", field=name
            )
