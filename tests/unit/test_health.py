"""Readiness: a service without space, or with a storage that refuses, is not ready."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from alphalayer.core.errors import EngineFailed, StorageFailed
from alphalayer.core.job import JobResult
from alphalayer.core.request import ModelDefaults
from alphalayer.service.health import Health, StorageProbe
from alphalayer.storage import disk

RESULT = JobResult(images=(), settings=ModelDefaults(), model_name="m", model_hash="h")


class CheckedStorage:
    """A storage that counts its checks and fails while it has an error."""

    def __init__(self) -> None:
        self.error = ""
        self.writes: list[bool] = []

    def check(self, *, is_writing: bool) -> None:
        self.writes.append(is_writing)
        if self.error:
            raise StorageFailed(self.error)


def readiness(problem: str | None) -> dict[str, Any]:
    pool: Any = SimpleNamespace(is_ready=True, states=lambda: {"cpu": "ready"})
    shutdown: Any = SimpleNamespace(has_begun=False)
    return Health(pool, shutdown, lambda: problem, lambda: ("m", None), True).readiness()


def test_readiness_names_the_problem_of_the_storage():
    assert readiness(None)["ready"] is True
    full = readiness("the disk is full.")
    assert (full["ready"], full["problem"]) == (False, "the disk is full.")


async def test_probe_never_writes_while_writes_succeed():
    storage: Any = CheckedStorage()
    probe = StorageProbe(storage)
    probe.record_outcome(RESULT)
    probe.record_outcome(EngineFailed("it broke."))
    for _ in range(3):
        await probe.check()
    assert (probe.problem, storage.writes) == (None, [False] * 3)


async def test_probe_writes_after_a_failed_write_until_one_succeeds():
    storage: Any = CheckedStorage()
    probe = StorageProbe(storage)
    probe.record_outcome(StorageFailed("cannot write."))
    assert probe.problem == "cannot write."
    storage.error = "still refused."
    with capture_logs() as logs:
        await probe.check()
        assert probe.problem == "still refused."
        storage.error = ""
        for _ in range(2):
            await probe.check()
    assert (probe.problem, storage.writes) == (None, [True, True, False])
    assert [line["event"] for line in logs] == ["storage.recovered"]
    probe.record_outcome(StorageFailed("cannot write."))
    probe.record_outcome(RESULT)
    assert probe.problem is None


async def test_probe_reports_a_storage_that_cannot_be_read():
    storage: Any = CheckedStorage()
    probe = StorageProbe(storage)
    storage.error = "no response."
    with capture_logs() as logs:
        for _ in range(2):
            await probe.check()
    assert [line["event"] for line in logs] == ["storage.unavailable"]
    assert probe.problem == "no response."
    storage.error = ""
    await probe.check()
    assert (probe.problem, storage.writes) == (None, [False] * 3)


def test_folder_problem_is_space_or_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert disk.find_problem(tmp_path / "new" / "folder", "the images") is None
    with monkeypatch.context() as patch:
        usage = SimpleNamespace(free=disk.MIN_FREE_BYTES - 1)
        patch.setattr(shutil, "disk_usage", lambda _path: usage)
        assert "16.0 MB left" in (disk.find_problem(tmp_path, "the images") or "")
    monkeypatch.setattr("os.access", lambda *_: False)
    problem = disk.find_problem(tmp_path, "the images")
    assert problem == "the folder of the images cannot be written to."
