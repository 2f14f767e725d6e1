#!/usr/bin/env python3
"""Set up and run Alphalayer with nothing but Python.

    python3 run.py generate "an apple"   draw a picture into outputs/
    python3 run.py serve                 start the service: a page, and the HTTP interface
    python3 run.py test                  run the tests
    python3 run.py models                list, pull, verify: the models
    python3 run.py keys                  add, list, remove: who may use the service
    python3 run.py doctor                say what is wrong on this machine and what to do
    python3 run.py info FILE             show the settings that made a picture
    python3 run.py plan                  say how many GPUs a number of users needs
    python3 run.py mcp | serverless | version
                                         a tool of assistants; a worker of Runpod; the version

Each explains itself with --help.

Makes `.venv` beside this file, installs torch (for the GPU that is there, else for the CPU) and Alphalayer into it, and hands everything
else to the `alphalayer` command. The second time it starts at once. Standard library only.

    --cpu, --cuda     before the command: which build of torch (also ALPHALAYER_TORCH=cpu|cuda)
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
TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
OLDEST, NEWEST = (3, 10), (3, 13)
TWO_AT_ONCE = ["-n", "2", "--dist", "loadfile"]
"""All tests in two processes, since many of them wait."""


def main(arguments: list[str]) -> int:
    """Set up what is missing, then run the command."""
    given = list(arguments)
    torch_build = os.environ.get("ALPHALAYER_TORCH", "")
    while arguments and arguments[0] in ("--cpu", "--cuda"):
        torch_build = arguments.pop(0)[2:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if torch_build not in ("", "cpu", "cuda"):
        fail(f'ALPHALAYER_TORCH is "{torch_build}".', "It can be cpu or cuda; without it, the machine is asked.")
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        return restart_with_another_python(given)
    is_test = arguments[0] == "test"
    set_up(torch_build or ("cuda" if has_nvidia_gpu() else "cpu"), is_test)
    if is_test:
        return run([str(PYTHON), "-m", "pytest", *(arguments[1:] or TWO_AT_ONCE)])
    return run([str(PYTHON), "-m", "alphalayer", *arguments])


def set_up(torch_build: str, with_tests: bool) -> None:
    """Bring `.venv` to what pyproject.toml asks for, unless a stamp says that it is there."""
    project = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    python = ".".join(map(str, sys.version_info[:3]))
    wanted = {"project": project, "python": python, "torch": torch_build, "root": str(ROOT)}
    if fits(read_stamp(), wanted, with_tests):
        return
    with alone():
        stamp = read_stamp()
        if fits(stamp, wanted, with_tests):
            return
        # what was installed once is kept current, so that the stamp stays true
        with_tests = with_tests or stamp.get("tests", False)
        start = time.monotonic()
        if not is_venv_of(python, stamp):
            say("1/3 making .venv")
            make_venv()
        device = "GPU" if torch_build == "cuda" else "CPU"
        say(f"2/3 installing torch for the {device} (the largest part; minutes the first time)")
        install_torch(torch_build, replace=stamp.get("torch") != torch_build)
        say("3/3 installing alphalayer" + (" and its tests" if with_tests else ""))
        pip("install", "--editable", f"{ROOT}[{'dev' if with_tests else 'mcp'}]")
        STAMP.write_text(json.dumps({**wanted, "tests": with_tests}))
        say(f"ready after {time.monotonic() - start:.0f} s")


def fits(stamp: dict, wanted: dict, with_tests: bool) -> bool:
    """Whether the last set-up was for what is wanted, or for more."""
    return all(stamp.get(key) == value for key, value in wanted.items()) and stamp.get("tests", False) >= with_tests


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other set-up is at work in this folder, and keep others waiting meanwhile."""
    try:
        file = LOCK.open("a")
    except OSError as error:
        fail(
            f"cannot write {LOCK}: {error.strerror}.",
            "What is needed is set up in this folder: copy it to one that you may write to.",
        )
    with file:
        if not lock(file):
            say("another set-up is at work in this folder; waiting for its end")
            while not lock(file):
                time.sleep(0.2)
        yield  # the system takes the lock away with the file, however this ends


def lock(file: TextIO) -> bool:
    """Whether the file could be locked; no if another process has it."""
    try:
        if os.name == "nt":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def read_stamp() -> dict:
    """What the last complete set-up was for."""
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def is_venv_of(python: str, stamp: dict) -> bool:
    """Whether there is a `.venv` that works, of this Python, made in this place."""
    if not PYTHON.exists() or stamp.get("root", str(ROOT)) != str(ROOT):
        return False
    asked = subprocess.run([str(PYTHON), "-c", "import platform; print(platform.python_version())"], **QUIET)
    return asked.returncode == 0 and asked.stdout.strip() == python


