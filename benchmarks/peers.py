"""This engine beside others, on the same random weights, in turn in one run.

    python -m benchmarks.peers [--model tiny|small|full] [--busy 4] [--against CHECKOUT]
    python -m benchmarks.peers --forge http://127.0.0.1:7860 --forge-command "python launch.py …"
    python -m benchmarks.peers --diffuser-layerdiffuse FOLDER --layerdiffuse-cli FOLDER

In each round, each engine starts in a fresh process and generates a first image and some more:

- cold: from the start of the process to the first image
- warm: another image, the fastest
- decode: the part of the VAE and, if there is one, of the transparent decoder
- transparent: the part of the transparent decoder alone
- CPU: CPU seconds of the process and its children for the same image
- peak: resident memory of the process and its children

The table has the smallest figures of all rounds, the highest peak, and their ratio to this
engine's at the same work. diffusers has no transparent decode, so it is beside the opaque mode.
With `--against`, this engine of another checkout is measured, too.
`--diffuser-layerdiffuse` and `--layerdiffuse-cli` need clones of rootonchair/diffuser_layerdiffuse
and lllyasviel/LayerDiffuse_DiffusersCLI, and their packages: einops, opencv-python-headless, peft.
Forge runs on the folder of `--models-dir` as its models folder. Without `--forge-command` a running
server is measured, without its start and memory.

It needs Linux, and the `dev` extra.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from benchmarks.peer_engines import Answer, Render, Task
from benchmarks.peer_models import MODELS, make_models, write_patch_forms
from benchmarks.report import machine, write_report
from PIL import Image
from tests.support.serving import free_port

ROOT = Path(__file__).parents[1]
SIDES = {"tiny": 64, "small": 256, "full": 1024}
METHOD = "(SDXL) Only Generate Transparent Image (Attention Injection)"
RGBA = "RGBA: sampling, VAE, 8 decoder passes"
COLUMNS = {
    "cold_s": "cold s",
    "cold_cpu_s": "cold CPU s",
    "warm_s": "warm s",
    "warm_cpu_s": "warm CPU s",
    "decode_s": "decode s",
    "transparent_s": "transparent s",
    "peak_mb": "peak MB",
    "gpu_mb": "GPU MB",
}
CLONES = {
    "diffuser_layerdiffuse": ("rootonchair/diffuser_layerdiffuse", "layer_diffuse/models"),
    "layerdiffuse_cli": ("lllyasviel/LayerDiffuse_DiffusersCLI", "lib_layerdiffuse"),
}
"""Repository on GitHub and a folder of it, by name of the engine."""
Session = tuple[Render, int | None]
"""Rendering of one image, and the id of the engine's process, if it is ours."""


@dataclass(frozen=True)
class Peer:
    """Engine of the table.

    Attributes:
        name: Name in the table.
        work: What an image of it consists of.
        reference: Engine that its figures are divided by.
        open: Starts it for a task and yields its `Session`.
    """

    name: str
    work: str
    reference: str
    open: Callable[[Task], AbstractContextManager[Session]]


@contextmanager
def in_process(name: str, task: Task, folders: Sequence[Path] = ()) -> Generator[Session]:
    """Run an engine of `benchmarks.peer_engines`; modules of `folders` come first."""
    path = [*(str(folder.resolve()) for folder in folders), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "benchmarks.peer_engines", name, json.dumps(asdict(task))]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "TQDM_DISABLE": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        requests, answers = process.stdin, process.stdout
        assert requests
        assert answers

        def render() -> Answer:
            requests.write("\n")
            requests.flush()
            line = answers.readline()
            if not line:
                raise SystemExit(f"{name}: the process ended with status {process.wait()}.")
            return json.loads(line)

        try:
            yield render, process.pid
        finally:
            process.kill()


@contextmanager
def over_http(url: str, command: str | None, task: Task) -> Generator[Session]:
    """Use a server with AUTOMATIC1111's API, and start it first if a command is given."""
    with ExitStack() as stack:
        process = stack.enter_context(_server(command)) if command else None
        client = stack.enter_context(httpx.Client(base_url=url, timeout=3600, trust_env=False))

        def render() -> Answer:
            _wait_until_up(client, process)
            response = client.post("/sdapi/v1/txt2img", json=_a1111_request(task))
            check_alpha(url, response.raise_for_status().json()["images"][0])
            return {}

        yield render, process.pid if process else None


