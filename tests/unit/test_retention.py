"""Images and previews that are removed, and files that stay."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from tests.support.serving import wait_until

from alphalayer.core.errors import StorageFailed
from alphalayer.core.job import JobResult, JobSpec
from alphalayer.core.request import GenerationRequest, ModelDefaults
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.service import clock, retention
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


def test_select_expired_by_age_takes_a_tenth_a_sweep():
    files = [(f"image {i}", 10, float(i)) for i in range(2_000)]
    with capture_logs() as logs:
        expired = select_expired(files, Limits(images_days=1), 1e9, lambda _: False)
    assert expired == [f"image {i}" for i in range(200)]
    assert [(line["event"], line["log_level"], line["old_images"]) for line in logs] == [
        ("retention.limited", "warning", 2_000)
    ]
    # the limit of bytes holds all the same, and previews are no images
    previews = [(f"preview_{i}.webp", 10, 0.0) for i in range(500)]
    assert len(select_expired(files, Limits(1, 100), 1e9, lambda _: False)) == 1_990
    assert len(select_expired(previews, Limits(), 1e9, lambda _: False)) == 500


async def test_sweep_deletes_a_tenth_of_the_old_jobs(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(retention, "MIN_OLD", 2)
    job_queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 100)
    spec = JobSpec(generation=GenerationRequest(prompt="x"))
    for job in [await job_queue.submit(spec) for _ in range(50)]:
        await job_queue.cancel(job.id)
    storage, limits = open_storage(str(tmp_path / "outputs")), Limits(jobs_days=1e-9)
    with capture_logs() as logs:
        await sweep(storage, job_queue, limits, is_clock_trusted=False)
        assert await job_queue.count_finished() == 50
        await sweep(storage, job_queue, limits)
    assert await job_queue.count_finished() == 45
    assert [line["event"] for line in logs] == ["retention.limited", "retention.completed"]
    await job_queue.close()


async def test_sweep_after_a_clock_jump_deletes_nothing_by_age(tmp_path: Path):
    job_queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 100)
    storage = open_storage(str(tmp_path / "outputs"))
    names = ["alpha_1_aaaaaaaaaa00.png", f"input_{'a' * 64}.png", "alpha_1_bbbbbbbbbb00.png#7"]
    for name in names:
        (tmp_path / "outputs" / name).write_bytes(b"x")
        os.utime(tmp_path / "outputs" / name, (0, 0))
    for is_trusted, left in ((False, set(names)), (True, set())):
        await sweep(storage, job_queue, Limits(images_days=1), is_clock_trusted=is_trusted)
        assert {path.name for path in (tmp_path / "outputs").iterdir()} == left
    await job_queue.close()


def test_clock_watch_pauses_after_a_jump(monkeypatch: pytest.MonkeyPatch):
    now = SimpleNamespace(wall=1e9, uptime=50.0)
    monkeypatch.setattr(clock, "time", SimpleNamespace(time=lambda: now.wall))
    monkeypatch.setattr(clock, "_uptime_s", lambda: now.uptime)
    watch = clock.ClockWatch()

    def is_trusted_after(passed_s: float, set_by_s: float = 0.0) -> bool:
        now.uptime += passed_s
        now.wall += passed_s + set_by_s
        return watch.is_trusted()

    with capture_logs() as logs:
        assert is_trusted_after(600)
        assert is_trusted_after(1e7)
        assert is_trusted_after(600, set_by_s=60)
        assert not is_trusted_after(600, set_by_s=1e7)
        assert not is_trusted_after(clock.PAUSE_S - 60)
        assert is_trusted_after(120)
        assert not is_trusted_after(600, set_by_s=1e7)
        assert is_trusted_after(600, set_by_s=-1e7)
    assert [(line["event"], line["log_level"]) for line in logs] == [
        ("retention.clock_jumped", "warning"),
        ("retention.clock_jumped", "warning"),
        ("retention.clock_set_back", "warning"),
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
