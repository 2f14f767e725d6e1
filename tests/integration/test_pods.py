"""Many pods: the short form of `tests.stress.pods`, and the signal that they are scaled by."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs
from tests.stress import pods
from tests.support.servers import Postgres, postgres_programs
from tests.support.serving import served, wait_until


@pytest.mark.skipif(not postgres_programs(), reason="needs PostgreSQL")
def test_pods_and_workers_die_and_no_job_is_lost(
    tmp_path: Path, s3: dict[str, str], s3_prefix: str
):
    shared = {**s3, "ALPHALAYER_STORAGE": s3_prefix}
    result = pods.run(tmp_path, shared, pods=2, workers=2, jobs=30, kills=4)
    assert result["faults"] == []
    assert result["done"] >= 30


def test_a_pod_that_a_proxy_gave_up_takes_no_picture_from_the_one_that_it_asked_next(
    tmp_path: Path, postgres: Postgres
):
    """The proxy closes on one pod and asks another one under the same key; only then the first sees that its client left."""
    database = postgres.fresh_database()
    slow, body = (
        {"engine_options": {"step_s": 0.05}},
        {"prompt": "x", "steps": 30, "width": 64, "height": 64},
    )
    asked = {
        "url": "/alpha/v1/txt2img",
        "json": body,
        "headers": {"Idempotency-Key": "a-proxys-own"},
    }
    with (
        served(tmp_path / "one", database=database, **slow) as one,
        served(tmp_path / "other", database=database, role="api") as other,
        ThreadPoolExecutor(2) as pool,
    ):
        given_up = pool.submit(one.post, **asked, timeout=0.7)
        wait_until(lambda: other.get("/alpha/v1/jobs").json()["jobs"])
        asked_next = pool.submit(other.post, **asked)
        assert isinstance(given_up.exception(), httpx.ReadTimeout)
        assert asked_next.result().status_code == 200
        assert [job["state"] for job in other.get("/alpha/v1/jobs").json()["jobs"]] == ["done"]


def test_a_stream_that_cannot_be_opened_again_goes_on_while_its_pod_is_stopped(
    tmp_path: Path, postgres: Postgres
):
    shared = {"database": postgres.fresh_database(), "outputs_dir": tmp_path / "outputs"}
    body = {"prompt": "x", "size": "64x64", "quality": "high", "stream": True}
    with (
        served(tmp_path / "one", engine_options={"step_s": 0.05}, **shared) as one,
        ThreadPoolExecutor(1) as pool,
    ):
        with served(tmp_path / "other", role="api", **shared) as other:
            url = f"{str(other.base_url).rstrip('/')}/v1/images/generations"
            drawing = pool.submit(httpx.post, url, json=body, timeout=60, trust_env=False)
            wait_until(
                lambda: one.get("/alpha/v1/jobs", params={"state": "running"}).json()["jobs"]
            )
        assert "event: image_generation." in drawing.result().text
        assert "event: error" not in drawing.result().text


def test_a_pod_without_models_names_none_and_takes_any_name(tmp_path: Path, postgres: Postgres):
    shared = {"database": postgres.fresh_database(), "outputs_dir": tmp_path / "outputs"}
    real, small = (
        "alphalayer.engine.pipeline:create_engine",
        {"prompt": "a red apple", "size": "64x64", "quality": "low"},
    )
    with (
        served(tmp_path / "api", role="api", **shared) as pod,
        served(tmp_path / "worker", role="worker", engine=real, wait_ready=False, **shared),
    ):
        assert pod.get("/readyz").json() == {"ready": True, "engines": {}, "model": None}
        assert pod.get("/alpha/v1/models").json() == {"models": []}
        assert pod.get("/v1/models").json()["data"] == pod.get("/sdapi/v1/sd-models").json() == []

        options = pod.get("/sdapi/v1/options").json()
        assert options["sd_model_checkpoint"] == ""
        for chosen in (options, {"sd_model_checkpoint": "sd_xl_base_1.0"}):
            assert pod.post("/sdapi/v1/options", json=chosen).status_code == 200
            assert (
                pod.get("/sdapi/v1/options").json()["sd_model_checkpoint"]
                == chosen["sd_model_checkpoint"]
            )

        missing = pod.post("/v1/images/generations", json={**small, "model": "sd_xl_base_1.0"})
        assert missing.status_code == 404
        assert (missing.json()["error"]["code"], missing.json()["error"]["param"]) == (
            "model_not_found",
            "model",
        )
        for usual in ("gpt-image-1", "dall-e-3", "alphalayer"):
            assert (
                pod.post("/v1/images/generations", json={**small, "model": usual}).status_code
                == 200
            )


def test_a_database_that_is_away_is_said(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
):
    from alphalayer.jobs import postgres as postgres_queue

    monkeypatch.setattr(postgres_queue, "UNREACHABLE_S", 3.0)
    with served(tmp_path, role="api", database=postgres.fresh_database()) as pod:
        postgres.stop()
        try:
            refused = pod.post("/alpha/v1/jobs", json={"prompt": "x"})
            assert (refused.status_code, refused.json()["code"]) == (503, "database_away")
            assert int(refused.headers["retry-after"]) > 0
            wait_until(lambda: pod.get("/readyz").status_code == 503)
            assert "database" in pod.get("/readyz").json()["problem"]
            ping = pod.get("/ping")
            assert (ping.status_code, ping.text) == (503, "the database cannot be reached.")
        finally:
            postgres.start()
        wait_until(lambda: pod.get("/ping").status_code == 200)


def test_the_signal_for_scaling_rises_without_workers_and_falls_with_one(
    tmp_path: Path, postgres: Postgres
):
    shared = {"database": postgres.fresh_database()}
    with capture_logs() as logs, served(tmp_path / "api", role="api", **shared) as pod:

        def signal(name: str) -> float:
            said = text_string_to_metric_families(pod.get("/metrics").text)
            return next(
                sample.value for family in said for sample in family.samples if sample.name == name
            )

        assert "storage.local_with_shared_queue" in {line["event"] for line in logs}
        assert signal("alphalayer_queue_age_seconds") == 0
        for i in range(20):
            pod.post(
                "/alpha/v1/jobs", json={"prompt": str(i), "width": 64, "height": 64}
            ).raise_for_status()
        wait_until(lambda: signal("alphalayer_queue_length") == 20)
        before, at = signal("alphalayer_queue_age_seconds"), time.monotonic()
        time.sleep(4)
        # looked up every two seconds
        assert signal("alphalayer_queue_age_seconds") - before == pytest.approx(
            time.monotonic() - at, abs=2.5
        )
        with served(tmp_path / "worker", role="worker", **shared):
            wait_until(lambda: signal("alphalayer_queue_age_seconds") == 0, 30)
            assert signal("alphalayer_queue_length") == 0
