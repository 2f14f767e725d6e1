"""The programs of `examples/`, unchanged, against a real service."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from tests.support.serving import served

from alphalayer.auth.api_keys import add_key

EXAMPLES = Path(__file__).parents[2] / "examples"
SECRET = "whsec_YSBrZXkgb2Ygb3VyIG93bg=="
FILES = {
    "generate.sh": ("apple.png", "pear.png"),
    "python_client.py": ("apple.png",),
    "python_async_client.py": ("heart-1.png", "heart-2.png", "heart-3.png"),
    "four_stickers.py": (
        "a-cute-cat.webp",
        "a-slice-of-pizza.webp",
        "a-rocket.webp",
        "a-crystal-ball.webp",
    ),
    "webui_client.py": ("apple.png",),
    "openai_client.py": ("apple.png",),
    "webhook_receiver.py": (),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("service")
    with served(folder, webhook_secret=SECRET, webhook_allow_private=True) as client:
        yield client


@pytest.fixture(scope="module")
def locked_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, str]]:
    folder = tmp_path_factory.mktemp("locked")
    keys = folder / "keys.json"
    key = add_key(keys, "shop")
    options = {"webhook_secret": SECRET, "webhook_allow_private": True}
    with served(folder, keys_file=keys, **options) as client:
        yield client, key


def run_example(name: str, folder: Path, **environment: str) -> str:
    """Run one program in a folder and return its output."""
    runner = [sys.executable] if name.endswith(".py") else [shutil.which("bash") or ""]
    if not runner[0] or (name.endswith(".sh") and not shutil.which("curl")):
        pytest.skip("needs bash and curl")
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith("ALPHALAYER_")
    }
    done = subprocess.run(
        [*runner, EXAMPLES / name],
        cwd=folder,
        env={**plain, **environment, "ALPHALAYER_WEBHOOK_SECRET": SECRET},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_images(name: str, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} - {"job.json"} == set(FILES[name])
    for file in FILES[name]:
        with Image.open(folder / file) as image:
            assert image.mode == "RGBA"
            assert image.getpixel((0, 0))[3] == 0


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_example_writes_its_images(service: httpx.Client, tmp_path: Path, name: str):
    output = run_example(name, tmp_path, ALPHALAYER_URL=str(service.base_url).rstrip("/"))
    check_images(name, tmp_path)
    assert all(file in output for file in FILES[name])
    if name == "webhook_receiver.py":
        state, url = output.split()[-2:]
        assert state == "done"
        assert service.get(url).headers["content-type"] == "image/png"


@pytest.mark.parametrize("name", FILES)
def test_example_sends_its_api_key(
    locked_service: tuple[httpx.Client, str], tmp_path: Path, name: str
):
    client, key = locked_service
    url = str(client.base_url).rstrip("/")
    run_example(name, tmp_path, ALPHALAYER_URL=url, ALPHALAYER_API_KEY=key)
    check_images(name, tmp_path)


def test_four_stickers_are_trimmed_to_the_margin(service: httpx.Client, tmp_path: Path):
    run_example("four_stickers.py", tmp_path, ALPHALAYER_URL=str(service.base_url).rstrip("/"))
    for file in FILES["four_stickers.py"]:
        with Image.open(tmp_path / file) as image:
            left, top, right, bottom = image.getchannel("A").getbbox()
            assert (left, top, image.width - right, image.height - bottom) == (8, 8, 8, 8)