def make_venv() -> None:
    """Make `.venv`, without a pip of its own where the system's Python cannot give it one."""
    shutil.rmtree(VENV, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], **QUIET)
    if made.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        made = subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(VENV)], **QUIET)
    if made.returncode:
        fail("cannot make .venv: " + made.stdout[-500:], "On Debian and Ubuntu: apt install python3-venv python3-pip")


def install_torch(build: str, replace: bool) -> None:
    """torch for CUDA, or for the CPU the smallest build that can be had; in the place of another build if `replace`.

    From the registry where that has it. For Windows it has none with CUDA.
    """
    # without these, pip leaves the build that is there: it is of the right version
    replacing = ("--force-reinstall", "--no-deps") if replace else ()
    from_registry = True
    if build == "cuda" and sys.platform == "win32":
        from_registry = not pip("install", *replacing, "--index-url", CUDA_INDEX, TORCH)
    elif build == "cpu" and sys.platform != "darwin" and not registry_has_cpu_build():
        from_cpu_index = ("--retries", "0", "--index-url", CPU_INDEX)
        from_registry = not pip("install", *replacing, *from_cpu_index, TORCH, must=False)
        if from_registry:
            say("    no CPU build can be had; installing the usual one, which is large")
    if from_registry and replace:
        pip("install", *replacing, TORCH)
    pip("install", TORCH)


def registry_has_cpu_build() -> bool:
    """Whether the torch that pip would install is one for the CPU alone."""
    looking = ("--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-")
    found = pip("install", *looking, TORCH, must=False)
    return "%2Bcpu" in found or "+cpu" in found


def pip(*arguments: str, must: bool = True) -> str:
    """Run pip for `.venv`; its output, empty after a failure that may be. A failure that may not be ends the program."""
    has_own = subprocess.run([str(PYTHON), "-m", "pip", "--version"], **QUIET).returncode == 0
    command = [str(PYTHON), "-m", "pip"] if has_own else [sys.executable, "-m", "pip", "--python", str(PYTHON)]
    with LOG.open("a") as log:
        log.write(f"$ pip {' '.join(arguments)}\n")
    code, output = watch([*command, *arguments, "--disable-pip-version-check"])
    if code and must:
        last = "\n".join(output.strip().splitlines()[-30:])
        hint = (
            f"Check the connection and run the same command again; it goes on where it stopped. All of it is in {LOG}."
        )
        fail(f"pip {' '.join(arguments)} failed:\n{last}", hint)
    return "" if code else output or "done"


def watch(command: list[str]) -> tuple[int, str]:
    """Run a command into the log: its exit code and output. On a terminal, show the seconds and the last line of it meanwhile."""
    start, begin, shown = time.monotonic(), LOG.stat().st_size, 0

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
            last = (output().strip().splitlines() or [""])[-1].strip()
            line = f"    {time.monotonic() - start:.0f} s  {last}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r{line:<{shown}}", end="", file=sys.stderr, flush=True)
            shown = len(line)
    if shown:
        print(f"\r{'':<{shown}}\r", end="", file=sys.stderr, flush=True)
    return process.returncode, output()


def has_nvidia_gpu() -> bool:
    """Whether `nvidia-smi` answers with at least one GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    try:
        asked = subprocess.run(["nvidia-smi", "-L"], timeout=30, **QUIET)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0 and "GPU" in asked.stdout


def restart_with_another_python(arguments: list[str]) -> int:
    """Look for a Python that fits and start over with it."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        other = shutil.which(f"python3.{minor}")
        if other:
            return run([other, str(ROOT / "run.py"), *arguments])
    here = ".".join(map(str, sys.version_info[:2]))
    fail(
        f"this is Python {here}; Alphalayer needs Python 3.10 to 3.13.", "Install one of them, for instance python3.12."
    )
    return 1


def run(command: list[str]) -> int:
    """Become the command where the system can do that, else wait for it."""
    os.environ["ALPHALAYER_STARTED_BY"] = "py run.py" if os.name == "nt" else "python3 run.py"
    if os.name == "nt":
        try:
            return subprocess.run(command, check=False).returncode
        except KeyboardInterrupt:
            return 130
    sys.stdout.flush()
    os.execv(command[0], command)
    return 0


def say(line: str) -> None:
    """Tell on stderr how far the set-up is."""
    print(line, file=sys.stderr, flush=True)


def fail(what: str, hint: str) -> None:
    """End the program with what happened and what to do."""
    say(f"error: {what}\n{hint}")
    raise SystemExit(1)


QUIET = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
