"""Input images: stored once, kept for open jobs, and deleted afterwards.

The tests run on both queues and on both kinds of storage.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from alphalayer.core.errors import Cancelled, StorageFailed
from alphalayer.core.job import ImageRef, JobResult, JobSpec, Stage
from alphalayer.core.layers import STACK
from alphalayer.core.modes import MODES
from alphalayer.core.request import GenerationRequest, ImageInput, ModelDefaults
from alphalayer.jobs.base import Jobs
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.service import retention
from alphalayer.service.retention import DAY_S, INPUT_GRACE_S, Limits, sweep
from alphalayer.storage import Storage, read
from alphalayer.storage.inputs import store_input
from alphalayer.storage.objects import ObjectStorage, open_storage

LATER_S = INPUT_GRACE_S + 60


@pytest_asyncio.fixture(params=["sqlite", "postgres"])
async def queue(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Jobs]:
    if request.param == "sqlite":
        jobs: Jobs = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10)
    else:
        from alphalayer.jobs.postgres import PostgresJobQueue

        url = request.getfixturevalue("postgres").fresh_database()
        jobs = await PostgresJobQueue.open(url, 10)
    yield jobs
    await jobs.close()


@pytest.fixture(params=["folder", "bucket"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    if request.param == "folder":
        return open_storage(str(tmp_path / "images"))
    for name, value in request.getfixturevalue("s3").items():
        monkeypatch.setenv(name, value)
    return open_storage(request.getfixturevalue("s3_prefix"))


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets the clock of retention forward."""

    def set_forward(seconds: float) -> None:
        clock = SimpleNamespace(time=lambda: time.time() + seconds)
        monkeypatch.setattr(retention, "time", clock)

    return set_forward


def spec(*names: str) -> JobSpec:
    """A job with up to two input images."""
    mode = ("attention", "bg2ble", "bgble2fg")[len(names)]
    roles = MODES[mode].needs
    inputs = tuple(
        ImageInput(role=role, file_name=name) for role, name in zip(roles, names, strict=True)
    )
    return JobSpec(generation=GenerationRequest(prompt="an apple", mode=mode, inputs=inputs))


def stored_keys(storage: Storage) -> set[str]:
    return {key for key, _, _ in storage.list()}


async def test_input_names_are_those_of_unfinished_jobs(queue: Jobs):
    names = [f"input_{digit * 64}.png" for digit in "abc"]
    assert await queue.input_names() == set()
    running = await queue.submit(spec(names[0], names[1]))
    waiting = await queue.submit(spec(names[1], names[2]))
    await queue.submit(spec())
    await queue.claim()
    await queue.mark_started(running.id)
    assert await queue.input_names() == set(names)
    await queue.cancel(waiting.id)
    assert await queue.input_names() == {names[0], names[1]}
    await queue.complete(running.id, Cancelled("cancelled."))
    assert await queue.input_names() == set()


async def test_chain_is_kept_by_the_queue(queue: Jobs):
    stages = (
        Stage(mode="fg2ble", prompt="an apple"),
        Stage(mode="fgble2bg", prompt="a table", sampler="Euler a", layerdiffuse_stop_at=0.5),
    )
    chain = spec().model_copy(update={"stages": stages, "stores_layers": True})
    first, second = [await queue.submit(chain) for _ in range(2)]
    claimed = await queue.claim()
    assert (claimed.id, claimed.spec) == (first.id, first.spec)
    assert claimed.spec.stages == stages
    # a chain is generated alone
    assert await queue.claim_compatible(claimed, 10**9) is None
    layers = tuple(
        ImageRef(
            key=first.file_name(index),
            seed=1,
            subseed=1,
            width=64,
            height=64,
            size_bytes=1,
            role=role,
            is_opaque=role != "foreground",
        )
        for index, role in enumerate(STACK)
    )
    result = JobResult(images=layers, settings=ModelDefaults(), model_name="apples", model_hash="0")
    await queue.complete(first.id, result)
    view = await queue.view(first.id)
    assert view is not None
    assert view.job.result == result
    assert view.job.spec.stages == stages
    await queue.cancel(second.id)


async def test_upload_is_stored_once_and_gets_a_new_age(storage: Storage):
    data = b"\x89PNG of an apple"
    name = store_input(storage, data)
    assert name == f"input_{hashlib.sha256(data).hexdigest()}.png"
    ((_, _, stored_at),) = storage.list()
    await asyncio.sleep(1.1)  # the clock of a bucket may have seconds
    assert store_input(storage, data) == name
    ((key, size, renewed_at),) = storage.list()
    assert (key, size, await read(storage, name)) == (name, len(data), data)
    assert renewed_at > stored_at


