"""Digests of requests: a repeated request is the same in every version."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError, create_model

from alphalayer.api.a1111.schemas import Txt2ImgRequest as A1111Request
from alphalayer.api.a1111.settings import is_used
from alphalayer.api.deps import IdempotencyKey
from alphalayer.api.jobs import JobRequest
from alphalayer.api.native.txt2img import Txt2ImgRequest
from alphalayer.api.openai.schemas import GenerationsRequest
from alphalayer.api.schemas import Body
from alphalayer.api.uploads import check_source
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import Job, JobSpec, Submission
from alphalayer.core.request import GenerationRequest


def is_same(stored: str | None, new: str) -> bool:
    spec = JobSpec(generation=GenerationRequest(prompt="x"))
    first, second = (Job.new(spec, Submission(digest=digest)) for digest in (stored, new))
    try:
        return first.check_repeated(second) is first
    except InvalidRequest:
        return False


def digest_of_earlier_version(body: Body) -> str:
    fields = body.model_dump(by_alias=True, exclude_defaults=True)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def version(**fields: Any) -> type[Body]:
    """Return a body of some version, with its fields and defaults."""
    return create_model("Request", __base__=Body, prompt=(str, ...), **fields)


def test_repeated_request_is_the_same_after_changed_defaults():
    old = version(steps=(int, 20), width=(int, 64))
    new = version(steps=(int, 30), width=(int, 64), added=(bool, True))
    for body in ({"prompt": "x"}, {"prompt": "x", "steps": 30}, {"prompt": "x", "steps": 20}):
        assert is_same(old(**body).digest, new(**body).digest)
    assert not is_same(old(prompt="x").digest, new(prompt="x", steps=9).digest)
    assert not is_same(old(prompt="x").digest, new(prompt="y").digest)


def test_repeated_request_in_another_form_is_the_same():
    request = version(steps=(int, 20))
    first = request.model_validate({"prompt": "x", "steps": 7})
    for body in ({"steps": 7, "prompt": "x"}, {"prompt": "x", "steps": 7.0}):
        assert is_same(first.digest, request.model_validate(body).digest)
    default = request.model_validate({"prompt": "x"})
    for body in ({"prompt": "x", "steps": 20}, {"prompt": "x", "steps": None}):
        assert is_same(default.digest, request.model_validate(body).digest)


@pytest.mark.parametrize("model", [Txt2ImgRequest, JobRequest, A1111Request, GenerationsRequest])
def test_digest_of_an_earlier_version_is_accepted(model: type[Body]):
    request = model.model_validate({"prompt": "an apple"})
    other = model.model_validate({"prompt": "a pear"})
    stored = digest_of_earlier_version(request)
    assert len(request.digest) == len(stored) == 64
    assert is_same(stored, request.digest)
    assert is_same(None, request.digest)
    assert not is_same(stored, other.digest)
    assert request.sent_digest() != other.sent_digest()


def test_check_of_a_large_image_reads_its_start_only():
    image = "a" * 29_000_000
    start = time.process_time()
    assert check_source(image) is image
    assert is_used(image)
    assert time.process_time() - start < 0.02


def test_keys_with_control_characters_are_refused():
    key = TypeAdapter(IdempotencyKey)
    assert key.validate_python("order 17/\u00e4") == "order 17/\u00e4"
    for text in ("a\0b", "a\nb", "\x7f"):
        with pytest.raises(ValidationError, match="control characters"):
            key.validate_python(text)
        with pytest.raises(ValidationError, match="force_task_id"):
            A1111Request.model_validate({"prompt": "x", "force_task_id": text})
