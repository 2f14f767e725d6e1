"""The examples of the guides, run unchanged except for the port. PowerShell is not run."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from tests.support.serving import free_port, put_model, served, wait_until

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
RUNNERS = {
    "bash": ["bash", "-euc"],
    "python": [sys.executable, "-c"],
    "javascript": ["node", "--input-type=module", "-e"],
}


def examples(guide: str, language: str) -> list[str]:
    """Return the code blocks of one language in a guide."""
    return re.findall(
        rf"```{language}\n(.*?)```", (GUIDES / guide).read_text(encoding="utf-8"), re.DOTALL
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[httpx.Client]:
    with served(put_model(home)) as client:
        yield client


def run(language: str, code: str, folder: Path) -> str:
    """Run a program in a folder and return its output."""
    runner = RUNNERS[language]
    if not shutil.which(runner[0]):
        pytest.skip(f"{runner[0]} is not installed")
    done = subprocess.run(
        [*runner, code], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Return a folder with an image and a mask, both transparent on the left."""
    image = Image.new("RGBA", (1024, 1024), "white")
    image.paste((0, 0, 0, 0), (0, 0, 512, 1024))
    for name in ("apple.png", "mask.png"):
        image.save(tmp_path / name)
    return tmp_path


def test_guide_python_clients_succeed(service: httpx.Client, image_folder: Path):
    """Run the blocks as one program, because some continue the one before.

    LiteLLM is not installed: its many dependencies have versions that differ from ours.
    """
    blocks = examples("clients.md", "python")
    code = "\n".join(block for block in blocks if "import litellm" not in block)
    for port in ("localhost:7861", 'localhost", port=7861'):
        new = port.replace("localhost", "127.0.0.1").replace("7861", str(service.base_url.port))
        code = code.replace(port, new)
    run("python", code, image_folder)
    with Image.open(image_folder / "table.png") as image:
        assert image.size == (1024, 1024)


def test_guide_requests_with_images_succeed(service: httpx.Client, image_folder: Path):
    code = next(block for block in examples("clients.md", "bash") if "img2img" in block)
    output = run(
        "bash", code.replace("localhost:7861", f"127.0.0.1:{service.base_url.port}"), image_folder
    )
    assert '"layers":' in output
    assert '"code":' not in output


@pytest.mark.parametrize("language", RUNNERS)
def test_guide_client_of_forge_writes_the_image(
    service: httpx.Client, tmp_path: Path, language: str
):
    code = next(block for block in examples("coming-from-forge.md", language) if "txt2img" in block)
    run(language, code.replace("localhost:7861", f"127.0.0.1:{service.base_url.port}"), tmp_path)
    with Image.open(tmp_path / "apple.png") as image:
        assert image.mode == "RGBA"
        assert image.size == (1024, 1024)
        assert np.asarray(image)[0, 0, 3] == 0
        assert "Seed: 12345" in image.info["parameters"]


@pytest.mark.parametrize("guide", ["coming-from-forge.md", "reverse-proxy.md"])
def test_guide_nginx_block_proxies_the_service(service: httpx.Client, tmp_path: Path, guide: str):
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")
    outside = free_port()
    (block,) = examples(guide, "nginx")
    block = re.sub(r"listen 80;", f"listen 127.0.0.1:{outside};", block)
    block = re.sub(r"127\.0\.0\.1:786[12]", f"127.0.0.1:{service.base_url.port}", block)
    paths = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = (
        f"pid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}{block}}}\n"
    )
    (tmp_path / "nginx.conf").write_text(config)
    nginx = subprocess.Popen(
        ["nginx", "-c", tmp_path / "nginx.conf", "-g", "daemon off;", "-e", tmp_path / "error.log"]
    )
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{outside}", trust_env=False, timeout=30
        ) as client:
            wait_until(lambda: answers(client))
            own = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Prefix": "/evil"}
            small = {"prompt": "an apple", "width": 64, "height": 64}
            answer = client.post("/alpha/v1/txt2img", json=small, headers=own).json()
            assert "evil" not in answer["url"]
            assert httpx.URL(answer["url"]).port in (outside, None), (
                "the URL is for clients of the proxy"
            )
            assert client.get(httpx.URL(answer["url"]).path).headers["content-type"] == "image/png"
            job = client.post(
                "/alpha/v1/jobs", json={"prompt": "an apple", "width": 64, "height": 64}
            ).json()
            with client.stream("GET", f"/alpha/v1/jobs/{job['id']}/events") as events:
                assert '"done"' in "".join(events.iter_text())
    finally:
        nginx.terminate()
        nginx.wait(10)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ping").status_code == 200
    except httpx.TransportError:
        return False


def test_guide_backup_of_a_running_service_is_complete(service: httpx.Client, home: Path):
    done = service.post(
        "/alpha/v1/txt2img", json={"prompt": "an apple", "width": 64, "height": 64}
    ).json()
    run("bash", examples("backup.md", "bash")[0], home)
    with sqlite3.connect(home / "backup" / "jobs.sqlite") as journal:
        kept = journal.execute("SELECT count(*) FROM jobs WHERE state = 'done'").fetchone()[0]
    assert kept >= 1
    assert (home / "backup" / "outputs" / done["filename"]).is_file()


@pytest.mark.parametrize("number", range(3), ids=["submit", "follow", "cancel"])
def test_guide_jobs_example_succeeds(service: httpx.Client, tmp_path: Path, number: int):
    code = examples("jobs.md", "bash")[number]
    run("bash", code.replace("localhost:7861", f"127.0.0.1:{service.base_url.port}"), tmp_path)
    if number == 0:
        with Image.open(tmp_path / "apple.png") as image:
            assert "Seed: 7" in image.info["parameters"]
