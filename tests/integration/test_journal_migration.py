"""A journal of version 6 opens in this version, and its jobs continue; see `data/README.md`.

The tests run on SQLite and on PostgreSQL, with the same rows.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from pgqueuer import Queries
from pgqueuer.types import QueueManagerId
from tests.integration.test_webhooks import SECRET, Receiver
from tests.support.serving import put_lora, put_model, served, wait_until

from alphalayer.core.job import Job
from alphalayer.images import codecs
from alphalayer.jobs.claims import claim, model_key
from alphalayer.jobs.sqlite import SqliteJobQueue
from alphalayer.jobs.table import VERSION, Journal

DATA = Path(__file__).parent / "data"
RECORDED_URL = "http://127.0.0.1:1/hook"
SEEDS = {
    "running": [9],
    "queued_native": [10],
    "queued_a1111": [11],
    "queued_a1111_opaque": [12],
    "queued_webhook": [13],
    "queued_batch": [14, 15, 16, 17, 18, 19],
    "queued_openai": [15, 16],
}
"""Seeds of the images of each open job, oldest job first."""


POSTGRES_V6 = (
    "CREATE TABLE alphalayer_version (version INTEGER NOT NULL)",
    "INSERT INTO alphalayer_version VALUES (6)",
    """CREATE TABLE jobs (
        id VARCHAR(32) NOT NULL PRIMARY KEY, state VARCHAR(16) NOT NULL,
        owner VARCHAR(100) DEFAULT '' NOT NULL, idempotency_key VARCHAR(200),
        created_at FLOAT NOT NULL, started_at FLOAT, finished_at FLOAT,
        starts INTEGER DEFAULT 0 NOT NULL, spec TEXT NOT NULL, result TEXT, error TEXT,
        webhook_due FLOAT, webhook_tries INTEGER DEFAULT 0 NOT NULL, queue_id BIGINT,
        digest VARCHAR(64), cancel_asked BOOLEAN DEFAULT false NOT NULL,
        wanted_by INTEGER DEFAULT 1 NOT NULL, UNIQUE (owner, idempotency_key))""",
    "CREATE INDEX ix_jobs_state_created_at ON jobs (state, created_at)",
    "CREATE INDEX ix_jobs_created_at ON jobs (created_at)",
    "CREATE INDEX ix_jobs_webhook_due ON jobs (webhook_due)",
)
"""Tables of version 6, as that version created them in PostgreSQL."""


@dataclass
class Migrated:
    """A service on the migrated journal, after all its jobs are done."""

    client: httpx.Client
    receiver: Receiver
    folder: Path
    recorded: dict[str, dict[str, Any]]
    location: Path | str
    """File or address of the journal."""

    def repeat(self, name: str) -> Any:
        """Send the recorded request of a job again."""
        request = self.recorded[name]["request"]
        response = self.client.post(
            request["path"], json=request["json"], headers=request["headers"]
        )
        return response.raise_for_status().json()

    def job(self, name: str) -> dict[str, Any]:
        """Return the answer of the job's own path."""
        return self.client.get(f"/alpha/v1/jobs/{self.recorded[name]['id']}").json()

    def list_jobs(self) -> list[dict[str, Any]]:
        """Return all jobs."""
        return self.client.get("/alpha/v1/jobs", params={"limit": 200}).json()["jobs"]

    def stored(self, name: str) -> list[tuple[Any, str | None]]:
        """Return pixels and infotext of each image of a job."""
        files = [self.folder / "outputs" / image["filename"] for image in self.job(name)["images"]]
        return [codecs.decode(file.read_bytes()) for file in files]

    def journal(self) -> dict[str, Job]:
        """Read each job from the journal's file, by its name."""

        async def read() -> list[Job]:
            journal = await Journal.open(self.location)
            try:
                return await journal.list(limit=200)
            finally:
                await journal.close()

        by_id = {job.id: job for job in asyncio.run(read())}
        return {name: by_id[record["id"]] for name, record in self.recorded.items()}


def copy_journal(folder: Path) -> Path:
    """Copy the journal of version 6 to where a service in `folder` looks for it."""
    file = folder / "data" / "jobs.sqlite"
    file.parent.mkdir(parents=True)
    shutil.copy(DATA / "journal-v6.sqlite", file)
    return file


