"""A request repeated with its key is the same request, even after a change of the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.serving import put_model, served

KEY = {"Idempotency-Key": "mine"}
BODY = {"prompt": "an apple", "width": 64, "height": 64, "steps": 2}
CHANGES = {
    "sd_model_checkpoint": "apples",
    "CLIP_stop_at_last_layers": 2,
    "live_previews_enable": True,
}


def jobs(client: httpx.Client) -> int:
    return len(client.get("/alpha/v1/jobs").json()["jobs"])


@pytest.mark.parametrize(("more", "headers"), [({"force_task_id": "t"}, {}), ({}, KEY)])
def test_repeated_request_after_changed_options_is_the_same(
    tmp_path: Path, more: dict[str, Any], headers: Any
):
    with served(put_model(tmp_path)) as client:
        for _ in range(2):
            client.post(
                "/sdapi/v1/txt2img", json={**BODY, **more}, headers=headers
            ).raise_for_status()
            client.post("/sdapi/v1/options", json=CHANGES).raise_for_status()
        assert jobs(client) == 1


def test_repeated_request_after_changed_settings_is_the_same(tmp_path: Path):
    sized = {"prompt": "an apple", "size": "64x64"}
    requests = {
        "/alpha/v1/jobs": BODY,
        "/alpha/v1/txt2img": BODY,
        "/sdapi/v1/txt2img": BODY,
        "/v1/images/generations": sized,
    }
    changes: list[dict[str, Any]] = [{}, {"decode": "forge2", "noise": "cpu"}]
    for settings in changes:
        with served(tmp_path, **settings) as client:
            for path, body in requests.items():
                headers = {"Idempotency-Key": path}
                client.post(path, json=body, headers=headers).raise_for_status()
            assert jobs(client) == len(requests)


def test_request_with_another_answer_format_is_another(tmp_path: Path):
    body = {
        "prompt": "an apple",
        "size": "64x64",
        "output_format": "jpeg",
        "response_format": "url",
    }
    with served(tmp_path) as client:
        client.post("/v1/images/generations", json=body, headers=KEY).raise_for_status()
        other = client.post(
            "/v1/images/generations", json={**body, "output_compression": 5}, headers=KEY
        )
        assert (other.status_code, other.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_repeated_request_with_explicit_defaults_is_the_same(tmp_path: Path):
    with served(tmp_path, engine=None) as client:
        first = client.post("/alpha/v1/jobs", json=BODY, headers=KEY).json()
        again = client.post(
            "/alpha/v1/jobs", json={**BODY, "negative_prompt": "bad, ugly"}, headers=KEY
        ).json()
        assert first["id"] == again["id"]
