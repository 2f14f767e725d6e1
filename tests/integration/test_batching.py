"""Batches of jobs: images equal those of single jobs, in a fair order."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
from tests.support import tiny_models
from tests.support.serving import served, wait_until

from alphalayer.core.errors import Cancelled
from alphalayer.core.job import Job, JobSpec
from alphalayer.core.request import GenerationRequest
from alphalayer.engine import progress
from alphalayer.engine.base import RenderTask
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.worker.batching import claim_batch

REQUESTS = [
    GenerationRequest(prompt="a red apple", seed=1, subseed=5, steps=4, width=64, height=64),
    GenerationRequest(
        prompt="a (blue:1.3) ghost AND smoke",
        seed=9,
        subseed=5,
        steps=4,
        width=64,
        height=64,
        cfg_scale=2.5,
        batch_size=2,
    ),
    GenerationRequest(
        prompt="word " * 90,
        negative_prompt="",
        seed=1,
        subseed=5,
        steps=4,
        width=64,
        height=64,
        cfg_scale=1.0,
    ),
    GenerationRequest(
        prompt="[a:b:0.5] cat",
        seed=4,
        steps=4,
        width=64,
        height=64,
        subseed=3,
        subseed_strength=0.4,
    ),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    folder = tmp_path_factory.mktemp("models")
    for name in ("one", "two"):
        tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / name)
    tiny_models.make_layer_files(folder / "layer_model")
    return LocalEngine(folder, device="cpu", spare_model_bytes=10**9)


# the blocking of matrix products depends on the batch: the last bits of float32 differ,
# and a value may cross a step of 1/255
@pytest.mark.parametrize("sampler", ["DPM++ 2M SDE", "Euler a", "UniPC"])
def test_batched_jobs_equal_single_jobs(engine: LocalEngine, sampler: str):
    requests = [request.model_copy(update={"sampler": sampler}) for request in REQUESTS]
    assert len({request.batch_key for request in requests}) == 1
    together = engine.render([RenderTask(task_request) for task_request in requests])
    assert [len(result.images) for result in together] == [1, 2, 1, 1]
    for request, result in zip(requests, together, strict=True):
        alone = engine.generate(request)
        assert result.request == alone.request
        for batched, single in zip(result.images, alone.images, strict=True):
            assert (batched.seed, batched.subseed) == (single.seed, single.subseed)
            assert np.abs(batched.rgba.astype(int) - single.rgba).max() <= 1


@pytest.mark.parametrize(("repeat_s", "is_repeated"), [(math.inf, False), (-1.0, True)])
def test_batch_reports_progress_of_each_decoded_image(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, repeat_s: float, is_repeated: bool
):
    monkeypatch.setattr(progress, "REPEAT_S", repeat_s)
    stages: list[str] = []
    first = RenderTask(REQUESTS[0], on_progress=lambda report: stages.append(report.stage))
    engine.render([first, RenderTask(REQUESTS[1])])
    images = REQUESTS[0].batch_size + REQUESTS[1].batch_size
    # within an image, each layer of the VAE and of the transparent decoder reports
    assert stages.count("decode") > 100 if is_repeated else stages.count("decode") == images


@pytest.mark.parametrize("layers", [0, 10, 100])
def test_cancel_stops_the_decode_of_an_image(engine: LocalEngine, layers: int):
    checks: list[bool] = []

    def is_cancelled() -> bool:
        checks.append("decode" in stages)
        return sum(checks) > layers

    stages: list[str] = []
    task = RenderTask(
        REQUESTS[0],
        on_progress=lambda report: stages.append(report.stage),
        is_cancelled=is_cancelled,
    )
    with pytest.raises(Cancelled):
        engine.render([task])
    model = engine.model
    networks = (model.modules["vae"], model.decoder)
    assert not any(layer._forward_pre_hooks for part in networks for layer in part.modules())


def test_cancelled_task_does_not_stop_others_in_its_batch(
    engine: LocalEngine,
):
    steps: dict[str, list[int]] = {"stays": [], "leaves": []}
    tasks = [
        RenderTask(
            REQUESTS[i],
            on_progress=lambda progress, name=name: steps[name].append(progress.step),
            is_cancelled=lambda name=name: name == "leaves" and len(steps[name]) > 3,
            previews=name == "stays",
        )
        for i, name in enumerate(steps)
    ]
    assert len(engine.render(tasks)) == 2
    assert max(steps["stays"]) == 4
    with pytest.raises(Cancelled):
        engine.render([RenderTask(request, is_cancelled=lambda: True) for request in REQUESTS[:2]])


def _with_model(engine: LocalEngine, name: str) -> np.ndarray:
    """Return a simple image of a model."""
    changes = {"model": name, "steps": 1, "mode": "opaque"}
    return engine.generate(REQUESTS[0].model_copy(update=changes)).images[0].rgba


def test_cached_model_is_reused_without_the_disk(engine: LocalEngine):
    before = _with_model(engine, "one")
    first = engine.model
    _with_model(engine, "two")
    assert engine.model is not first
    after = _with_model(engine, "one")
    assert engine.model is first
    assert (before == after).all()


def test_engine_without_spare_memory_keeps_one_model(engine: LocalEngine):
    alone = LocalEngine(engine._models_dir, device="cpu")
    _with_model(alone, "one")
    first = alone.model
    _with_model(alone, "two")
    _with_model(alone, "one")
    assert alone.model is not first


def _spec(prompt: str, **fields: object) -> JobSpec:
    iterations = fields.pop("iterations", 1)
    request = GenerationRequest.model_validate(
        {"prompt": prompt, "width": 64, "height": 64, **fields}
    )
    return JobSpec(generation=request, iterations=iterations)


def _batches(folder: Path, specs: list[JobSpec], budget: int) -> list[list[str]]:
    """Return the prompts of the batches that a queue of jobs is split into."""

    async def cut() -> list[list[str]]:
        job_queue = await SqliteJobQueue.open(folder / "jobs.sqlite", 100)
        for spec in specs:
            await job_queue.submit(spec)
        batches: list[list[Job]] = []
        while sum(map(len, batches)) < len(specs):
            batches.append(await claim_batch(job_queue, budget, 0.0))
        await job_queue.close()
        return [[job.spec.generation.prompt for job in batch] for batch in batches]

    return asyncio.run(cut())


PIXELS = 64 * 64


def test_oldest_job_starts_the_next_batch(tmp_path: Path):
    specs = [
        _spec("a1"),
        _spec("b1", steps=9),
        _spec("a2"),
        _spec("b2", steps=9),
        _spec("a3"),
        _spec("a4"),
        _spec("a5"),
    ]
    assert _batches(tmp_path, specs, 3 * PIXELS) == [["a1", "a2", "a3"], ["b1", "b2"], ["a4", "a5"]]


def test_batch_budget_counts_pixels(tmp_path: Path):
    specs = [_spec("one"), _spec("three", batch_size=3), _spec("two", batch_size=2), _spec("last")]
    assert _batches(tmp_path, specs, 3 * PIXELS) == [["one", "two"], ["three"], ["last"]]
    assert _batches(tmp_path / "..", specs, 0) == [["one"], ["three"], ["two"], ["last"]]


def test_job_with_iterations_is_not_batched(tmp_path: Path):
    assert _batches(tmp_path, [_spec("a", iterations=2), _spec("b")], 9 * PIXELS) == [["a"], ["b"]]


def test_forming_batch_claims_less_and_less_often(tmp_path: Path):
    async def form() -> int:
        job_queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 100)
        claims, claim_compatible = 0, job_queue.claim_compatible

        async def claim_counted(job: Job, pixels: int) -> Job | None:
            nonlocal claims
            claims += 1
            return await claim_compatible(job, pixels)

        job_queue.claim_compatible = claim_counted
        await job_queue.submit(_spec("a"))
        assert len(await claim_batch(job_queue, 9 * PIXELS, 0.5)) == 1
        await job_queue.close()
        return claims

    assert 4 <= asyncio.run(form()) <= 9


def test_cancelled_batch_requeues_its_jobs_in_order(tmp_path: Path):
    async def stop() -> list[str]:
        job_queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 100)
        for name in "abc":
            await job_queue.submit(_spec(name))
        forming = asyncio.create_task(claim_batch(job_queue, 9 * PIXELS, 60.0))
        while job_queue.queue_length:
            await asyncio.sleep(0.01)
        forming.cancel()
        await asyncio.gather(forming, return_exceptions=True)
        order = [(await job_queue.claim()).spec.generation.prompt for _ in "abc"]
        await job_queue.close()
        return order

    assert asyncio.run(stop()) == ["a", "b", "c"]


def test_service_batches_waiting_jobs(tmp_path: Path):
    options = {"step_s": 0.02, "batch_pixels": 4 * PIXELS}
    with served(tmp_path, engine_options=options) as client:
        first = client.post(
            "/alpha/v1/jobs", json={"prompt": "x", "width": 64, "height": 64, "steps": 150}
        ).json()
        wait_until(lambda: client.get(first["url"]).json()["state"] == "running")
        body = {"prompt": "x", "width": 64, "height": 64, "steps": 10}
        ids = [
            client.post("/alpha/v1/jobs", json={**body, "seed": i}).json()["id"] for i in range(9)
        ]
        cancelled_id = client.post("/alpha/v1/jobs", json={**body, "prompt": "y"}).json()["id"]
        client.delete(f"/alpha/v1/jobs/{cancelled_id}")
        client.delete(first["url"])
        wait_until(
            lambda: all(
                client.get(f"/alpha/v1/jobs/{job_id}").json()["state"] == "done" for job_id in ids
            )
        )
        assert client.get(f"/alpha/v1/jobs/{cancelled_id}").json()["state"] == "cancelled"
        image_urls = {
            client.get(f"/alpha/v1/jobs/{job_id}").json()["images"][0]["url"] for job_id in ids
        }
        assert len(image_urls) == 9
        metrics = client.get("/metrics").text.splitlines()
        assert "alphalayer_batch_jobs_sum 10.0" in metrics
        assert "alphalayer_batch_jobs_count 4.0" in metrics, (
            "the first job, and the nine waiting jobs in batches of four, four and one"
        )