def check_alpha(url: str, image: str) -> None:
    """Refuse an opaque image (base64).

    Forge continues without LayerDiffuse after an error in its script.
    """
    mode = Image.open(io.BytesIO(base64.b64decode(image))).mode
    if mode != "RGBA":
        raise SystemExit(f"{url}: got an image of mode {mode}; LayerDiffuse is not active.")


@contextmanager
def _server(command: str) -> Generator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        shlex.split(command),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_up(client: httpx.Client, process: subprocess.Popen[bytes] | None) -> None:
    while True:
        if process and process.poll() is not None:
            raise SystemExit(f"{client.base_url}: the server ended.")
        try:
            if client.get("/sdapi/v1/sd-models").status_code == 200:
                return
        except httpx.TransportError:
            if process is None:
                raise
        time.sleep(0.05)


def _a1111_request(task: Task) -> dict[str, Any]:
    return {
        **{name: getattr(task, name) for name in ("prompt", "negative_prompt", "seed", "steps")},
        **{name: getattr(task, name) for name in ("cfg_scale", "width", "height")},
        "sampler_name": "DPM++ 2M SDE",
        "scheduler": "Karras",
        "override_settings": {"sd_model_checkpoint": "random-sdxl"},
        "alwayson_scripts": {"LayerDiffuse": {"args": [True, METHOD, 1.0, 1.0]}},
    }


@contextmanager
def serve(task: Task) -> Generator[Session]:
    """Run this project's service on the task's models, with new folders."""
    port = str(free_port())
    command = [sys.executable, "-m", "alphalayer", "serve", "--port", port]
    command += ["--models-dir", task.models, "--device", task.device, "--dtype", task.dtype]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--data-dir", f"{folder}/data", "--outputs-dir", f"{folder}/outputs"]
        with over_http(f"http://127.0.0.1:{port}", shlex.join(command), task) as session:
            yield session


def find_peers(options: argparse.Namespace) -> list[Peer]:
    """Return the engines that can run, in the order of a round."""
    packages = [options.peer_path] if options.peer_path else []
    peers = [
        Peer("alphalayer", RGBA, "alphalayer", partial(in_process, "alphalayer")),
        Peer(
            "alphalayer-opaque",
            "RGB: sampling, VAE",
            "alphalayer-opaque",
            partial(in_process, "alphalayer-opaque"),
        ),
        Peer(
            "diffusers",
            "RGB: sampling, VAE",
            "alphalayer-opaque",
            partial(in_process, "diffusers"),
        ),
    ]
    if options.against:
        other = partial(in_process, "alphalayer", folders=[options.against / "src"])
        peers.insert(1, Peer("alphalayer-other", RGBA, "alphalayer", other))
    for name in CLONES:
        if folder := getattr(options, name):
            clone = partial(in_process, name, folders=[folder, *packages])
            peers.append(Peer(name, RGBA, "alphalayer", clone))
    if options.forge:
        work = f"{RGBA}, PNG over HTTP"
        forge = partial(over_http, options.forge, options.forge_command)
        peers += [
            Peer("alphalayer-serve", work, "alphalayer-serve", serve),
            Peer("forge", work, "alphalayer-serve", forge),
        ]
    return peers


def measure(peer: Peer, task: Task, warm: int) -> dict[str, float]:
    """Start an engine, generate a first image and `warm` more, and stop it."""
    start = time.monotonic()
    with peer.open(task) as (render, process_id):
        render()
        figures: dict[str, float] = {}
        if process_id:
            figures["cold_s"] = time.monotonic() - start
            figures["cold_cpu_s"] = cpu_s(process_id)
        images: list[Answer] = []
        for _ in range(warm):
            before, cpu_before = time.monotonic(), cpu_s(process_id) if process_id else 0.0
            answer = render()
            answer["warm_s"] = time.monotonic() - before
            if process_id:
                answer["warm_cpu_s"] = cpu_s(process_id) - cpu_before
            images.append(answer)
        figures |= {name: min(image[name] for image in images) for name in images[0]}
        if process_id:
            figures["peak_mb"] = peak_mb(process_id)
    return figures


def process_tree(process_id: int) -> list[int]:
    """Return a process and its descendants."""
    children = [
        int(child)
        for file in Path(f"/proc/{process_id}/task").glob("*/children")
        for child in file.read_text().split()
    ]
    return [process_id, *(below for child in children for below in process_tree(child))]