async def copy_to_postgres(file: Path, url: str) -> None:
    """Copy a journal of version 6 to PostgreSQL, with the queue of that version.

    The worker of the running job is lost.
    """
    with closing(sqlite3.connect(file)) as journal:
        journal.row_factory = sqlite3.Row
        rows = journal.execute("SELECT * FROM jobs ORDER BY created_at").fetchall()
    connection = await asyncpg.connect(url)
    try:
        queue = Queries.from_asyncpg_connection(connection)
        await queue.install()
        for statement in POSTGRES_V6:
            await connection.execute(statement)
        for row in rows:
            values = {**row, "cancel_asked": bool(row["cancel_asked"])}
            if row["state"] in ("queued", "running"):
                model = json.loads(row["spec"])["generation"]["model"]
                entrypoint = f"{model_key(model)}/{row['id'][:16]}"
                [values["queue_id"]] = await queue.enqueue(entrypoint, row["id"].encode())
            if row["state"] == "running":
                lost = QueueManagerId(uuid.uuid4())
                assert await claim(queue, lost, entrypoint)
            places = ", ".join(f"${i + 1}" for i in range(len(values)))
            names = ", ".join(values)
            insert = f"INSERT INTO jobs ({names}) VALUES ({places})"
            await connection.execute(insert, *values.values())
        await connection.execute("UPDATE pgqueuer SET heartbeat = heartbeat - interval '1 hour'")
    finally:
        await connection.close()


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def migrated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Migrated]:
    folder = tmp_path_factory.mktemp("service")
    put_lora(put_model(folder))
    shutil.copytree(DATA / "journal-v6-images", folder / "outputs")
    jobs = json.loads((DATA / "journal-v6.json").read_text(encoding="utf-8"))["jobs"]
    location: Path | str = copy_journal(folder)
    settings: dict[str, Any] = {
        "api_auth": "ann:secret",
        "public_url": "http://alpha.example",
        "webhook_secret": SECRET,
        "webhook_allow_private": True,
        "keep_jobs_days": 0,
    }
    with Receiver() as receiver:
        with closing(sqlite3.connect(location)) as journal, journal:
            change = "UPDATE jobs SET spec = replace(spec, ?, ?)"
            journal.execute(change, (RECORDED_URL, receiver.url))
        if request.param == "postgres":
            settings["database"] = url = request.getfixturevalue("postgres").fresh_database()
            asyncio.run(copy_to_postgres(location, url))
            location.unlink()
            location = url
        with served(folder, **settings) as client:
            client.auth = ("ann", "secret")
            recorded = {job["name"]: job for job in jobs}
            service = Migrated(client, receiver, folder, recorded, location)
            final = {"done", "failed", "cancelled"}
            wait_until(lambda: {job["state"] for job in service.list_jobs()} <= final, 60)
            yield service


async def test_journal_v6_opens_and_becomes_current(tmp_path: Path):
    file = copy_journal(tmp_path)
    queue = await SqliteJobQueue.open(file, 10)
    states = [view.job.state.value for view in await queue.list()]
    await queue.close()
    assert sorted(states) == ["cancelled"] + ["done"] * 2 + ["queued"] * 7
    with closing(sqlite3.connect(file)) as journal:
        assert journal.execute("PRAGMA user_version").fetchone() == (VERSION,)


@pytest.mark.parametrize("name", ["done_native", "done_a1111", "cancelled"])
def test_finished_job_answers_as_before(migrated: Migrated, name: str):
    job = migrated.job(name)
    # the journal of that commit stored the seconds, and its answers did not show them
    assert job.pop("seconds").keys() == ({"sample"} if name.startswith("done") else set())
    assert job.pop("warnings") == []
    # answers of that commit had neither documents nor roles
    assert job.pop("documents") == []
    assert {image.pop("role") for image in job["images"]} <= {"image"}
    assert job == migrated.recorded[name]["job"]


