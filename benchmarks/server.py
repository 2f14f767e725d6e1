"""Cost of the service itself, with an engine that renders without delay.

    python -m benchmarks.server [--jobs 20000] [--against CHECKOUT]

- crowd: 1,000 clients submit at the same time to a queue of 200. The report has the accepted and
  the refused jobs, the time of a status request meanwhile, and the finished jobs.
- looks: 1,000 clients begin at the same time. Half of them wait for their image, the others submit
  a job and poll it. Refused clients come back. Another process looks at one job meanwhile.
- cost: CPU time of the service's process (not the engine's) for a job, over many rounds of 100.
  Clients submit all jobs of a round, or wait for each image.
- memory: resident memory of the service's process over time.

With `--against`, looks and cost are measured of the service of another checkout, too, in turn.

It needs Linux. Writes benchmarks/results/server-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from benchmarks.report import write_report
from tests.support import fake_service
from tests.support.serving import free_port, wait_until

BODY = {"prompt": "an apple", "width": 64, "height": 64, "steps": 1}
CLIENTS, QUEUE = 1000, 200


class Service:
    """Service process with an engine that takes `step_s` seconds a step.

    `checkout` is the folder of its source. Default: the one of this file.
    """

    def __init__(self, folder: Path, step_s: float, queue_limit: int, checkout: Path | None = None):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        source = {"PYTHONPATH": str(checkout / "src")} if checkout else None
        self.process = fake_service.start(folder, port, step_s, queue_limit, source)
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


def look(url: str, job_id: str, seconds: float) -> list[float]:
    """Show a job for some seconds. Return the sorted durations of the requests."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
        while time.perf_counter() < end:
            start = time.perf_counter()
            http.get(f"/alpha/v1/jobs/{job_id}").raise_for_status()
            times.append(time.perf_counter() - start)
            time.sleep(0.01)
    return sorted(times)


async def looks(service: Service, clients: int, seconds: float = 8.0) -> dict[str, Any]:
    """Look at a job from another process while clients submit, poll and wait."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def request(method: str, path: str, **body: Any) -> tuple[int, Any]:
        async with http.request(method, f"{service.url}/alpha/v1/{path}", **body) as response:
            counts[f"{method} {response.status}"] += 1
            return response.status, await response.json()

    async def client(waits: bool) -> None:
        while time.monotonic() < end:
            status, job = await request("POST", "txt2img" if waits else "jobs", json=BODY)
            if status == 429:
                await asyncio.sleep(random.uniform(1, 3))
            while status == 202 and time.monotonic() < end and job["state"] != "done":
                await asyncio.sleep(random.uniform(0.5, 1.5))
                job = (await request("GET", f"jobs/{job['id']}"))[1]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        first = (await request("POST", "jobs", json=BODY))[1]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            looking = asyncio.get_running_loop().run_in_executor(
                pool, look, service.url, first["id"], seconds
            )
            await asyncio.gather(*(client(i % 2 == 0) for i in range(clients)))
            times = await looking
    return {
        "looks": len(times),
        "median_ms": _ms(times[len(times) // 2]),
        "p99_ms": _ms(times[int(len(times) * 0.99)]),
        "longest_ms": _ms(times[-1]),
        "answers": dict(counts),
    }


async def run_round(service: Service, jobs: int, *, waits: bool) -> float:
    """Run jobs one after another. Return CPU milliseconds a job."""
    before = service.cpu_s
    async with httpx.AsyncClient(base_url=service.url, timeout=120, trust_env=False) as http:
        if waits:
            for _ in range(jobs):
                (await http.post("/alpha/v1/txt2img", json=BODY)).raise_for_status()
        else:
            ids = [(await http.post("/alpha/v1/jobs", json=BODY)).json()["id"] for _ in range(jobs)]
            while (await http.get(f"/alpha/v1/jobs/{ids[-1]}")).json()["state"] != "done":
                await asyncio.sleep(0.02)
    return (service.cpu_s - before) * 1000 / jobs


async def rounds(services: dict[str, Service], jobs: int, a_round: int = 100) -> dict[str, Any]:
    """Run jobs in rounds, each service in turn.

    Returns:
        CPU milliseconds a job, and the memory over time, of each service.
    """
    cost: dict[str, dict[str, list[float]]] = {
        name: {"submitted": [], "waited_for": []} for name in services
    }
    memory = {name: [service.resident_mb] for name, service in services.items()}
    for i in range(jobs // a_round):
        for name, service in services.items():
            kind = "waited_for" if i % 2 else "submitted"
            cost[name][kind].append(await run_round(service, a_round, waits=i % 2 == 1))
            if i % max(1, jobs // a_round // 20) == 0:
                memory[name].append(service.resident_mb)
                print(name, i, kind, f"{cost[name][kind][-1]:.2f} ms a job", flush=True)
    return {
        name: {
            "cpu_ms_a_job": {kind: _spread(figures) for kind, figures in cost[name].items()},
            "resident_mb": [round(megabytes, 1) for megabytes in memory[name]],
        }
        for name in services
    }


def _spread(figures: list[float]) -> dict[str, float]:
    return {
        "lowest": round(min(figures), 2),
        "median": round(statistics.median(figures), 2),
        "highest": round(max(figures), 2),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--note", default="", help="other load on the machine")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    options = parser.parse_args()
    report: dict[str, Any] = {"note": options.note, "jobs": options.jobs}
    checkouts = {"this": None, **({"other": options.against} if options.against else {})}
    with tempfile.TemporaryDirectory() as folder, Service(Path(folder), 0.02, QUEUE) as service:
        figures = asyncio.run(crowd(service, CLIENTS))
        ids = figures.pop("ids")
        report["crowd"] = {**figures, "done": asyncio.run(count_done(service, ids))}
        print(json.dumps(report["crowd"]), flush=True)
    report["looks"] = {name: [] for name in checkouts}
    for name, checkout in [*checkouts.items()] * 3:
        with (
            tempfile.TemporaryDirectory() as folder,
            Service(Path(folder), 0.02, QUEUE, checkout) as service,
        ):
            report["looks"][name].append(asyncio.run(looks(service, CLIENTS)))
            print(name, json.dumps(report["looks"][name][-1]), flush=True)
    with ExitStack() as stack:
        services: dict[str, Service] = {}
        for name, checkout in checkouts.items():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            services[name] = stack.enter_context(Service(Path(folder), 0.0, 10_000, checkout))
        report["rounds"] = asyncio.run(rounds(services, options.jobs))
    write_report("server", report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