async def test_upload_of_two_jobs_stays_until_both_finish(
    queue: Jobs, storage: Storage, pass_time: Callable[[float], None]
):
    name = store_input(storage, b"\x89PNG")
    first, second = [await queue.submit(spec(name)) for _ in range(2)]
    pass_time(LATER_S)
    for job in (first, second):
        assert await sweep(storage, queue, Limits(images_days=1e-6, images_bytes=1)) == 0
        assert stored_keys(storage) == {name}
        await queue.cancel(job.id)
    with capture_logs() as logs:
        assert await sweep(storage, queue, Limits()) == 1
    assert stored_keys(storage) == set()
    (line,) = [line for line in logs if line["event"] == "retention.completed"]
    assert (line["inputs"], line["pictures"], line["previews"]) == (1, 0, 0)


async def test_input_of_a_queued_job_outlives_retention(
    queue: Jobs, storage: Storage, pass_time: Callable[[float], None]
):
    limits = Limits(images_days=1, jobs_days=1)
    name, unused = store_input(storage, b"\x89PNG named"), store_input(storage, b"\x89PNG unused")
    job = await queue.submit(spec(name))
    pass_time(30 * DAY_S)
    assert await sweep(storage, queue, limits) == 1
    assert stored_keys(storage) == {name}
    assert unused != name
    assert (await queue.claim()).id == job.id
    assert await read(storage, name) == b"\x89PNG named"


async def test_new_upload_without_a_job_survives(
    storage: Storage, pass_time: Callable[[float], None], tmp_path: Path
):
    queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10)
    name = store_input(storage, b"\x89PNG")
    pass_time(INPUT_GRACE_S - 60)
    assert await sweep(storage, queue, Limits()) == 0
    assert stored_keys(storage) == {name}
    await queue.close()


async def test_upload_renewed_during_a_sweep_survives(tmp_path: Path):
    """Store the same image again after the sweep has listed the files."""

    class Renewing(SqliteJobQueue):
        async def input_names(self) -> set[str]:
            names = await super().input_names()
            store_input(storage, b"\x89PNG")
            return names

    storage = open_storage(str(tmp_path / "images"))
    name = store_input(storage, b"\x89PNG")
    os.utime(tmp_path / "images" / name, (0, 0))
    queue = await Renewing.open(tmp_path / "jobs.sqlite", 10)
    assert await sweep(storage, queue, Limits()) == 0
    assert stored_keys(storage) == {name}
    await queue.close()


async def test_services_that_share_a_folder_keep_their_inputs(tmp_path: Path):
    """Sweep from two services, each with a journal that lacks the jobs of the other."""
    storage = open_storage(str(tmp_path / "images"))
    name = store_input(storage, b"\x89PNG")
    own, other = [
        await SqliteJobQueue.open(tmp_path / folder / "jobs.sqlite", 10) for folder in "ab"
    ]
    await own.submit(spec(name))
    for _ in range(3):
        # the sweeps of both services, half an hour later
        half_grace = time.time() - INPUT_GRACE_S / 2 - 60
        os.utime(tmp_path / "images" / name, (half_grace, half_grace))
        for queue in (other, own):
            assert await sweep(storage, queue, Limits()) == 0
        assert (tmp_path / "images" / name).stat().st_mtime > time.time() - 60
    await own.close()
    await other.close()


async def test_input_that_cannot_be_deleted_does_not_stop_others(tmp_path: Path):
    class Guarded(ObjectStorage):
        def delete(self, key: str) -> None:
            if key == kept:
                raise StorageFailed("no right to delete.")
            super().delete(key)

    folder = tmp_path / "images"
    storage = Guarded(open_storage(str(folder))._store, str(folder))
    kept, *deleted = [store_input(storage, b"\x89PNG" + bytes([i])) for i in range(4)]
    foreign = [folder / "input_1.png", folder / f"input_{'a' * 64}.webp"]
    unfinished = folder / f"{deleted[0]}#7"
    for file in (*foreign, unfinished):
        file.write_bytes(b"x")
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    queue = await SqliteJobQueue.open(tmp_path / "jobs.sqlite", 10)
    with capture_logs() as logs:
        assert await sweep(storage, queue, Limits(images_days=1)) == 3
    await queue.close()
    assert {file.name for file in folder.iterdir()} == {kept, *(file.name for file in foreign)}
    assert [(line["event"], line["inputs"]) for line in logs] == [
        ("retention.inputs_kept", 1),
        ("retention.completed", 3),
    ]
