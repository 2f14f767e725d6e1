"""Many pods: the short form of `tests.stress.pods`, and the metric of the autoscaler."""

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
def test_killed_pods_and_workers_lose_no_job(tmp_path: Path, s3: dict[str, str], s3_prefix: str):
    shared = {**s3, "ALPHALAYER_STORAGE": s3_prefix}
    # this seed kills a pod and then, while PostgreSQL starts again, a worker
    result = pods.run(tmp_path, shared, pods=2, workers=2, jobs=30, kills=2, seed=2)
    assert result["errors"] == []
    assert result["done"] >= 30


def test_proxy_retry_on_another_pod_shares_the_job(tmp_path: Path, postgres: Postgres):
    """Retry the key on another pod before the first one detects the disconnect."""
    database = postgres.fresh_database()
    slow_engine, body = (
        {"engine_options": {"step_s": 0.05}},
        {"prompt": "x", "steps": 30, "width": 64, "height": 64},
    )
    request = {
        "url": "/alpha/v1/txt2img",
        "json": body,
        "headers": {"Idempotency-Key": "key-of-the-proxy"},
    }
    with (
        served(tmp_path / "one", database=database, **slow_engine) as one,
        served(tmp_path / "other", database=database, role="api") as other,
        ThreadPoolExecutor(2) as pool,
    ):
        timed_out = pool.submit(one.post, **request, timeout=0.7)
        wait_until(lambda: other.get("/alpha/v1/jobs").json()["jobs"])
        retried = pool.submit(other.post, **request)
        assert isinstance(timed_out.exception(), httpx.ReadTimeout)
        assert retried.result().status_code == 200
        assert [job["state"] for job in other.get("/alpha/v1/jobs").json()["jobs"]] == ["done"]


def test_stopping_pod_completes_open_streams(tmp_path: Path, postgres: Postgres):
    shared = {"database": postgres.fresh_database(), "outputs_dir": tmp_path / "outputs"}
    body = {"prompt": "x", "size": "64x64", "quality": "high", "stream": True}
    with (
        served(tmp_path / "one", engine_options={"step_s": 0.05}, **shared) as one,
        ThreadPoolExecutor(1) as pool,
    ):
        with served(tmp_path / "other", role="api", **shared) as other:
            url = f"{str(other.base_url).rstrip('/')}/v1/images/generations"
            stream = pool.submit(httpx.post, url, json=body, timeout=60, trust_env=False)
            wait_until(
                lambda: one.get("/alpha/v1/jobs", params={"state": "running"}).json()["jobs"]
            )
        assert "event: image_generation." in stream.result().text
        assert "event: error" not in stream.result().text


def test_pod_without_models_accepts_any_model_name(tmp_path: Path, postgres: Postgres):
    shared = {"database": postgres.fresh_database(), "outputs_dir": tmp_path / "outputs"}
    engine, request = (
        "alphalayer.engine.pipeline:create_engine",
        {"prompt": "a red apple", "size": "64x64", "quality": "low"},
    )
    with (
        served(tmp_path / "api", role="api", **shared) as pod,
        served(tmp_path / "worker", role="worker", engine=engine, wait_ready=False, **shared),
    ):
        assert pod.get("/readyz").json() == {"ready": True, "engines": {}, "model": None}
        assert pod.get("/alpha/v1/models").json() == {"models": []}
        assert pod.get("/v1/models").json()["data"] == pod.get("/sdapi/v1/sd-models").json() == []

        options = pod.get("/sdapi/v1/options").json()
        assert options["sd_model_checkpoint"] == ""
        for changes in (options, {"sd_model_checkpoint": "sd_xl_base_1.0"}):
            assert pod.post("/sdapi/v1/options", json=changes).status_code == 200
            assert (
                pod.get("/sdapi/v1/options").json()["sd_model_checkpoint"]
                == changes["sd_model_checkpoint"]
            )

        missing = pod.post("/v1/images/generations", json={**request, "model": "sd_xl_base_1.0"})
        assert missing.status_code == 404
        assert (missing.json()["error"]["code"], missing.json()["error"]["param"]) == (
            "model_not_found",
            "model",
        )
        for model in ("gpt-image-1", "dall-e-3", "alphalayer"):
            assert (
                pod.post("/v1/images/generations", json={**request, "model": model}).status_code
                == 200
            )


def test_pod_reports_an_unreachable_database(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
):
    from alphalayer.jobs import postgres as postgres_queue

    monkeypatch.setattr(postgres_queue, "UNREACHABLE_S", 3.0)
    with served(tmp_path, role="api", database=postgres.fresh_database()) as pod:
        postgres.stop()
        try:
            response = pod.post("/alpha/v1/jobs", json={"prompt": "x"})
            assert (response.status_code, response.json()["code"]) == (503, "database_away")
            assert int(response.headers["retry-after"]) > 0
            wait_until(lambda: pod.get("/readyz").status_code == 503)
            assert "database" in pod.get("/readyz").json()["problem"]
            ping = pod.get("/ping")
            assert (ping.status_code, ping.text) == (503, "the database cannot be reached.")
        finally:
            postgres.start()
        wait_until(lambda: pod.get("/ping").status_code == 200)


def test_queue_age_rises_without_workers_and_falls_with_one(tmp_path: Path, postgres: Postgres):
    shared = {"database": postgres.fresh_database()}
    with capture_logs() as logs, served(tmp_path / "api", role="api", **shared) as pod:

        def metric(name: str) -> float:
            families = text_string_to_metric_families(pod.get("/metrics").text)
            return next(
                sample.value
                for family in families
                for sample in family.samples
                if sample.name == name
            )

        assert "storage.local_with_shared_queue" in {line["event"] for line in logs}
        assert metric("alphalayer_queue_age_seconds") == 0
        for i in range(20):
            pod.post(
                "/alpha/v1/jobs", json={"prompt": str(i), "width": 64, "height": 64}
            ).raise_for_status()
        wait_until(lambda: metric("alphalayer_queue_length") == 20)
        age_s, read_at = metric("alphalayer_queue_age_seconds"), time.monotonic()
        time.sleep(4)
        # the pod reads it every two seconds
        assert metric("alphalayer_queue_age_seconds") - age_s == pytest.approx(
            time.monotonic() - read_at, abs=2.5
        )
        with served(tmp_path / "worker", role="worker", **shared):
            wait_until(lambda: metric("alphalayer_queue_age_seconds") == 0, 30)
            assert metric("alphalayer_queue_length") == 0
