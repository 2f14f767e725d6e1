#!/usr/bin/env python3
"""Set up and run Alphalayer with nothing but Python.

    python3 run.py generate "an apple"   generate an image into outputs/
    python3 run.py layers "an apple"     generate foreground and background
    python3 run.py serve                 start the service: web page and HTTP API
    python3 run.py test                  run the tests
    python3 run.py models                list, pull and verify models
    python3 run.py keys                  add, list and remove API keys
    python3 run.py doctor                diagnose the installation
    python3 run.py info FILE             show the settings of an image
    python3 run.py plan                  estimate the number of GPUs for a number of users
    python3 run.py mcp                   run an MCP server over stdio
    python3 run.py serverless            run a worker for Runpod serverless
    python3 run.py version               show the version

Each command has --help.

The first start creates `.venv` beside this file and installs the packages of the lock files in
requirements/. torch is installed for the GPU if there is one, else for the CPU. Later starts
take no extra time. This script uses the standard library only.

    --cpu, --cuda     before the command: the build of torch (or ALPHALAYER_TORCH=cpu|cuda)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

if os.name == "nt":
    import msvcrt
else:
    import fcntl

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "alphalayer-setup.json"
LOG = VENV / "alphalayer-setup.log"
LOCK = ROOT / ".venv.lock"
TORCH = (ROOT / "requirements" / "torch.txt").read_text(encoding="utf-8").strip()
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
OLDEST, NEWEST = (3, 10), (3, 13)
PARALLEL = ["-n", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
"""Default pytest options: many tests wait, so four processes use two cores.

The order of the files is that of `tests/conftest.py`: the longest ones first.
"""


def main(arguments: list[str]) -> int:
    """Install what is missing, then run the command."""
    original = list(arguments)
    torch_build = os.environ.get("ALPHALAYER_TORCH", "")
    while arguments and arguments[0] in ("--cpu", "--cuda"):
        torch_build = arguments.pop(0)[2:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if torch_build not in ("", "cpu", "cuda"):
        fail(
            f'ALPHALAYER_TORCH is "{torch_build}".',
            "Set it to cpu or cuda, or unset it to detect the GPU.",
        )
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        return restart_with_another_python(original)
    is_test = arguments[0] == "test"
    set_up(torch_build or ("cuda" if has_nvidia_gpu() else "cpu"), is_test)
    if is_test:
        return run([str(PYTHON), "-m", "pytest", *(arguments[1:] or PARALLEL)])
    return run([str(PYTHON), "-m", "alphalayer", *arguments])


def set_up(torch_build: str, with_tests: bool) -> None:
    """Install the locked packages, torch and Alphalayer, unless all are current."""
    python = ".".join(map(str, sys.version_info[:3]))
    required = {
        "project": project_digest(),
        "python": python,
        "torch": torch_build,
        "root": str(ROOT),
    }
    if is_current(read_stamp(), required, with_tests):
        return
    with exclusive_set_up():
        stamp = read_stamp()
        if is_current(stamp, required, with_tests):
            return
        # packages of the tests stay current once installed, so that the stamp stays true
        with_tests = with_tests or stamp.get("tests", False)
        start = time.monotonic()
        if not is_venv_of(python, stamp):
            report("1/4 creating .venv")
            create_venv()
        report("2/4 installing packages" + (", also those of the tests" if with_tests else ""))
        pip("install", "--no-deps", "--require-hashes", "--requirement", str(lock_file(with_tests)))
        device = "GPU" if torch_build == "cuda" else "CPU"
        report(f"3/4 installing torch for the {device} (large; takes minutes the first time)")
        install_torch(torch_build, replace=stamp.get("torch") != torch_build)
        report("4/4 installing alphalayer")
        pip("install", "--no-deps", "--editable", str(ROOT))
        STAMP.write_text(json.dumps({**required, "tests": with_tests}), encoding="utf-8")
        report(f"ready after {time.monotonic() - start:.0f} s")


def lock_file(with_tests: bool) -> Path:
    """Return the lock file to install: for `generate` and `serve`, or for all tests."""
    return ROOT / "requirements" / ("dev.txt" if with_tests else "engine.txt")


def project_digest() -> str:
    """Return a hash of the files that decide what is installed."""
    digest = hashlib.sha256()
    files = (
        ROOT / "pyproject.toml",
        ROOT / "requirements" / "torch.txt",
        lock_file(False),
        lock_file(True),
    )
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def is_current(stamp: dict, required: dict, with_tests: bool) -> bool:
    """Return whether the last set-up installed everything that is required."""
    return stamp.get("tests", False) >= with_tests and all(
        stamp.get(key) == value for key, value in required.items()
    )


@contextlib.contextmanager
def exclusive_set_up() -> Iterator[None]:
    """Wait for other set-ups in this folder and block them until the end."""
    try:
        file = LOCK.open("a")
    except OSError as error:
        fail(
            f"cannot write {LOCK}: {error.strerror}.",
            "The set-up is installed into this folder: copy the folder to a writable place.",
        )
    with file:
        if not lock(file):
            report("waiting for another set-up in this folder")
            while not lock(file):
                time.sleep(0.2)
        yield  # closing the file releases the lock, also after a crash


def lock(file: TextIO) -> bool:
    """Lock the file; return False if another process holds the lock."""
    try:
        if os.name == "nt":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def read_stamp() -> dict:
    """Return what the last complete set-up installed; empty if there is none."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_venv_of(python: str, stamp: dict) -> bool:
    """Return whether `.venv` works, has this Python version and was created here."""
    if not PYTHON.exists() or stamp.get("root", str(ROOT)) != str(ROOT):
        return False
    command = [str(PYTHON), "-c", "import platform; print(platform.python_version())"]
    answer = subprocess.run(command, **QUIET)
    return answer.returncode == 0 and answer.stdout.strip() == python


