"""Packaging: the version, the extras, the lock files and the content of the wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version
from tests.support.serving import free_port

import alphalayer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LOCKED_EXTRAS = {
    "service": {"mcp", "shared", "tracing"},
    "engine": {"engine", "mcp", "planner"},
    "serverless": {"serverless"},
    "dev": {"dev"},
}
UNLOCKED = {"alphalayer", "torch"}
MACHINES = [
    {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": system}
    for python in ("3.10", "3.11", "3.12", "3.13")
    for system in ("linux", "darwin", "win32")
]


@cache
def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@cache
def _locked(name: str) -> list[tuple[Requirement, str]]:
    """Return each entry of a lock file: its requirement and the lines with its hashes."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.findall(
        r"^(\w\S*==[^\n]*?) \\\n((?:    --hash=\S+(?: \\)?\n)+)", text, re.MULTILINE
    )
    return [(Requirement(requirement), hashes) for requirement, hashes in entries]


def _applies(marker: Marker | None, machine: dict[str, str]) -> bool:
    return marker is None or marker.evaluate({**machine, "extra": ""})


def _name(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def test_version_is_written_in_one_place():
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.toml", "*.cff", "*.md", "*.yml", "deploy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    pattern = re.compile(
        rf"""version\w*["']?\s*[:=]\s*["']?{re.escape(alphalayer.__version__)}\b""", re.IGNORECASE
    )
    places = [name for name in files if pattern.search((ROOT / name).read_text(encoding="utf-8"))]
    assert places == ["src/alphalayer/__init__.py"]


def test_version_of_the_openapi_document_is_the_package_version(tmp_path, monkeypatch):
    from alphalayer.config import Settings
    from alphalayer.service.app import create_app

    monkeypatch.chdir(tmp_path)
    assert create_app(Settings()).openapi()["info"]["version"] == alphalayer.__version__


def test_base_install_needs_neither_torch_nor_engine_packages():
    names = {_name(Requirement(line)) for line in _project()["dependencies"]}
    engine = {_name(Requirement(line)) for line in _project()["optional-dependencies"]["engine"]}
    assert "torch" in engine
    assert names & (engine | {"simpy"}) == set()


def test_service_lock_pulls_in_no_engine_package():
    names = {_name(requirement) for requirement, _ in _locked("service")}
    assert names & {"torch", "safetensors", "diffusers", "transformers", "scipy", "simpy"} == set()


@pytest.mark.parametrize("name", LOCKED_EXTRAS)
def test_lock_file_has_hashes_and_no_index(name: str):
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    pins = re.findall(r"^\w\S*==", text, re.MULTILINE)
    assert len(_locked(name)) == len(pins) > 40
    assert (
        re.findall(
            r"^\s*(?:-i|--index-url|--extra-index-url|--find-links)\b|://", text, re.MULTILINE
        )
        == []
    )
    assert not re.search(r"^(torch|triton|nvidia-\S*)==", text, re.MULTILINE)


@pytest.mark.parametrize("name", LOCKED_EXTRAS)
def test_lock_file_satisfies_its_extras(name: str):
    extras = _project()["optional-dependencies"]
    required = [Requirement(line) for line in _project()["dependencies"]]
    for extra in LOCKED_EXTRAS[name]:
        required += map(Requirement, extras[extra])
    nested = {
        extra
        for requirement in required
        if _name(requirement) == "alphalayer"
        for extra in requirement.extras
    }
    required += [Requirement(line) for extra in nested for line in extras[extra]]
    for machine in MACHINES:
        pins: dict[str, Version] = {}
        for pin, _ in _locked(name):
            if _applies(pin.marker, machine):
                assert _name(pin) not in pins, f"two versions for {machine}"
                pins[_name(pin)] = Version(str(pin.specifier).removeprefix("=="))
        for requirement in required:
            if _name(requirement) not in UNLOCKED and _applies(requirement.marker, machine):
                version = pins.get(_name(requirement))
                assert version is not None, (
                    f"{requirement} is not locked for {machine}; run: make lock"
                )
                assert requirement.specifier.contains(version, prereleases=True), (
                    f"{requirement}; run: make lock"
                )


def test_lock_files_agree_on_versions():
    """pip installs several of them in one command, which fails where they differ."""
    everything = {
        (_name(requirement), str(requirement.specifier)) for requirement, _ in _locked("dev")
    }
    for name in ("service", "engine", "serverless"):
        assert {
            (_name(requirement), str(requirement.specifier)) for requirement, _ in _locked(name)
        } <= everything


ALLOWED_LICENCES = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause",
    "BSL-1.0", "CC0-1.0", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Unlicense", "Zlib",
    # names that packages without an SPDX expression use
    "3-Clause BSD License", "Apache License 2.0", "Apache Software License", "BSD", "BSD License",
    "ISC License (ISCL)", "MIT License", "Python Software Foundation License",
    "The Unlicense (Unlicense)",
}  # fmt: skip
"""Permissive licences: they allow any use and bind no other code."""
LICENCE_EXCEPTIONS = {
    "certifi": "MPL-2.0 covers changes of its own files. It is installed unchanged.",
    "tqdm": "MPL-2.0 covers changes of its own files. It is installed unchanged.",
    "paramiko": "LGPL-2.1 allows use as a library. Only the Runpod worker installs it.",
}


