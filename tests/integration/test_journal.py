"""Schema of the journal: an older version is migrated completely or not at all."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import structlog.testing

from alphalayer.core.errors import SetupFailed
from alphalayer.core.job import ImageRef, Job, JobResult, JobSpec
from alphalayer.core.request import GenerationRequest, ModelDefaults
from alphalayer.jobs import table
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.jobs.table import MIGRATIONS, VERSION, jobs
from alphalayer.worker.messages import Render, read_command, write_message

# as the version before changes of images and chains wrote it
RECORDED_SPEC = Path(__file__).parent / "data" / "spec-before-edits.json"
LATER_COLUMNS = (
    "webhook_due",
    "webhook_tries",
    "queue_id",
    "digest",
    "cancel_asked",
    "wanted_by",
    "delivery",
    "traceparent",
)


def create_first_version(file: Path) -> None:
    """Create a journal of the first version, with one queued job."""
    columns = [column for column in jobs.columns.keys() if column not in LATER_COLUMNS]  # noqa: SIM118
    with closing(sqlite3.connect(file)) as journal, journal:
        journal.execute(
            "CREATE TABLE jobs (id VARCHAR(32) PRIMARY KEY, state VARCHAR(16) NOT NULL, "
            "owner VARCHAR(100) NOT NULL DEFAULT '', idempotency_key VARCHAR(200), "
            "created_at FLOAT NOT NULL, started_at FLOAT, finished_at FLOAT, "
            "starts INTEGER NOT NULL DEFAULT 0, spec TEXT NOT NULL, result TEXT, error TEXT, "
            "UNIQUE (owner, idempotency_key))"
        )
        spec = json.dumps({"generation": {"prompt": "an old apple"}})
        values = ("a" * 24, "queued", "", None, 1.0, None, None, 0, spec, None, None)
        journal.execute(
            f"INSERT INTO jobs ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
            values,
        )
        journal.execute("PRAGMA user_version = 1")


async def test_journal_of_first_version_is_migrated(tmp_path: Path):
    file = tmp_path / "jobs.sqlite"
    create_first_version(file)
    with structlog.testing.capture_logs() as logs:
        job_queue = await SqliteJobQueue.open(file, 10)
    assert [(line["event"], line["from_version"]) for line in logs] == [("journal.migrated", 1)]
    job: Job = await job_queue.claim()
    assert job.spec.generation.prompt == "an old apple"
    assert await job_queue.claim_due_webhooks(5) == []
    await job_queue.close()
    with closing(sqlite3.connect(file)) as journal, journal:
        assert journal.execute("PRAGMA user_version").fetchone() == (VERSION,)


async def test_journal_failed_migration_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "jobs.sqlite"
    create_first_version(file)
    with monkeypatch.context() as patch:
        patch.setattr(
            table, "MIGRATIONS", (MIGRATIONS[0], ("SELECT no_such_function()",), *MIGRATIONS[2:])
        )
        with pytest.raises(SetupFailed, match="no_such_function"):
            await SqliteJobQueue.open(file, 10)
    with closing(sqlite3.connect(file)) as journal, journal:
        columns = {row[1] for row in journal.execute("PRAGMA table_info(jobs)")}
        assert not columns & set(LATER_COLUMNS)
        assert journal.execute("PRAGMA user_version").fetchone() == (1,)
    job_queue = await SqliteJobQueue.open(file, 10)
    assert (await job_queue.claim()).spec.generation.prompt == "an old apple"
    await job_queue.close()


async def test_journal_folder_with_special_characters_opens(tmp_path: Path):
    file = tmp_path / "a?b" / "c%20d" / "jobs.sqlite"
    await (await SqliteJobQueue.open(file, 10)).close()
    assert {path.name for path in file.parent.iterdir()} >= {"jobs.sqlite", "jobs.sqlite.lock"}


async def test_row_with_a_prompt_over_the_limit_of_bytes_is_readable(tmp_path: Path):
    file = tmp_path / "jobs.sqlite"
    emoji = "\U0001f600" * 5000
    job_queue = await SqliteJobQueue.open(file, 10)
    job_ids: list[str] = []
    for _ in range(2):
        new = await job_queue.submit(JobSpec(generation=GenerationRequest(prompt="an apple")))
        job_ids.append(new.id)
    await job_queue.claim()
    result = JobResult(images=(), settings=ModelDefaults(), model_name="m", model_hash="h")
    await job_queue.complete(job_ids[0], result)
    await job_queue.close()
    with closing(sqlite3.connect(file)) as journal, journal:
        for field in ("prompt", "negative_prompt"):
            journal.execute(
                f"UPDATE jobs SET spec = json_set(spec, '$.generation.{field}', ?)", [emoji]
            )
    job_queue = await SqliteJobQueue.open(file, 10)
    assert (await job_queue.view(job_ids[0])).job.state.value == "done"
    queued = await job_queue.claim()
    assert (queued.id, queued.spec.generation.prompt) == (job_ids[1], emoji)
    line = write_message(Render(jobs=(queued,)))
    assert read_command(line).jobs[0].spec == queued.spec  # as the engine process gets it
    await job_queue.close()


async def test_result_without_stage_seconds_is_readable(tmp_path: Path):
    file = tmp_path / "jobs.sqlite"
    job_queue = await SqliteJobQueue.open(file, 10)
    await job_queue.submit(JobSpec(generation=GenerationRequest(prompt="an apple")))
    job = await job_queue.claim()
    result = JobResult(
        images=(), settings=ModelDefaults(), model_name="m", model_hash="h", seconds={"sample": 2.5}
    )
    await job_queue.complete(job.id, result)
    assert (await job_queue.view(job.id)).job.result.seconds == {"sample": 2.5}
    await job_queue.close()
    with closing(sqlite3.connect(file)) as journal, journal:
        journal.execute("UPDATE jobs SET result = json_remove(result, '$.seconds')")
    job_queue = await SqliteJobQueue.open(file, 10)
    view = await job_queue.view(job.id)
    assert (view.job.state.value, view.job.result.seconds) == ("done", {})
    await job_queue.close()


def test_spec_of_the_version_before_is_readable():
    recorded = json.loads(RECORDED_SPEC.read_text())
    spec = JobSpec.model_validate(recorded)
    assert (spec.generation.mode, spec.generation.steps) == ("fg2ble", 12)
    assert [tuple(seeds) for seeds in spec.seeds] == [(7, 1)]


def test_stored_job_without_later_fields_has_none_of_them():
    recorded = json.loads(RECORDED_SPEC.read_text())
    request = GenerationRequest.model_validate(recorded["generation"])
    job = Job.new(JobSpec(generation=request, iterations=2, previews=True))
    image = ImageRef(key="k", seed=1, subseed=1, width=64, height=64, size_bytes=1)
    result = JobResult(images=(image,), settings=ModelDefaults(), model_name="m", model_hash="h")
    row = table.row_of(job.model_copy(update={"result": result}))
    stored = json.loads(row["spec"])
    assert stored.keys() <= recorded.keys()
    assert stored["generation"].keys() <= recorded["generation"].keys()
    assert stored["generation"]["inputs"][0].keys() == recorded["generation"]["inputs"][0].keys()
    assert "is_opaque" not in json.loads(row["result"])["images"][0]
    assert JobSpec.model_validate(stored) == job.spec
