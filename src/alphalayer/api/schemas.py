"""What the bodies of all dialects share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

from pydantic import BaseModel, model_validator

from alphalayer.core import validation
from alphalayer.core.errors import InvalidRequest


class Body(BaseModel):
    """A request's body, in which null is silence: many clients send every field that they know."""

    other_names: ClassVar[Mapping[str, str]] = {}
    """Fields by what they are called elsewhere, for those who take them from there."""

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked for; the same for the same request from version to version."""
        asked = self.model_dump(exclude_defaults=True)
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        """Remove fields that are null and refuse unknown ones by name."""
        if not isinstance(data, dict):
            return data
        # the first fault of all that is told: a field that is missing may be there under a wrong name
        for name in data if cls.model_config.get("extra") == "forbid" else ():
            if name not in cls.model_fields:
                raise cls._unknown(name)
        return {name: value for name, value in data.items() if value is not None}

    @classmethod
    def _unknown(cls, name: str) -> InvalidRequest:
        like = cls.other_names.get(name) or next(
            iter(get_close_matches(name, cls.model_fields, n=1)), None
        )
        hint = f'Did you mean "{like}"? {validation.DESCRIBED}' if like else validation.DESCRIBED
        return InvalidRequest("there is no such field.", hint=hint, field=name)