def _licences(name: str) -> list[set[str]]:
    """Return the licences of a package: all sets hold, with one choice of each."""
    data = importlib.metadata.metadata(name)
    if expression := data.get("License-Expression"):
        return [set(part.strip("()").split(" OR ")) for part in expression.split(" AND ")]
    prefix = "License :: "
    classifiers = {
        line.rpartition(" :: ")[2]
        for line in data.get_all("Classifier", [])
        if line.startswith(prefix)
    }
    if classifiers:
        return [classifiers]
    return [{part} for part in (data.get("License") or "none").strip().split(" AND ")]


@pytest.mark.parametrize("lock", ["engine", "service", "serverless"])
def test_installed_packages_have_allowed_licences(lock: str):
    """Read the metadata of the packages, apart from those of other systems."""
    names = {
        _name(pin)
        for pin, _ in _locked(lock)
        if pin.marker is None or pin.marker.evaluate({"extra": ""})
    } | {"torch"}
    refused: dict[str, list[set[str]]] = {}
    for name in names:
        licences = _licences(name)
        if not all(choices & ALLOWED_LICENCES for choices in licences):
            refused[name] = licences
    assert {name: refused[name] for name in refused.keys() - LICENCE_EXCEPTIONS} == {}


def test_licence_exceptions_are_needed():
    locked = {
        _name(pin) for lock in ("engine", "service", "serverless") for pin, _ in _locked(lock)
    }
    assert locked >= LICENCE_EXCEPTIONS.keys()
    for name in LICENCE_EXCEPTIONS:
        assert not all(choices & ALLOWED_LICENCES for choices in _licences(name)), name


def test_torch_version_is_pinned_in_one_place():
    line = (ROOT / "requirements" / "torch.txt").read_text(encoding="utf-8").strip()
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", line)
    version = line.removeprefix("torch==")
    for name in (
        "run.py",
        "pyproject.toml",
        "Makefile",
        "requirements/uv.toml",
        "deploy/docker/Dockerfile",
    ):
        assert version not in (ROOT / name).read_text(encoding="utf-8"), name


def test_torch_hashes_are_of_the_pinned_version():
    pins = [
        line.removesuffix(" \\")
        for line in (ROOT / "requirements" / "torch-hashes.txt").read_text("utf-8").splitlines()
        if line.startswith("torch")
    ]
    assert pins == [(ROOT / "requirements" / "torch.txt").read_text("utf-8").strip()]


def test_images_of_others_are_pinned_by_digest():
    """Find the base image, and the services of the examples."""
    deploy = ROOT / "deploy"
    names = re.findall(r"^ARG PYTHON_IMAGE=(.+)$", (deploy / "docker/Dockerfile").read_text(), re.M)
    for file in [*(deploy / "kubernetes").glob("*.yaml"), deploy / "docker/compose.yaml"]:
        names += re.findall(r"^ +image: +(\S+)", file.read_text(), re.M)
    others = [name for name in names if not name.startswith("alphalayer")]
    assert len(others) == 6
    for name in others:
        assert re.search(r":[\w.-]+@sha256:[0-9a-f]{64}}?$", name), name


def test_wheel_has_type_marker_data_and_version(tmp_path):
    pytest.importorskip("hatchling")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, tmp_path], cwd=ROOT, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"alphalayer-{alphalayer.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"alphalayer-{alphalayer.__version__}.dist-info/METADATA").decode()
    assert {"alphalayer/py.typed", "alphalayer/__main__.py"} <= names
    for folder in ("builtin_models", "web"):
        assert any(name.startswith(f"alphalayer/{folder}/") for name in names)
    torch_lines = re.findall(r"^Requires-Dist: torch\b.*$", metadata, re.MULTILINE)
    assert len(torch_lines) >= 1
    assert [line for line in torch_lines if "extra ==" not in line] == []


def test_command_and_module_start_the_same_program():
    module, _, function = _project()["scripts"]["alphalayer"].partition(":")
    tree = ast.parse((ROOT / "src" / "alphalayer" / "__main__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert [(node.module, node.names[0].name) for node in imports] == [(module, function)]


_COMMANDS_WITHOUT_EXTRAS = """
import contextlib, importlib.abc, importlib.util, io, json, sys
missing, commands = json.loads(sys.argv[1])
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in missing else find_spec(name, *rest)
import alphalayer.service.app
from alphalayer.cli import app, console
answers = []
for command in commands:
    sys.argv[1:] = command
    console.err.file = io.StringIO()
    try:
        app.main()
    except SystemExit as end:
        answers.append([end.code, console.err.file.getvalue()])
sys.__stdout__.write("\\n" + json.dumps(answers))
"""


def test_commands_without_an_extra_name_it(tmp_path):
    """Run commands in a process without the packages of the extras engine and planner."""
    missing = ["torch", "diffusers", "transformers", "accelerate", "safetensors", "scipy", "simpy"]
    commands = {
        "engine": ["generate", "an apple"],
        "engine ": ["serve", "--port", str(free_port())],
        "planner": ["plan", "--users", "5"],
        "": ["--help"],
    }
    run = [
        sys.executable,
        "-c",
        _COMMANDS_WITHOUT_EXTRAS,
        json.dumps([missing, list(commands.values())]),
    ]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    for extra, (code, message) in zip(commands, answers, strict=True):
        if extra:
            assert (
                code,
                bool(re.search(rf"is not installed\. Run: .*\[{extra.strip()}\]", message)),
            ) == (1, True), message
        else:
            assert code == 0
