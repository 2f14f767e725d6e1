"""The start script `run.py`: the choice of torch, the state of the set-up, and the command.

Nothing is installed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from alphalayer.cli.app import COMMANDS

SCRIPT = Path(__file__).parents[2] / "run.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script as a module, for a project in an empty folder."""
    spec = importlib.util.spec_from_file_location("run_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text("[project]")
    (tmp_path / "requirements").mkdir()
    for name in ("torch", "engine", "dev"):
        (tmp_path / "requirements" / f"{name}.txt").write_text(f"# {name}")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "alphalayer-setup.json")
    monkeypatch.setattr(module, "LOG", tmp_path / ".venv" / "alphalayer-setup.log")
    monkeypatch.setattr(module, "LOCK", tmp_path / ".venv.lock")
    monkeypatch.setattr(module, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.delenv("ALPHALAYER_TORCH", raising=False)
    return module


def test_script_imports_the_standard_library_only():
    names = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names <= set(sys.stdlib_module_names)


# --- choosing torch


def _write_nvidia_smi(folder: Path, answer: str, code: int = 0) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("answer", "code", "expected"),
    [
        ("GPU 0: NVIDIA RTX 3060 (UUID: GPU-1)", 0, True),
        ("No devices were found", 0, False),
        ("GPU lost", 9, False),
        (None, 0, False),
    ],
)
def test_has_nvidia_gpu_if_the_driver_lists_one(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: str | None,
    code: int,
    expected: bool,
):
    monkeypatch.setenv("PATH", str(tmp_path))
    if answer is not None:
        _write_nvidia_smi(tmp_path, answer, code)
    assert script.has_nvidia_gpu() is expected


def _torch_wheel(folder: Path, version: str) -> None:
    """Write an empty wheel of torch with a version."""
    folder.mkdir()
    about = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")


def test_install_torch_replaces_another_build_of_the_version(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Run the real pip, for which 2.13.0+cpu satisfies 2.13.0."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    venv.create(script.VENV, clear=True)
    number = script.TORCH.removeprefix("torch==")
    for build, version in (("cpu", f"{number}+cpu"), ("cuda", number)):
        _torch_wheel(tmp_path / build, version)
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / build))
        script.install_torch(build, replace=True)
        assert [path.name for path in script.VENV.rglob("torch-*.dist-info")] == [
            f"torch-{version}.dist-info"
        ]


@pytest.mark.parametrize(("build", "index"), [("cuda", "CUDA_INDEX"), ("cpu", "CPU_INDEX")])
def test_install_torch_on_windows_uses_the_index_of_pytorch(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, build: str, index: str
):
    """Use the index of PyTorch, because PyPI has no CUDA build for Windows."""
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        script, "pip", lambda *arguments, must=True: calls.append(arguments) or "done"
    )
    monkeypatch.setattr(script.sys, "platform", "win32")
    script.install_torch(build, replace=True)
    monkeypatch.undo()
    assert {"--force-reinstall", "--no-deps", getattr(script, index)} <= set(calls[-2])
    assert calls[-1] == ("install", script.TORCH)


