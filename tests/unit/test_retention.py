"""Images and previews that are removed, and files that stay."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from tests.support.serving import wait_until

from alphalayer.core.errors import StorageFailed
from alphalayer.core.job import JobResult, JobSpec
from alphalayer.core.request import GenerationRequest, ModelDefaults
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.service.retention import DAY_S, Limits, keep_sweeping, select_expired, sweep
from alphalayer.storage.objects import ObjectStorage, open_storage

FILES = [("a", 10, 0.0), ("b", 10, 1 * DAY_S), ("c", 10, 2 * DAY_S), ("d", 10, 3 * DAY_S)]


def test_select_expired_by_age_returns_old_images():
    assert select_expired(FILES, Limits(images_days=1.5), 3 * DAY_S, lambda _: False) == [
        "a",
        "b",
    ]


def test_select_expired_by_size_returns_the_oldest_first():
    assert select_expired(FILES, Limits(images_bytes=25), 3 * DAY_S, lambda _: False) == [
        "a",
        "b",
    ]


def test_select_expired_without_limits_is_empty():
    assert select_expired(FILES, Limits(), 1e12, lambda _: False) == []


def test_select_expired_returns_previews_of_ended_jobs():
    files = [
        ("preview_a.webp", 10, 0.0),
        ("preview_b.webp", 10, 0.0),
        ("preview_c.webp", 10, 50.0),
        ("a", 10, 0.0),
    ]
    assert select_expired(files, Limits(), 90.0, lambda key: key == "preview_b.webp") == [
        "preview_a.webp"
    ]


def test_select_expired_leaves_protected_files():
    assert select_expired(
        FILES, Limits(images_days=0.1, images_bytes=1), 1e9, lambda key: key in "ab"
    ) == [
        "c",
        "d",
    ]


sizes = st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 1e9)), max_size=30)


@given(sizes, st.integers(1, 5000))
def test_select_expired_leaves_at_most_the_size_limit(files, limit):
    named = [(str(i), size, modified) for i, (size, modified) in enumerate(files)]
    expired = set(select_expired(named, Limits(images_bytes=limit), 1e9, lambda _: False))
    assert sum(size for key, size, _ in named if key not in expired) <= limit


async def test_sweep_removes_old_images_of_finished_jobs_only(tmp_path: Path):
    outputs = tmp_path / "outputs"
    job_queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10)
    spec = JobSpec(generation=GenerationRequest(prompt="x"))
    finished, running, waiting = [await job_queue.submit(spec) for _ in range(3)]
    for _ in range(2):
        await job_queue.mark_started((await job_queue.claim()).id)
    await job_queue.complete(
        finished.id, JobResult(images=(), settings=ModelDefaults(), model_name="m", model_hash="h")
    )
    foreign = [
        "notes.txt",
        ".hidden",
        "txt2img-images/00001.png",
        "alpha_1_aaaaaaaaaa.png",
        "alphalayer.png",
    ]
    own = [job.file_name(i) for job in (finished, running, waiting) for i in (0, 255)] + [
        running.preview_name
    ]
    expired = [
        finished.file_name(0),
        finished.file_name(255),
        finished.preview_name,
        "alpha_1_bbbbbbbbbb00.webp",
    ]
    for name in {*foreign, *own, *expired}:
        file = outputs / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 10)
        os.utime(file, (time.time() - 90 * DAY_S,) * 2)
    limits = Limits(images_days=30, images_bytes=1)
    sweeping = asyncio.create_task(
        keep_sweeping(open_storage(str(outputs)), job_queue, limits, every_s=0.05)
    )
    await asyncio.to_thread(
        wait_until, lambda: not any((outputs / name).exists() for name in expired)
    )
    later = outputs / "alpha_2_cccccccccc00.png"
    later.write_bytes(b"x")
    os.utime(later, (0, 0))
    await asyncio.to_thread(wait_until, lambda: not later.exists())
    left = {str(file.relative_to(outputs)) for file in outputs.rglob("*") if file.is_file()}
    assert left == {*foreign, *own} - {*expired}
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)
    await job_queue.close()


async def test_sweep_continues_after_a_file_it_cannot_remove(tmp_path: Path):
    class Guarded(ObjectStorage):
        def delete(self, key: str) -> None:
            if "aaaa" in key:
                raise StorageFailed("no right to delete.")
            super().delete(key)

    job_queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10)
    spec = JobSpec(generation=GenerationRequest(prompt="x"))
    job = await job_queue.submit(spec)
    await job_queue.mark_started((await job_queue.claim()).id)
    await job_queue.complete(
        job.id, JobResult(images=(), settings=ModelDefaults(), model_name="m", model_hash="h")
    )
    outputs = tmp_path / "outputs"
    storage = Guarded(open_storage(str(outputs))._store, str(outputs))
    for name in ("alpha_1_aaaaaaaaaa00.png", "alpha_1_bbbbbbbbbb00.png"):
        storage.put(name, b"x")
        os.utime(outputs / name, (0, 0))
    with capture_logs() as logs:
        assert await sweep(storage, job_queue, Limits(images_days=1, jobs_days=1e-9)) == 1
    assert [file.name for file in outputs.iterdir()] == ["alpha_1_aaaaaaaaaa00.png"]
    assert [(line["event"], line["pictures"], line.get("jobs")) for line in logs] == [
        ("retention.images_kept", 1, None),
        ("retention.completed", 1, 1),
    ]
    storage.put("preview_bbbbbbbbbbbbbbbbbbbbbbbb.webp", b"x", replace=True)
    unfinished = outputs / "alpha_1_cccccccccc00.png#7"
    unfinished.write_bytes(b"half a pict")
    for path in outputs.iterdir():
        os.utime(path, (0, 0))
    with capture_logs() as logs:
        assert await sweep(storage, job_queue, Limits()) == 1
    assert [(line["event"], line["pictures"], line["previews"]) for line in logs] == [
        ("retention.completed", 0, 1)
    ]
    assert not unfinished.exists()
    await job_queue.close()