def cpu_s(process_id: int) -> float:
    """Return the CPU seconds of a process and its descendants so far."""
    fields = [
        Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        for member in process_tree(process_id)
    ]
    ticks = sum(int(ticks) for values in fields for ticks in values[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_mb(process_id: int) -> float:
    """Return the sum of the peaks of resident memory of a process and its descendants."""
    kilobytes = (
        int(line.split()[1])
        for member in process_tree(process_id)
        for line in Path(f"/proc/{member}/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return sum(kilobytes) * 1024 / 1e6


def summarize(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the smallest figures of all rounds, and the highest peaks."""
    return {
        name: (max if name.endswith("_mb") else min)(run[name] for run in runs) for name in runs[0]
    }


def format_table(peers: list[Peer], figures: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table with the ratios to the reference of each engine."""
    columns = [name for name in COLUMNS if any(name in values for values in figures.values())]
    titles = ["engine", *(COLUMNS[name] for name in columns), "what it does"]
    lines = [titles, ["---"] * len(titles)]
    for peer in peers:
        own, reference = figures[peer.name], figures.get(peer.reference, {})
        cells = [_cell(own.get(name), reference.get(name)) for name in columns]
        lines.append([peer.name, *cells, f"{peer.work}; ratios to {peer.reference}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: float | None, reference: float | None) -> str:
    if value is None:
        return "-"
    ratio = f" ({value / reference:.2f}x)" if reference else ""
    return f"{value:.0f}{ratio}" if value >= 100 else f"{value:.2f}{ratio}"


@contextmanager
def busy(count: int) -> Generator[None]:
    """Run processes that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def describe_run(options: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Return what the figures depend on."""
    threads = [name for name in os.environ if name.startswith(("OMP_", "GOMP_", "MKL_NUM"))]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "threads": {name: os.environ[name] for name in sorted(threads)},
        "busy_processes": options.busy,
        "load": os.getloadavg(),
        "model": options.model,
        "task": asdict(task),
    }


def clone_of(name: str) -> Callable[[str], Path]:
    """Return a parser of the folder of a clone; it refuses any other folder."""
    repository, part = CLONES[name]

    def parse(text: str) -> Path:
        if not (Path(text) / part).is_dir():
            raise argparse.ArgumentTypeError(
                f"got {text}; it has no folder {part}. Clone https://github.com/{repository}."
            )
        return Path(text)

    return parse


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--models-dir", type=Path, help="keep the random models here")
    parser.add_argument("--side", type=int, help="pixels; default: by the model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=2, help="warm images in each round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--threads", type=int, help="set OMP_NUM_THREADS for all engines")
    parser.add_argument("--busy", type=int, default=0, help="busy processes beside the engines")
    parser.add_argument("--engines", nargs="+", metavar="NAME", help="default: all that can run")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    for name, (repository, _) in CLONES.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=clone_of(name), metavar="FOLDER", help=f"clone of {repository}"
        )
    parser.add_argument(
        "--peer-path", type=Path, metavar="FOLDER", help="Python packages that the clones need"
    )
    parser.add_argument("--forge", metavar="URL", help="address of Forge with LayerDiffuse")
    parser.add_argument("--forge-command", help="command that starts Forge in each round")
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    options = parser.parse_args(arguments)
    if options.model == "tiny" and any(getattr(options, name) for name in CLONES):
        parser.error("--model: got tiny; the clones have a fixed decoder. Use small or full.")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    options = parse_options(arguments)
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    peers = [
        peer
        for peer in find_peers(options)
        if options.engines is None or peer.name in options.engines
    ]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        models = make_models((options.models_dir or Path(temporary)).resolve(), options.model)
        if any(peer.name in CLONES for peer in peers):
            write_patch_forms(models)
        side = options.side or SIDES[options.model]
        task = Task(str(models), side, side, options.steps, options.device, options.dtype)
        description = describe_run(options, task)
        print("\n".join(f"{name}: {value}" for name, value in description.items()), flush=True)
        stack.enter_context(busy(options.busy))
        runs: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in peers}
        for number in range(options.rounds):
            for peer in peers:
                runs[peer.name].append(measure(peer, task, options.warm))
                print(f"round {number + 1}: {peer.name}: {runs[peer.name][-1]}", flush=True)
    figures = {name: summarize(values) for name, values in runs.items()}
    print(f"\n{format_table(peers, figures)}")
    if not options.forge:
        print("\nForge is left out: no --forge.")
    if options.output:
        report = {**description, "figures": figures, "runs": runs}
        write_report("peers", report, options.output)


if __name__ == "__main__":
    # unlike the default, an exit stops the engines and the busy processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
