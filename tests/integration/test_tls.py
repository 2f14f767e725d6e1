"""The shared queue by TLS, on a real PostgreSQL that accepts nothing else."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from tests.integration.test_job_queues import result_of, spec, within
from tests.support.servers import Postgres, postgres_programs

from alphalayer.core.errors import SetupFailed
from alphalayer.core.job import JobState
from alphalayer.jobs.postgres import PostgresJobQueue


def has_tls(programs: Path) -> bool:
    """Return whether PostgreSQL was built with OpenSSL, unlike that of the wheel."""
    result = subprocess.run(
        [programs / "pg_config", "--configure"], capture_output=True, text=True, check=False
    )
    return "openssl" in result.stdout


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def postgres(authority: trustme.CA) -> Iterator[Postgres]:
    programs = postgres_programs()
    if not programs or not has_tls(programs):
        pytest.skip("needs a PostgreSQL with TLS: apt-get install postgresql")
    server = Postgres(certificate=authority.issue_cert("127.0.0.1"))
    yield server
    server.remove()


def write_certificate(authority: trustme.CA, folder: Path) -> Path:
    path = folder / "root.pem"
    authority.cert_pem.write_to_path(path)
    return path


async def test_queue_by_tls_with_valid_certificate_completes_a_job(postgres, authority, tmp_path):
    root = write_certificate(authority, tmp_path)
    url = f"{postgres.fresh_database()}?sslmode=verify-full&sslrootcert={root}"
    queue = await PostgresJobQueue.open(url, 10)
    try:
        job = await queue.submit(spec())
        assert (await within(queue.claim())).id == job.id
        await queue.mark_started(job.id)
        await queue.complete(job.id, result_of(job.spec))
        assert (await within(queue.wait(job.id))).state is JobState.DONE
        async with queue._transaction() as (connection, _):
            by_tls = (
                "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
                "WHERE datname = current_database()"
            )
            connections = (await connection.exec_driver_sql(by_tls)).scalars().all()
        assert len(connections) >= 2  # one for notifications, one or more for statements
        assert all(connections)
    finally:
        await queue.close()


async def test_queue_with_wrong_certificate_or_no_tls_is_refused(postgres, tmp_path):
    url = postgres.fresh_database()
    other_root = write_certificate(trustme.CA(), tmp_path)
    with pytest.raises(SetupFailed, match="certificate verify failed"):
        await PostgresJobQueue.open(f"{url}?sslmode=verify-full&sslrootcert={other_root}", 10)
    with pytest.raises(SetupFailed, match="no encryption"):
        await PostgresJobQueue.open(f"{url}?sslmode=disable", 10)