@pytest.fixture
def done(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record what `main` sets up and runs, instead of packages and another process."""
    calls: list[Any] = []
    monkeypatch.setattr(
        script, "set_up", lambda build, with_tests: calls.append((build, with_tests))
    )
    monkeypatch.setattr(script, "run", lambda command: calls.append(command) or 0)
    return calls


@pytest.mark.parametrize(
    ("arguments", "environment", "has_gpu", "expected"),
    [
        (["doctor"], "", False, "cpu"),
        (["doctor"], "", True, "cuda"),
        (["--cpu", "doctor"], "", True, "cpu"),
        (["--cuda", "doctor"], "", False, "cuda"),
        (["doctor"], "cpu", True, "cpu"),
        (["--cuda", "doctor"], "cpu", False, "cuda"),
    ],
)
def test_torch_build_follows_flag_then_environment_then_gpu(
    script: ModuleType,
    done: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    arguments,
    environment,
    has_gpu,
    expected,
):
    monkeypatch.setenv("ALPHALAYER_TORCH", environment)
    monkeypatch.setattr(script, "has_nvidia_gpu", lambda: has_gpu)
    assert script.main(arguments) == 0
    assert done[0] == (expected, False)
    assert done[1] == [str(script.PYTHON), "-m", "alphalayer", "doctor"]


def test_script_passes_commands_on_unchanged(script: ModuleType, done: list[Any]):
    script.main(["--cpu", "generate", "an apple, high quality", "--cpu", "--steps", "4"])
    assert done[1][3:] == ["generate", "an apple, high quality", "--cpu", "--steps", "4"]


def test_script_test_runs_pytest_with_its_packages(script: ModuleType, done: list[Any]):
    script.main(["--cpu", "test", "-k", "noise"])
    script.main(["--cpu", "test"])
    pytest_alone = [str(script.PYTHON), "-m", "pytest"]
    assert done[1::2] == [[*pytest_alone, "-k", "noise"], [*pytest_alone, *script.PARALLEL]]
    assert done[::2] == [("cpu", True)] * 2


def test_script_without_a_command_prints_help(
    script: ModuleType, done: list[Any], capsys: pytest.CaptureFixture[str]
):
    assert script.main([]) == 2
    assert "python3 run.py generate" in capsys.readouterr().out
    assert done == []


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--cpu", "--help"]])
def test_script_help_sets_nothing_up(
    script: ModuleType, done: list[Any], capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    assert script.main(arguments) == 0
    assert "python3 run.py serve" in capsys.readouterr().out
    assert done == []


def test_script_on_new_python_restarts_with_a_supported_one(
    script: ModuleType, done: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(script, "NEWEST", (3, 12))
    monkeypatch.setattr(script.sys, "version_info", (3, 99, 0))
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/bin/{name}")
    script.main(["--cpu", "generate", "an apple"])
    assert done == [
        ["/bin/python3.12", str(script.ROOT / "run.py"), "--cpu", "generate", "an apple"]
    ]


def test_script_unknown_torch_build_is_named(
    script: ModuleType, done: list[Any], monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("ALPHALAYER_TORCH", "gpu")
    with pytest.raises(SystemExit):
        script.main(["doctor"])
    assert 'ALPHALAYER_TORCH is "gpu"' in capsys.readouterr().err
    assert done == []


# --- the stamp


def _stamp(script: ModuleType, **changes: Any) -> None:
    stamp = {
        "project": script.project_digest(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": "cpu",
        "root": str(script.ROOT),
        "tests": True,
    }
    script.STAMP.write_text(json.dumps({**stamp, **changes}))


@pytest.fixture
def steps(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the steps of a set-up instead of running them."""
    calls: list[Any] = []
    monkeypatch.setattr(script, "is_venv_of", lambda python, stamp: True)
    monkeypatch.setattr(script, "install_torch", lambda build, replace: calls.append(build))
    monkeypatch.setattr(script, "pip", lambda *arguments, must=True: calls.append(arguments))
    monkeypatch.setattr(script, "report", lambda line: None)
    return calls


@pytest.mark.parametrize("with_tests", [False, True])
def test_set_up_with_a_current_stamp_does_nothing(
    script: ModuleType, steps: list[Any], with_tests: bool
):
    _stamp(script)
    script.set_up("cpu", with_tests)
    assert steps == []


@pytest.mark.parametrize(
    ("changes", "build", "with_tests"),
    [
        ({"project": "other"}, "cpu", False),
        ({"python": "3.9.0"}, "cpu", False),
        ({"root": "/elsewhere"}, "cpu", False),
        ({}, "cuda", False),
        ({"tests": False}, "cpu", True),
    ],
)
def test_set_up_with_an_outdated_stamp_runs_again(
    script: ModuleType, steps: list[Any], changes, build, with_tests
):
    _stamp(script, **changes)
    script.set_up(build, with_tests)
    # installed packages of the tests are updated, too: else the stamp would be false
    tests_requested = with_tests or changes.get("tests", True)
    lock = script.ROOT / "requirements" / ("dev.txt" if tests_requested else "engine.txt")
    assert steps[0] == ("install", "--no-deps", "--require-hashes", "--requirement", str(lock))
    assert steps[1] == build
    assert steps[2] == ("install", "--no-deps", "--editable", str(script.ROOT))
    written = script.read_stamp()
    assert written["torch"] == build
    assert written["tests"] is tests_requested
    steps.clear()
    script.set_up(build, with_tests)
    assert steps == []


def test_set_up_twice_at_once_runs_once(script: ModuleType, steps: list[Any]):
    waiting = threading.Event()
    script.report = lambda line: waiting.set()
    with ThreadPoolExecutor() as pool:
        with script.exclusive_set_up():
            second = pool.submit(script.set_up, "cpu", False)
            assert waiting.wait(10)
            assert steps == []
            _stamp(script)
        second.result(10)
    assert steps == []


@pytest.mark.parametrize("content", [None, "", "{", "\udcff"])
def test_read_stamp_missing_or_damaged_is_empty(script: ModuleType, content: str | None):
    if content is not None:
        script.STAMP.write_bytes(content.encode(errors="surrogateescape"))
    assert script.read_stamp() == {}


def test_is_venv_of_compares_python_and_folder(script: ModuleType):
    here = ".".join(map(str, sys.version_info[:3]))
    assert not script.is_venv_of(here, {}), "there is none"
    script.PYTHON.symlink_to(sys.executable)
    assert script.is_venv_of(here, {})
    assert not script.is_venv_of("3.9.0", {})
    assert not script.is_venv_of(here, {"root": "/elsewhere"})


def test_fail_prints_two_lines_and_exits_1(script: ModuleType, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        script.fail("no venv", "Install it.")
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: no venv\nInstall it.\n"


def test_pip_failure_is_shown_and_logged(script: ModuleType, capsys: pytest.CaptureFixture[str]):
    script.PYTHON.symlink_to(sys.executable)
    with pytest.raises(SystemExit):
        script.pip("no-such-command")
    assert "pip no-such-command failed" in capsys.readouterr().err
    assert "$ pip no-such-command" in script.LOG.read_text()
    assert script.pip("no-such-command", must=False) == ""


def test_script_runs_in_a_process():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_run_logged_shows_progress_on_a_terminal(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    import pty

    reader, here = pty.openpty()
    script.LOG.touch()
    with os.fdopen(here, "w") as terminal:
        monkeypatch.setattr(script.sys, "stderr", terminal)
        slow = (
            "import time; print('Downloading torch (196.5 MB)'); time.sleep(1.5); "
            "print('end'); raise SystemExit(3)"
        )
        assert script.run_logged([sys.executable, "-c", slow]) == (
            3,
            "Downloading torch (196.5 MB)\nend\n",
        )
        assert "1 s  Downloading torch (196.5 MB)" in os.read(reader, 1000).decode()
    os.close(reader)


# --- start lines of AUTOMATIC1111 and Forge


def test_launch_script_help_needs_no_set_up(tmp_path: Path):
    command = [sys.executable, str(SCRIPT.with_name("launch.py")), "--listen", "-h"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "coming-from-forge.md" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    "line", ["COMMANDLINE_ARGS='--port 9'", "export COMMANDLINE_ARGS='--port 9'"]
)
def test_webui_script_reads_webui_user_sh(tmp_path: Path, line: str):
    script = shutil.copy(SCRIPT.with_name("webui.sh"), tmp_path)
    (tmp_path / "launch.py").write_text(
        "import os, sys; print(os.environ.get('COMMANDLINE_ARGS'), sys.argv[1:])"
    )

    def start() -> str:
        kept = {name: value for name, value in os.environ.items() if name != "COMMANDLINE_ARGS"}
        done = subprocess.run(
            [script, "--api"], env=kept, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    assert start() == "None ['--api']\n"
    (tmp_path / "webui-user.sh").write_text(f"#!/bin/bash\n{line}\n")
    assert start() == "--port 9 ['--api']\n"


def test_set_up_in_a_read_only_folder_is_one_line(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(
        script, "LOCK", tmp_path / "absent" / ".venv.lock"
    )  # as good as one without the right to it
    with pytest.raises(SystemExit, match="1"), script.exclusive_set_up():
        pass
    assert capsys.readouterr().err.startswith(
        f"error: cannot write {tmp_path / 'absent' / '.venv.lock'}: "
    )


def test_script_help_names_every_command(script: ModuleType):
    words = set((script.__doc__ or "").split())
    assert {name for name, entry in COMMANDS.items() if not entry.is_hidden} <= words
