"""Jobs that are drawn together: equal to those drawn alone, in a fair order, and each with its own end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from tests.support import tiny_models
from tests.support.serving import served, wait_until

from alphalayer.core.errors import Cancelled
from alphalayer.core.job import Job, JobSpec
from alphalayer.core.request import GenerationRequest
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


# rows share matrix products whose blocking depends on the batch: float32 differs in its last bits, a value may cross a step of 1/255
@pytest.mark.parametrize("sampler", ["DPM++ 2M SDE", "Euler a", "UniPC"])
def test_together_as_alone(engine: LocalEngine, sampler: str):
    requests = [each.model_copy(update={"sampler": sampler}) for each in REQUESTS]
    assert len({each.batch_key for each in requests}) == 1
    together = engine.render([RenderTask(each) for each in requests])
    assert [len(result.images) for result in together] == [1, 2, 1, 1]
    for request, result in zip(requests, together, strict=True):
        alone = engine.generate(request)
        assert result.request == alone.request
        for ours, theirs in zip(result.images, alone.images, strict=True):
            assert (ours.seed, ours.subseed) == (theirs.seed, theirs.subseed)
            assert np.abs(ours.rgba.astype(int) - theirs.rgba).max() <= 1


def test_a_batch_is_not_silent_while_it_is_decoded(engine: LocalEngine):
    told: list[str] = []
    first = RenderTask(REQUESTS[0], on_progress=lambda progress: told.append(progress.stage))
    engine.render([first, RenderTask(REQUESTS[1])])
    assert told.count("decode") == REQUESTS[0].batch_size + REQUESTS[1].batch_size


def test_each_is_told_its_own_progress_and_one_that_leaves_does_not_stop_the_others(
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
        engine.render([RenderTask(each, is_cancelled=lambda: True) for each in REQUESTS[:2]])


def test_a_model_that_was_put_aside_comes_back_without_the_disk(engine: LocalEngine):
    before = engine.generate(REQUESTS[0].model_copy(update={"model": "one"})).images[0].rgba
    first = engine.model
    engine.generate(REQUESTS[0].model_copy(update={"model": "two"}))
    assert engine.model is not first
    after = engine.generate(REQUESTS[0].model_copy(update={"model": "one"})).images[0].rgba
    assert engine.model is first
    assert (before == after).all()


def test_without_spare_memory_one_model_is_held(engine: LocalEngine):
    alone = LocalEngine(engine._models_dir, device="cpu")
    alone.generate(REQUESTS[0].model_copy(update={"model": "one"}))
    first = alone.model
    alone.generate(REQUESTS[0].model_copy(update={"model": "two"}))
    alone.generate(REQUESTS[0].model_copy(update={"model": "one"}))
    assert alone.model is not first


def _spec(prompt: str, **fields: object) -> JobSpec:
    iterations = fields.pop("iterations", 1)
    request = GenerationRequest.model_validate(
        {"prompt": prompt, "width": 64, "height": 64, **fields}
    )
    return JobSpec(generation=request, iterations=iterations)


def _batches(folder: Path, specs: list[JobSpec], budget: int) -> list[list[str]]:
    """How a queue of jobs is cut into batches, as prompts."""

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


def test_the_oldest_job_always_begins_the_next_batch(tmp_path: Path):
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


def test_the_budget_counts_pixels(tmp_path: Path):
    specs = [_spec("one"), _spec("three", batch_size=3), _spec("two", batch_size=2), _spec("last")]
    assert _batches(tmp_path, specs, 3 * PIXELS) == [["one", "two"], ["three"], ["last"]]
    assert _batches(tmp_path / "..", specs, 0) == [["one"], ["three"], ["two"], ["last"]]


def test_jobs_of_several_rounds_are_drawn_alone(tmp_path: Path):
    assert _batches(tmp_path, [_spec("a", iterations=2), _spec("b")], 9 * PIXELS) == [["a"], ["b"]]


def test_a_batch_that_waits_for_more_asks_for_it_less_and_less_often(tmp_path: Path):
    async def form() -> int:
        job_queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 100)
        asked, claim_compatible = 0, job_queue.claim_compatible

        async def counted(job: Job, pixels: int) -> Job | None:
            nonlocal asked
            asked += 1
            return await claim_compatible(job, pixels)

        job_queue.claim_compatible = counted
        await job_queue.submit(_spec("a"))
        assert len(await claim_batch(job_queue, 9 * PIXELS, 0.5)) == 1
        await job_queue.close()
        return asked

    assert 4 <= asyncio.run(form()) <= 9


def test_a_batch_that_is_stopped_while_it_forms_gives_its_jobs_back_in_order(tmp_path: Path):
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


def test_a_service_draws_what_waits_together(tmp_path: Path):
    options = {"step_s": 0.02, "batch_pixels": 4 * PIXELS}
    with served(tmp_path, engine_options=options) as client:
        first = client.post(
            "/alpha/v1/jobs", json={"prompt": "x", "width": 64, "height": 64, "steps": 150}
        ).json()
        wait_until(lambda: client.get(first["url"]).json()["state"] == "running")
        asked = {"prompt": "x", "width": 64, "height": 64, "steps": 10}
        ids = [
            client.post("/alpha/v1/jobs", json={**asked, "seed": i}).json()["id"] for i in range(9)
        ]
        gone = client.post("/alpha/v1/jobs", json={**asked, "prompt": "y"}).json()["id"]
        client.delete(f"/alpha/v1/jobs/{gone}")
        client.delete(first["url"])
        wait_until(
            lambda: all(
                client.get(f"/alpha/v1/jobs/{each}").json()["state"] == "done" for each in ids
            )
        )
        assert client.get(f"/alpha/v1/jobs/{gone}").json()["state"] == "cancelled"
        pictures = {client.get(f"/alpha/v1/jobs/{each}").json()["images"][0]["url"] for each in ids}
        assert len(pictures) == 9
        counted = client.get("/metrics").text.splitlines()
        assert "alphalayer_batch_jobs_sum 10.0" in counted
        assert "alphalayer_batch_jobs_count 4.0" in counted, (
            "the first one, and the nine that waited by four, four and one"
        )
