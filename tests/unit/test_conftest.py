from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.conftest import LONG_FILES, TESTS, THREAD_LIMIT, pytest_collection_modifyitems

CHILD = """
import json, os, torch
print(json.dumps([torch.get_num_threads(), dict(os.environ)]))
"""
PARENT = f"""
import subprocess, sys
import tests.conftest
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
"""


def test_thread_limit_overrides_values_of_child_processes():
    inherited = dict.fromkeys(THREAD_LIMIT, "8") | {
        "OMP_WAIT_POLICY": "ACTIVE",
        "OMP_PROC_BIND": "true",
    }
    output = subprocess.run(
        [sys.executable, "-c", PARENT],
        env={**os.environ, **inherited},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    threads, environment = json.loads(output)
    assert threads == 1
    assert {name: environment[name] for name in THREAD_LIMIT} == THREAD_LIMIT


def test_long_files_exist():
    assert [name for name in LONG_FILES if not (TESTS / name).exists()] == []


def test_long_files_run_first():
    first, last = TESTS / LONG_FILES[0], TESTS / LONG_FILES[-1]
    items = [SimpleNamespace(path=path) for path in (Path(__file__), last, first, last)]
    pytest_collection_modifyitems(items)
    assert [item.path for item in items] == [first, last, last, Path(__file__)]
