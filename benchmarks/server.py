"""Cost of the service itself, with an engine that renders without delay.

    python -m benchmarks.server [--jobs 20000]

- crowd: 1,000 clients submit at the same time to a queue of 200. The report has the accepted and
  the refused jobs, the time of a status request meanwhile, and the finished jobs.
- cost: CPU time of the service's process (not the engine's) for a job, over many rounds of 100.
- memory: resident memory of the service's process over time.

It needs Linux. Writes benchmarks/results/server-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from benchmarks.report import write_report
from tests.support import fake_service
from tests.support.serving import free_port, wait_until

BODY = {"prompt": "an apple", "width": 64, "height": 64, "steps": 1}
CLIENTS, QUEUE = 1000, 200


class Service:
    """Service process with an engine that takes `step_s` seconds a step."""

    def __init__(self, folder: Path, step_s: float, queue_limit: int):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.process = fake_service.start(folder, port, step_s, queue_limit)
        wait_until(self._is_ready, 60)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def cpu_s(self) -> float:
        """Return the CPU time of the process so far, in seconds."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident_mb(self) -> float:
        """Return the resident memory in MB."""
        return (
            int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
            * os.sysconf("SC_PAGE_SIZE")
            / 1e6
        )

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ping", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False


async def crowd(service: Service, clients: int) -> dict[str, Any]:
    """Submit from all clients at once, while another client polls a job."""
    limits = httpx.Limits(max_connections=clients + 1)
    async with httpx.AsyncClient(
        base_url=service.url, limits=limits, timeout=120, trust_env=False
    ) as http:
        first = (await http.post("/alpha/v1/jobs", json=BODY)).json()
        polls: list[float] = []
        done = asyncio.Event()

        async def poll() -> None:
            async with httpx.AsyncClient(
                base_url=service.url, timeout=120, trust_env=False
            ) as other:
                while not done.is_set():
                    start = time.perf_counter()
                    (await other.get(f"/alpha/v1/jobs/{first['id']}")).raise_for_status()
                    polls.append(time.perf_counter() - start)
                    await asyncio.sleep(0.005)

        polling = asyncio.create_task(poll())
        responses = await asyncio.gather(
            *(http.post("/alpha/v1/jobs", json=BODY) for _ in range(clients))
        )
        done.set()
        await polling
        accepted = [
            first["id"],
            *(response.json()["id"] for response in responses if response.status_code == 202),
        ]
        refused = [response for response in responses if response.status_code == 429]
        polls.sort()
        return {
            "clients": clients,
            "accepted": len(accepted),
            "refused": len(refused),
            "with_retry_after": sum(
                int(response.headers.get("retry-after", "0")) >= 1 for response in refused
            ),
            "look_ms": {
                "median": _ms(polls[len(polls) // 2]),
                "p99": _ms(polls[int(len(polls) * 0.99)]),
            },
            "ids": accepted,
        }


async def count_done(service: Service, ids: list[str]) -> int:
    """Wait until all jobs are finished, and count the successful ones."""
    async with httpx.AsyncClient(base_url=service.url, timeout=120, trust_env=False) as http:
        done = 0
        for job_id in ids:
            while (state := (await http.get(f"/alpha/v1/jobs/{job_id}")).json()["state"]) in (
                "queued",
                "running",
            ):
                await asyncio.sleep(0.05)
            done += state == "done"
        return done


async def rounds(service: Service, jobs: int, a_round: int = 100) -> dict[str, Any]:
    """Run jobs in rounds; return CPU milliseconds a job, and the memory over time."""
    cost: list[float] = []
    memory = [service.resident_mb]
    async with httpx.AsyncClient(base_url=service.url, timeout=120, trust_env=False) as http:
        for i in range(jobs // a_round):
            before = service.cpu_s
            ids = [
                (await http.post("/alpha/v1/jobs", json=BODY)).json()["id"] for _ in range(a_round)
            ]
            while (await http.get(f"/alpha/v1/jobs/{ids[-1]}")).json()["state"] != "done":
                await asyncio.sleep(0.02)
            cost.append((service.cpu_s - before) * 1000 / a_round)
            if i % max(1, jobs // a_round // 20) == 0:
                memory.append(service.resident_mb)
                print(
                    f"{(i + 1) * a_round} jobs: {cost[-1]:.2f} ms a job, {memory[-1]:.0f} MB",
                    flush=True,
                )
    half = memory[len(memory) // 2 :]
    return {
        "jobs": jobs,
        "cpu_ms_a_job": {
            "median": round(statistics.median(cost), 2),
            "highest_round": round(max(cost), 2),
        },
        "resident_mb": [round(megabytes, 1) for megabytes in memory],
        "growth_in_second_half_mb": round(half[-1] - half[0], 1),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--note", default="", help="other load on the machine")
    options = parser.parse_args()
    report: dict[str, Any] = {"note": options.note}
    with tempfile.TemporaryDirectory() as folder, Service(Path(folder), 0.02, QUEUE) as service:
        figures = asyncio.run(crowd(service, CLIENTS))
        ids = figures.pop("ids")
        report["crowd"] = {**figures, "done": asyncio.run(count_done(service, ids))}
        print(json.dumps(report["crowd"]))
    with tempfile.TemporaryDirectory() as folder, Service(Path(folder), 0.0, 10_000) as service:
        report["rounds"] = asyncio.run(rounds(service, options.jobs))
    write_report("server", report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