def create_venv() -> None:
    """Create `.venv`; without its own pip where the system's Python lacks ensurepip."""
    shutil.rmtree(VENV, ignore_errors=True)
    result = subprocess.run([sys.executable, "-m", "venv", str(VENV)], **QUIET)
    if result.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        command = [sys.executable, "-m", "venv", "--without-pip", str(VENV)]
        result = subprocess.run(command, **QUIET)
    if result.returncode:
        fail(
            "cannot create .venv: " + result.stdout[-500:],
            "On Debian and Ubuntu: apt install python3-venv python3-pip",
        )


def install_torch(build: str, replace: bool) -> None:
    """Install torch for CUDA, or its smallest build for the CPU.

    The default index is preferred. It has no CUDA build for Windows.

    Args:
        build: "cuda" or "cpu".
        replace: Whether to replace another build of the same version.
    """
    # without these options pip keeps any build of the right version
    replacing = ("--force-reinstall", "--no-deps") if replace else ()
    from_default_index = True
    if build == "cuda" and sys.platform == "win32":
        from_default_index = not pip("install", *replacing, "--index-url", CUDA_INDEX, TORCH)
    elif build == "cpu" and sys.platform != "darwin" and not has_cpu_build_in_default_index():
        from_cpu_index = ("--retries", "0", "--index-url", CPU_INDEX)
        from_default_index = not pip("install", *replacing, *from_cpu_index, TORCH, must=False)
        if from_default_index:
            report("    no CPU build is available; installing the default build, which is large")
    if from_default_index and replace:
        pip("install", *replacing, TORCH)
    pip("install", TORCH)


def has_cpu_build_in_default_index() -> bool:
    """Return whether pip would install a torch for the CPU alone."""
    dry_run = ("--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-")
    plan = pip("install", *dry_run, TORCH, must=False)
    return "%2Bcpu" in plan or "+cpu" in plan


def pip(*arguments: str, must: bool = True) -> str:
    """Run pip for `.venv` and return its output.

    Args:
        arguments: Arguments of pip.
        must: Whether a failure ends the program. Otherwise the output is then empty.
    """
    own_pip = subprocess.run([str(PYTHON), "-m", "pip", "--version"], **QUIET)
    command = [str(PYTHON), "-m", "pip"]
    if own_pip.returncode:
        command = [sys.executable, "-m", "pip", "--python", str(PYTHON)]
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ pip {' '.join(arguments)}\n")
    code, output = run_logged([*command, *arguments, "--disable-pip-version-check"])
    if code and must:
        last_lines = "\n".join(output.strip().splitlines()[-30:])
        fail(
            f"pip {' '.join(arguments)} failed:\n{last_lines}",
            "Check the connection and run the same command again; it continues where it stopped. "
            f"The full log is in {LOG}.",
        )
    return "" if code else output or "done"


def run_logged(command: list[str]) -> tuple[int, str]:
    """Run a command into the log; return its exit code and output.

    On a terminal, show the elapsed seconds and the last line meanwhile.
    """
    start, begin, width = time.monotonic(), LOG.stat().st_size, 0

    def output() -> str:
        return LOG.read_bytes()[begin:].decode(errors="replace")

    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PIP_PROGRESS_BAR": "off"}
    streams = {"stderr": subprocess.STDOUT, "env": environment}
    with LOG.open("a") as log, subprocess.Popen(command, stdout=log, **streams) as process:
        while True:
            try:
                process.wait(1)
                break
            except subprocess.TimeoutExpired:
                if not sys.stderr.isatty():
                    continue
            last_line = (output().strip().splitlines() or [""])[-1].strip()
            line = f"    {time.monotonic() - start:.0f} s  {last_line}"
            line = line[: shutil.get_terminal_size().columns - 1]
            print(f"\r{line:<{width}}", end="", file=sys.stderr, flush=True)
            width = len(line)
    if width:
        print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)
    return process.returncode, output()


def has_nvidia_gpu() -> bool:
    """Return whether `nvidia-smi` lists at least one GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], timeout=30, **QUIET)
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0 and "GPU" in answer.stdout


def restart_with_another_python(arguments: list[str]) -> int:
    """Find a supported Python and run this script with it."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        other = shutil.which(f"python3.{minor}")
        if other:
            return run([other, str(ROOT / "run.py"), *arguments])
    version = ".".join(map(str, sys.version_info[:2]))
    fail(
        f"this is Python {version}; Alphalayer needs Python 3.10 to 3.13.",
        "Install one of them, for instance python3.12.",
    )
    return 1


def run(command: list[str]) -> int:
    """Replace this process by the command; on Windows run it and wait."""
    os.environ["ALPHALAYER_STARTED_BY"] = "py run.py" if os.name == "nt" else "python3 run.py"
    if os.name == "nt":
        try:
            return subprocess.run(command, check=False).returncode
        except KeyboardInterrupt:
            return 130
    sys.stdout.flush()
    os.execv(command[0], command)
    return 0


def report(line: str) -> None:
    """Print a line about the set-up to stderr."""
    print(line, file=sys.stderr, flush=True)


def fail(message: str, hint: str) -> None:
    """End the program with a message and a hint."""
    report(f"error: {message}\n{hint}")
    raise SystemExit(1)


QUIET = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