@pytest.mark.parametrize("name", ["done_native", "done_a1111"])
def test_repeated_request_gets_recorded_answer(migrated: Migrated, name: str):
    answer, request = (migrated.recorded[name][part] for part in ("answer", "request"))
    request = request["json"]
    # the fake engine at that commit left the variation seed out of its infotext
    strength = "Variation seed strength"
    answer["info"] = answer["info"].replace(strength, f"Variation seed: 3, {strength}")
    repeated = migrated.repeat(name)
    info, recorded = json.loads(repeated.pop("info")), json.loads(answer.pop("info"))
    # numbers were text in that version
    for number in ("layerdiffusion_weight", "layerdiffusion_ending_step"):
        recorded["extra_generation_params"][number] = 1.0
    assert info == recorded
    # the echo is of the request as this version reads it
    echo, _ = repeated.pop("parameters", {}), answer.pop("parameters", {})
    assert {field: echo[field] for field in echo.keys() & request} == {
        field: request[field] for field in echo.keys() & request
    }
    assert repeated.pop("seconds", {}).keys() <= {"sample"}
    for image in repeated.get("images", []) if name == "done_native" else []:
        assert image.pop("role") == "image"
    assert repeated == answer
    assert len(migrated.list_jobs()) == len(migrated.recorded)


def test_stored_images_are_served_unchanged(migrated: Migrated):
    for file in (DATA / "journal-v6-images").iterdir():
        assert migrated.client.get(f"/alpha/v1/file/{file.name}").content == file.read_bytes()


@pytest.mark.parametrize("name", SEEDS)
def test_open_job_is_generated_with_its_seeds(migrated: Migrated, name: str):
    job = migrated.job(name)
    assert (job["state"], [image["seed"] for image in job["images"]]) == ("done", SEEDS[name])
    generation = migrated.recorded[name]["row"]["spec"]["generation"]
    first = migrated.journal()[name].result.images[0]
    assert (first.seed, first.subseed) == (generation["seed"], generation["subseed"])


def test_open_jobs_are_generated_oldest_first(migrated: Migrated):
    jobs = migrated.journal()
    started = sorted(SEEDS, key=lambda name: jobs[name].started_at)
    if isinstance(migrated.location, Path):
        assert started == list(SEEDS)
    # a worker of a shared queue prefers its loaded model, and takes lost jobs over later
    for model in ("apples", None):
        names = [name for name in SEEDS if jobs[name].spec.generation.model == model]
        queued = [name for name in names if name != "running"]
        assert [name for name in started if name in queued] == queued


@pytest.mark.parametrize("name", SEEDS)
def test_generated_request_equals_the_recorded_one(migrated: Migrated, name: str):
    recorded = migrated.recorded[name]["row"]["spec"]
    spec = migrated.journal()[name].spec.model_dump(mode="json")
    assert (spec["output"], spec["iterations"]) == (recorded["output"], recorded["iterations"])
    options = dict(recorded["generation"])
    layerdiffuse = options.pop("layerdiffuse")
    options["loras"] = [{**lora, "text_weight": None} for lora in options["loras"]]
    assert {field: spec["generation"][field] for field in options} == options
    mode = layerdiffuse["method"] if layerdiffuse["enabled"] else "opaque"
    assert spec["generation"]["mode"] == mode
    assert spec["generation"]["layerdiffuse_weight"] == layerdiffuse["weight"]
    assert spec["generation"]["layerdiffuse_stop_at"] == layerdiffuse["stop_at"]


def test_stored_images_have_recorded_output(migrated: Migrated):
    for name, color in (("queued_batch", (0x33, 0x66, 0x99)), ("queued_openai", (255, 255, 255))):
        for pixels, _ in migrated.stored(name):
            assert (pixels[..., 3] == 255).all()
            assert abs(pixels[0, 0, :3].astype(int) - color).max() <= 8
    images = migrated.job("queued_batch")["images"]
    assert all(image["filename"].endswith(".webp") for image in images)
    (pixels, _), *_ = migrated.stored("queued_native")
    assert pixels.shape == (64, 128, 4)
    ((_, infotext),) = migrated.stored("queued_a1111")
    assert "Generate Transparent Image (Conv Injection)" in (infotext or "")


def test_running_job_counts_a_second_start(migrated: Migrated):
    assert migrated.journal()["running"].starts == 2


def test_webhook_of_queued_job_is_sent_once(migrated: Migrated):
    wait_until(lambda: migrated.receiver.requests)
    ((_, headers, body),) = migrated.receiver.requests
    assert headers["webhook-signature"].startswith("v1,")
    assert json.loads(body) == migrated.job("queued_webhook")


def test_repeated_queued_request_gets_the_same_job(migrated: Migrated):
    assert migrated.repeat("queued_webhook")["id"] == migrated.recorded["queued_webhook"]["id"]
    assert len(migrated.list_jobs()) == len(migrated.recorded)
