"""Options of a client, which services of several versions share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from alphalayer.api.a1111.routes import get_options, options_of, set_options
from alphalayer.api.a1111.schemas import Txt2ImgRequest
from alphalayer.api.a1111.settings import OverrideSettings
from alphalayer.core.errors import InvalidRequest

REQUEST: Any = SimpleNamespace(state=SimpleNamespace(client="ann"))


class Queue:
    """Options in memory."""

    def __init__(self, **stored: Any):
        self.stored = stored

    async def load_options(self, owner: str) -> dict[str, Any]:
        return dict(self.stored) if owner == "ann" else {}

    async def save_options(self, owner: str, options: dict[str, Any]) -> None:
        self.stored |= options


def service_of(queue: Queue, **values: Any) -> Any:
    defaults: dict[str, Any] = {
        "noise": "nv",
        "prompt_comments": True,
        "knows_models": True,
        "models_dir": Path(),
        "default_model": None,
        "list_models": list,
        "readiness": lambda: {"model": "default"},
    }
    return SimpleNamespace(job_queue=queue, **defaults | values)


async def read(service: Any) -> dict[str, Any]:
    return get_options(service, await options_of(REQUEST, service))


async def change(service: Any, **sent: Any) -> None:
    await set_options(OverrideSettings(**sent), service, await options_of(REQUEST, service), "ann")


async def test_options_of_a_newer_version_are_ignored():
    queue = Queue(
        CLIP_stop_at_last_layers=2, tiling=True, emphasis="Strong", eta_ddim=3, randn_source="CPU"
    )
    with capture_logs() as logs:
        options = await options_of(REQUEST, service_of(queue))
    assert options == OverrideSettings(CLIP_stop_at_last_layers=2, randn_source="CPU")
    assert {line["option"] for line in logs} == {"emphasis", "eta_ddim"}


async def test_options_with_an_empty_model_clear_the_stored_one():
    queue = Queue(sd_model_checkpoint="apples")
    await change(service_of(queue), sd_model_checkpoint="")
    assert queue.stored == {"sd_model_checkpoint": None}
    assert (await read(service_of(queue)))["sd_model_checkpoint"] == "default"


async def test_options_null_keeps_the_stored_model():
    queue = Queue(sd_model_checkpoint="apples")
    await change(service_of(queue), sd_model_checkpoint=None)
    assert queue.stored == {"sd_model_checkpoint": "apples"}


async def test_options_of_a_missing_model_may_be_sent_back():
    queue = Queue(sd_model_checkpoint="gone")
    service = service_of(queue)
    await change(service, **await read(service))
    assert queue.stored == {"sd_model_checkpoint": "gone"}
    with pytest.raises(InvalidRequest, match='no model "other"'):
        await change(service, sd_model_checkpoint="other")


@pytest.mark.parametrize(
    ("stored", "sent", "source"),
    [
        ("a", {}, "options.sd_model_checkpoint"),
        ("a", {"sd_model_checkpoint": ""}, "options.sd_model_checkpoint"),
        ("a", {"sd_model_checkpoint": "b"}, "override_settings.sd_model_checkpoint"),
        (None, {}, "override_settings.sd_model_checkpoint"),
    ],
)
def test_error_of_a_model_names_its_source(stored: str | None, sent: Any, source: str):
    body = Txt2ImgRequest.model_validate({"prompt": "x", "override_settings": sent})
    assert body.model_source(OverrideSettings(sd_model_checkpoint=stored)) == source


async def test_options_have_the_defaults_of_the_service():
    queue = Queue()
    service = service_of(queue, noise="cpu", prompt_comments=False)
    options = await read(service)
    assert (options["randn_source"], options["enable_prompt_comments"]) == ("CPU", False)
    await change(service, **options | {"sd_model_checkpoint": ""})
    assert queue.stored == {}
    await change(service, enable_prompt_comments=True)
    assert queue.stored == {"enable_prompt_comments": True}
