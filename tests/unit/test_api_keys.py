"""The keys file under concurrent commands, expiry, last use, and the limit of wrong keys."""

from __future__ import annotations

import asyncio
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from alphalayer.auth import api_keys, files, store, usage, wrong_keys
from alphalayer.auth.api_keys import SCOPES
from alphalayer.auth.usage import KeyUsage, read_usage
from alphalayer.auth.wrong_keys import PER_MINUTE, WrongKeys
from alphalayer.cli.keys import read_expiry
from alphalayer.core.errors import SetupFailed

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)


def test_add_key_concurrent_commands_lose_no_key(tmp_path: Path):
    file = tmp_path / "keys.json"
    names = [f"client-{i}" for i in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(partial(api_keys.add_key, file), names))
    keys = api_keys.read_keys(file)
    assert keys is not None
    assert sorted(key.name for key in keys) == sorted(names)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"keys.json", "keys.json.lock"}


def test_remove_key_failed_write_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "keys.json"
    api_keys.add_key(file, "shop")
    before = file.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SetupFailed, match="No space left"):
        api_keys.remove_key(file, "shop")
    assert file.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} <= {"keys.json", "keys.json.lock"}
    assert os.name == "nt" or stat.S_IMODE(file.stat().st_mode) == 0o600


def test_read_keys_earlier_file_has_all_scopes(tmp_path: Path):
    file = tmp_path / "keys.json"
    row = f'{{"name": "shop", "sha256": "{"0" * 64}", "per_minute": 5, "queue_share": 0.5}}'
    file.write_text(f"[{row}]")
    (key,) = api_keys.read_keys(file) or []
    assert key.scopes == SCOPES
    assert not key.is_expired


def test_rotate_key_keeps_limits_and_changes_the_secret(tmp_path: Path):
    file = tmp_path / "keys.json"
    first = api_keys.add_key(file, "shop", per_minute=5, scopes=("read",))
    second = api_keys.rotate_key(file, "shop")
    (key,) = api_keys.read_keys(file) or []
    assert key.sha256 == api_keys.digest(second) != api_keys.digest(first)
    assert (key.per_minute, key.scopes) == (5, ("read",))
    with pytest.raises(SetupFailed, match="no key"):
        api_keys.rotate_key(file, "other")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("", None),
        ("30d", NOW + timedelta(days=30)),
        ("12h", NOW + timedelta(hours=12)),
        ("2030-01-31", NOW + timedelta(days=30)),
        ("2030-01-01T02:00+01:00", NOW + timedelta(hours=1)),
    ],
)
def test_read_expiry_reads_lifetimes_and_dates(text: str, moment: datetime | None):
    assert read_expiry(text, NOW) == moment


@pytest.mark.parametrize("text", ["soon", "30", "-1d", "99999999d", "2030-13-01", "2029-12-31"])
def test_read_expiry_refuses_other_texts(text: str):
    with pytest.raises(SetupFailed, match="--expires"):
        read_expiry(text, NOW)


def test_store_logs_the_names_of_changed_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "CHECK_EVERY_S", 0)
    file = tmp_path / "keys.json"
    for name in ("a", "b"):
        api_keys.add_key(file, name)
    keys = store.ApiKeyStore(file, "", is_required=True)
    secrets = [api_keys.add_key(file, "c"), api_keys.rotate_key(file, "b")]
    api_keys.remove_key(file, "a")
    with capture_logs() as logs:
        keys.keys()
    (line,) = logs
    assert line["event"] == "audit.keys_changed"
    assert (line["added"], line["removed"], line["changed"]) == (["c"], ["a"], ["b"])
    assert not any(secret in str(line) for secret in secrets)


async def test_usage_is_stored_at_the_end_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / usage.FILE
    for name in ("a", "b"):
        monkeypatch.setattr(usage.time, "time", lambda name=name: {"a": 1.0, "b": 2.0}[name])
        seen = KeyUsage(file)
        seen.record(name)
        task = asyncio.create_task(seen.run())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert read_usage(file) == {"a": 1.0, "b": 2.0}
    file.write_text("{")
    assert read_usage(file) == {}


def test_usage_unwritable_folder_is_logged_once(tmp_path: Path):
    (tmp_path / "data").touch()
    seen = KeyUsage(tmp_path / "data" / usage.FILE)
    with capture_logs() as logs:
        for _ in range(3):
            seen.record("a")
            seen.store()
    assert [line["event"] for line in logs] == ["api_keys.usage_not_stored"]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_wrong_keys_limit_ends_after_a_minute():
    clock = Clock()
    counts = WrongKeys(clock)
    for i in range(PER_MINUTE):
        assert counts.retry_after_s("10.0.0.1") == 0
        assert counts.record("10.0.0.1") == i + 1
    clock.now = 20.0
    assert counts.retry_after_s("10.0.0.1") == 40
    assert counts.retry_after_s("10.0.0.2") == 0
    clock.now = 60.0
    assert counts.retry_after_s("10.0.0.1") == 0
    assert counts.record("10.0.0.1") == 1


def test_wrong_keys_table_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wrong_keys, "MAX_ADDRESSES", 10)
    counts = WrongKeys(Clock())
    for i in range(100):
        counts.record(f"10.0.0.{i}")
    assert len(counts) == 10


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", 2),
        ("2001:db8:0:1::1", "2001:db8::1", 1),
        ("::ffff:10.0.0.1", "10.0.0.1", 2),
        ("fe80::1%eth0", "fe80::2%eth1", 2),
        ("x" * 100 + "1", "x" * 100 + "2", 2),
    ],
)
def test_wrong_keys_of_one_network_count_together(first: str, second: str, count: int):
    """IPv6 counts by its /64, and names that are no address by their start."""
    counts = WrongKeys(Clock())
    counts.record(first)
    assert counts.record(second) == count
