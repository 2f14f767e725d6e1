"""The shared queue by TLS, on a real PostgreSQL that answers by nothing else."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from tests.integration.test_job_queues import result_of, soon, spec
from tests.support.servers import Postgres, postgres_programs

from alphalayer.core.errors import SetupFailed
from alphalayer.core.job import JobState
from alphalayer.jobs.postgres import PostgresJobQueue


def can_tls(programs: Path) -> bool:
    """Whether this PostgreSQL was built with OpenSSL: the one of the wheel is not."""
    told = subprocess.run(
        [programs / "pg_config", "--configure"], capture_output=True, text=True, check=False
    )
    return "openssl" in told.stdout


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def postgres(authority: trustme.CA) -> Iterator[Postgres]:
    programs = postgres_programs()
    if not programs or not can_tls(programs):
        pytest.skip("needs a PostgreSQL with TLS: apt-get install postgresql")
    server = Postgres(certificate=authority.issue_cert("127.0.0.1"))
    yield server
    server.remove()


def file_of(authority: trustme.CA, folder: Path) -> Path:
    path = folder / "root.pem"
    authority.cert_pem.write_to_path(path)
    return path


async def test_a_job_goes_by_tls_to_a_server_whose_certificate_is_checked(
    postgres, authority, tmp_path
):
    root = file_of(authority, tmp_path)
    url = f"{postgres.fresh_database()}?sslmode=verify-full&sslrootcert={root}"
    queue = await PostgresJobQueue.open(url, 10)
    try:
        job = await queue.submit(spec())
        assert (await soon(queue.claim())).id == job.id
        await queue.mark_started(job.id)
        await queue.complete(job.id, result_of(job.spec))
        assert (await soon(queue.wait(job.id))).state is JobState.DONE
        async with queue._transaction() as (connection, _):
            by_tls = (
                "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
                "WHERE datname = current_database()"
            )
            connections = (await connection.exec_driver_sql(by_tls)).scalars().all()
        assert len(connections) >= 2  # one for news, one or more for statements
        assert all(connections)
    finally:
        await queue.close()


async def test_a_server_with_another_certificate_or_without_tls_is_not_spoken_to(
    postgres, tmp_path
):
    url = postgres.fresh_database()
    stranger = file_of(trustme.CA(), tmp_path)
    with pytest.raises(SetupFailed, match="certificate verify failed"):
        await PostgresJobQueue.open(f"{url}?sslmode=verify-full&sslrootcert={stranger}", 10)
    with pytest.raises(SetupFailed, match="no encryption"):
        await PostgresJobQueue.open(f"{url}?sslmode=disable", 10)
