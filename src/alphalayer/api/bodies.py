"""What the bodies of all dialects share."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, model_validator


class Body(BaseModel):
    """A request's body, in which null is silence: many clients send every field that they know."""

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked for; the same for the same request from version to version."""
        asked = self.model_dump(exclude_defaults=True)
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @model_validator(mode="before")
    @classmethod
    def _null_is_silence(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # what is unknown stays, so that it is refused where unknown fields are
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}
