"""The OpenAPI document describes every answer to valid and invalid requests of schemathesis.

The default run makes some hundred requests. `SCHEMATHESIS_EXAMPLES=40` makes more than 2,000, to
routes with like bodies, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.serving import put_model, served

CONFIGURATION = """
[[operations]]
include-path-regex = "^/(alpha/v1/(jobs|...2img)|sdapi/v1/(...2img|extra-.*|png-info|options))$"
include-method = "POST"
checks.positive_data_acceptance.enabled = false

[[operations]]
include-path-regex = "^/v1/images/(generations|edits)$"
include-method = "POST"
checks.positive_data_acceptance.enabled = false
checks.negative_data_rejection.enabled = false

[[operations]]
include-path-regex = "^/alpha/v1/convert/"
checks.positive_data_acceptance.enabled = false

[[operations]]
include-path-regex = "^/alpha/v1/jobs/"
checks.use_after_free.enabled = false
"""
"""Checks that are off, because a schema cannot describe what they need.

These are: text that is the base64 of an image, fields that depend on each other, every spelling
of a sampler, null as an absent value. A cancelled job can still be read after DELETE.
"""
BY_DESIGN = "events|readyz|jobs/(img2img|layers)$|interrogate|variations"
"""Excluded routes: an endless answer, a 503 by design, paths that also have the form of a job's,
and those that are not implemented.
"""
ALIKE = "img2img|extra-batch|/layers$"
"""Routes that the default run leaves out, because their bodies have the fields of others."""


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with served(put_model(tmp_path_factory.mktemp("service"))) as client:
        yield client


def test_openapi_examples_are_accepted(client):
    """Send the examples that "Try it out" shows."""
    description = client.get("/openapi.json").json()
    for path in (
        "/alpha/v1/txt2img",
        "/alpha/v1/img2img",
        "/alpha/v1/layers",
        "/alpha/v1/jobs",
        "/alpha/v1/jobs/img2img",
        "/alpha/v1/jobs/layers",
        "/sdapi/v1/txt2img",
        "/sdapi/v1/img2img",
        "/v1/images/generations",
    ):
        content = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schema = description["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
        (example,) = schema["examples"]
        assert client.post(path, json=example).status_code == (202 if "/jobs" in path else 200), (
            path
        )


def test_openapi_documents_every_answer(client, tmp_path):
    examples = os.environ.get("SCHEMATHESIS_EXAMPLES")
    excluded = BY_DESIGN if examples else f"{BY_DESIGN}|{ALIKE}"
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    done = subprocess.run(
        [
            *(
                str(Path(sys.executable).parent / "schemathesis"),
                "--config-file",
                "schemathesis.toml",
            ),
            *("run", f"{client.base_url}/openapi.json".replace("//openapi", "/openapi")),
            *(
                "--max-examples",
                examples or "2",
                "--exclude-path-regex",
                excluded,
                "--request-timeout",
                "60",
                "--seed",
                "1",
            ),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "NO_COLOR": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
