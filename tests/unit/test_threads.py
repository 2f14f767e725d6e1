"""Threads of torch: their number by the container's CPU quota, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphalayer.core.control_groups import cpu_quota, memory_limit
from alphalayer.engine.threads import COUNTS, WAITING, configure_threads


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return an environment without variables of threads, on a machine of 64 cores."""
    cleaned = {name: value for name, value in os.environ.items() if name not in COUNTS + WAITING}
    monkeypatch.setattr(os, "environ", cleaned)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    return cleaned


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


V2, V1 = "0::/\n", "5:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n0::/docker/ab\n"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a.slice/b.service\n",
                "sys/fs/cgroup/a.slice/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/a.slice/b.service/cpu.max": "max 100000\n",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            4.0,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({}, None),
    ],
    ids=["v2", "v2 unlimited", "v2 parent", "v1", "v1 unlimited", "no control groups"],
)
def test_cpu_quota_is_that_of_the_control_groups(
    tmp_path: Path, files: dict[str, str], quota: float | None
):
    assert cpu_quota(_write(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("200000", "2"), ("50000", "1"), ("250000", "2"), ("max", None), ("6400000", None)],
)
def test_threads_are_at_most_the_quota(
    environment: dict[str, str], tmp_path: Path, quota: str, threads: str | None
):
    files = {"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"}
    configure_threads(_write(tmp_path, files))
    assert environment.get("OMP_NUM_THREADS") == threads
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", COUNTS + WAITING)
def test_threads_of_the_user_are_kept(environment: dict[str, str], tmp_path: Path, name: str):
    files = {"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "200000 100000\n"}
    environment[name] = "7"
    before = {*environment}
    configure_threads(_write(tmp_path, files))
    assert environment[name] == "7"
    assert {*environment} - before == (
        {"OMP_WAIT_POLICY"} if name in COUNTS else {"OMP_NUM_THREADS"}
    )


@pytest.mark.parametrize("module", ["alphalayer.worker.render", "alphalayer.integrations.runpod"])
def test_no_torch_before_the_threads_are_configured(module: str):
    """Import what a process imports before `load_engine` configures its threads."""
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_torch_takes_the_configured_threads(environment: dict[str, str], tmp_path: Path):
    """Start a process that configures its threads and prints how many torch takes."""
    files = {"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "100000 100000\n"}
    script = (
        "import os, pathlib, sys; os.sched_getaffinity = lambda _: range(64)\n"
        "from alphalayer.engine.threads import configure_threads\n"
        "configure_threads(pathlib.Path(sys.argv[1]))\n"
        "import torch; print(torch.get_num_threads())"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(_write(tmp_path, files))],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout
    assert output.split() == ["1"]


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/memory.max": "1000000\n"}, 1_000_000),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/memory.max": "max\n"}, None),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes": "2000\n",
            },
            2000,
        ),
        ({}, None),
    ],
)
def test_memory_limit_is_read(files: dict[str, str], limit: int | None, tmp_path: Path):
    assert memory_limit(_write(tmp_path, files)) == limit
