"""Stress test of pods and workers that share PostgreSQL and S3 behind Nginx.

It kills them at random while clients request images, and restarts PostgreSQL once. Then every
accepted job must have ended once, and every pod and Nginx must serve every image. Linux only:
`python -m tests.stress.pods --jobs 2000 --kills 60 --real 1 --write benchmarks/results/pods.json`.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.stress.crowd import Crowd
from tests.stress.report import write_report
from tests.support import fake_service
from tests.support.processes import suspended
from tests.support.servers import Postgres, nginx, s3_server
from tests.support.serving import answers, free_port, wait_until

STEP_S = 0.01


class Node:
    """A pod that answers requests, or a worker that generates."""

    def __init__(
        self,
        folder: Path,
        role: str,
        environment: dict[str, str],
        queue_limit: int = 500,
        outputs: Path | None = None,
        step_s: float = STEP_S,
    ):
        """Start the node. `outputs` is a folder of images that several nodes share."""
        folder.mkdir()
        if outputs:
            (folder / "outputs").symlink_to(outputs)
        self._folder, self._port, self._queue_limit = folder, free_port(), queue_limit
        self._step_s = step_s
        self._environment = {**environment, "ALPHALAYER_ROLE": role}
        self.address = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        """Start the process."""
        self._process = fake_service.start(
            self._folder, self._port, self._step_s, self._queue_limit, self._environment
        )

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self._process.kill()
        self._process.wait()

    def problem(self) -> str:
        """Return why the node is not ready, and the end of its log."""
        try:
            readiness = httpx.get(f"{self.address}/readyz", trust_env=False, timeout=10).text
        except httpx.TransportError as error:
            readiness = repr(error)
        return readiness + (self._folder / "service.log").read_text()[-2000:]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the process and its engine, as on a host that stands still."""
        with suspended(self._process.pid):
            yield

    def stop(self) -> None:
        """Terminate the process, and kill it if it does not end."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def answers(self) -> bool:
        """Return whether the node is ready."""
        return answers(self.address)


def run(
    folder: Path,
    shared: dict[str, str],
    *,
    pods: int,
    workers: int,
    jobs: int,
    kills: int,
    seed: int = 0,
    real: int = 0,
    patience_s: float = 120.0,
) -> dict[str, Any]:
    """Kill nodes at random while clients request images; return `Crowd.count`.

    Without Nginx, clients send requests to the pods.

    Args:
        folder: Where every node keeps its files.
        shared: The environment with the bucket.
        pods: The number of pods.
        workers: The number of workers.
        jobs: The number of jobs to accept before the count.
        kills: The number of kills.
        seed: The seed of the random choices.
        real: The number of workers with the embedded model.
        patience_s: How long to wait for the jobs, in seconds.
    """
    rng = random.Random(seed)
    with ExitStack() as stack:
        postgres = Postgres()
        stack.callback(postgres.remove)
        environment = {**shared, "ALPHALAYER_DATABASE": postgres.url}
        roles = ["api"] * pods + ["worker"] * workers
        first_real = len(roles) - real
        nodes = [
            Node(
                folder / f"{role}{i}",
                role,
                environment | ({"REAL_ENGINE": "1"} if i >= first_real else {}),
            )
            for i, role in enumerate(roles)
        ]
        for node in nodes:
            stack.callback(node.stop)
        wait_until(lambda: all(node.answers() for node in nodes), 400)
        seen_from = [node.address for node in nodes[:pods]]
        front = (
            [stack.enter_context(nginx(folder / "nginx", seen_from))]
            if shutil.which("nginx")
            else []
        )
        crowd = Crowd(front or seen_from, clients=8, seen_from=seen_from + front)
        stack.callback(crowd.close)
        for i in range(kills):
            time.sleep(rng.uniform(0.3, 1.5))
            if i == kills // 2:
                postgres.stop(signal.SIGQUIT)
                time.sleep(1.0)
                postgres.start()
            victim = rng.choice(nodes)
            victim.kill()
            victim.start()
        wait_until(lambda: len(crowd.accepted) >= jobs, patience_s)
        counts = crowd.count(patience_s)
        target = "Nginx" if front else "the pods"
        return {
            **counts,
            "target": target,
            "images_read": len(crowd.images) * len(seen_from + front),
            "failed_requests": _kinds(crowd.failures),
        }


def _kinds(failures: list[str]) -> dict[str, int]:
    """Count failed requests by exception, or by status and error code."""
    kinds = [failure.partition(": ")[2] for failure in failures]
    return dict(
        Counter(
            re.sub(r'^(\d+).*?(?:"code":"(\w+)".*)?$|\(.*', r"\1 \2", kind, flags=re.DOTALL).strip()
            for kind in kinds
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--real", type=int, default=0, help="workers with the embedded model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a file for the result, as JSON")
    options = vars(parser.parse_args())
    target: Path | None = options.pop("write")
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        Path(folder).chmod(0o755)  # Nginx's workers are another user
        (Path(folder) / "s3").mkdir()
        with s3_server(Path(folder) / "s3") as bucket:
            shared = {**bucket, "ALPHALAYER_STORAGE": "s3://pictures/stress"}
            result = run(Path(folder), shared, patience_s=3600, **options)
        seconds = round(time.monotonic() - start)
        write_report("pods", {**options, "seconds": seconds, **result}, target)
        sys.exit(bool(result["errors"]))


if __name__ == "__main__":
    main()
