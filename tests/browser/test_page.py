"""The page at `/` in Chromium, against real services with the fake engine. Skipped where there is no Chromium."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from PIL import Image
from playwright.async_api import Browser, BrowserContext, Page, ViewportSize, async_playwright, expect
from tests import fake_service
from tests.serving import free_port, served, wait_until

from alphalayer import images
from alphalayer.keys import add_key

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (or its path in CHROMIUM)"),
    pytest.mark.asyncio(loop_scope="module"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
DESKTOP, PHONE = ViewportSize(width=1280, height=900), ViewportSize(width=390, height=844)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        await started.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(tmp_path_factory.mktemp("service"), engine_options={"step_s": 0.02}) as client:
        yield client


class Visit:
    """A page that is open, and what went wrong on it."""

    def __init__(self, page: Page, address: str):
        self.page, self.address = page, address
        self.faults: list[str] = []
        self.outside: list[str] = []
        page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda request: self._note(request.url))
        page.set_default_timeout(20_000)

    def _note(self, url: str) -> None:
        if not url.startswith((self.address, "blob:", "data:")):
            self.outside.append(url)

    async def draw(self, **fields: str) -> None:
        """Fill the form, draw, and wait for the picture."""
        await self.fill(**fields)
        before = await self.page.locator("#history li").count()
        await self.page.click("#draw")
        await expect(self.page.locator("#history li")).to_have_count(before + 1)

    async def fill(self, **fields: str) -> None:
        """Small pictures, few steps, and what is given."""
        for name, value in {"width": "64", "height": "64", "steps": "5", **fields}.items():
            await self.page.fill(f"#{name}", value)


@pytest_asyncio.fixture(loop_scope="module")
async def visit(browser: Browser, service: httpx.Client) -> AsyncIterator[Visit]:
    context = await browser.new_context(viewport=DESKTOP, accept_downloads=True)
    opened = await _open(context, str(service.base_url))
    yield opened
    await context.close()
    assert opened.faults == []
    assert opened.outside == []


async def _open(context: BrowserContext, address: str) -> Visit:
    opened = Visit(await context.new_page(), address)
    await opened.page.goto(address)
    await expect(opened.page.locator("#scheduler option")).not_to_have_count(0)
    return opened


async def test_a_first_picture_with_everything_on_the_way(visit: Visit):
    page = visit.page
    await visit.fill(prompt="a red apple", steps="60")
    await page.click("#draw")
    await expect(page.locator("#jobs .how")).to_contain_text("Step")
    await page.wait_for_selector("#picture.preview[src*='preview_']")
    await expect(page.locator("#caption")).to_contain_text("step")
    await expect(page.locator("#actions")).to_be_visible()
    await expect(page.locator("#queue")).to_be_hidden()
    await expect(page.locator("#caption")).to_have_text("64×64, seed 12345: a red apple")
    assert await page.locator("#picture").get_attribute("alt") == "a red apple"
    assert await page.evaluate("document.getElementById('picture').naturalWidth") == 64


async def test_what_is_wrong_stands_beside_its_field(visit: Visit):
    page = visit.page
    await visit.fill(prompt="", width="64")
    await page.click("#draw")
    await expect(page.locator("#prompt-error")).to_contain_text("empty. Say what to draw")
    assert await page.evaluate("document.activeElement.id") == "prompt"
    await visit.fill(prompt="x", width="9")
    await page.click("#draw")
    await expect(page.locator("#width-error")).to_contain_text("64")
    await expect(page.locator("#prompt-error")).to_be_empty()
    # Chromium tells its console of every answer that is an error; these two are the service's own 422
    assert len(visit.faults) == 2
    assert all("422" in each for each in visit.faults)
    visit.faults.clear()


async def test_cancel_stops_that_job_and_leaves_the_other(visit: Visit):
    page = visit.page
    await visit.fill(prompt="first", steps="150")
    await page.click("#draw")
    await expect(page.locator("#jobs .how")).to_contain_text("Step")
    await visit.fill(prompt="second", steps="20")
    await page.click("#draw")
    await expect(page.locator("#jobs li")).to_have_count(2)
    await expect(page.locator("#jobs li").nth(1)).to_contain_text("Next in the queue")
    await page.get_by_role("button", name="Cancel first").click()
    await expect(page.locator("#history li")).to_have_count(1)
    assert "second" in str(await page.locator("#history button").get_attribute("title"))
    await expect(page.locator("#queue")).to_be_hidden()


async def test_a_cancelled_job_says_so(visit: Visit):
    await visit.fill(prompt="one", steps="150")
    await visit.page.click("#draw")
    await visit.page.get_by_role("button", name="Cancel one").click()
    await expect(visit.page.locator("#caption")).to_have_text("Cancelled.")


async def test_a_page_that_is_closed_leaves_no_work(visit: Visit, service: httpx.Client):
    await visit.fill(prompt="left alone", steps="150")
    await visit.page.click("#draw")
    await expect(visit.page.locator("#jobs .how")).to_contain_text("Step")
    job = service.get("/alpha/v1/jobs", params={"limit": 1}).json()["jobs"][0]
    await visit.page.goto("about:blank")

    def state() -> str:
        return service.get(f"/alpha/v1/jobs/{job['id']}").json()["state"]

    await asyncio.to_thread(wait_until, lambda: state() == "cancelled")


async def test_history_outlives_a_reload_and_gives_settings_back(visit: Visit):
    page = visit.page
    await visit.draw(prompt="a blue cup", seed="7")
    await visit.draw(prompt="a green hat", seed="8")
    await page.reload()
    await expect(page.locator("#history li")).to_have_count(2)
    await page.locator("#history button").nth(1).click()
    await expect(page.locator("#caption")).to_have_text("64×64, seed 7: a blue cup")
    await page.click("#reuse")
    assert await page.input_value("#prompt") == "a blue cup"
    assert await page.input_value("#seed") == "7"
    assert await page.input_value("#steps") == "5"
    await page.click("#forget")
    await expect(page.locator("#past")).to_be_hidden()


async def test_a_dropped_picture_brings_its_settings(visit: Visit, service: httpx.Client):
    page = visit.page
    body = {"prompt": "a dropped, (fine:1.2) star", "negative_prompt": "", "seed": 99, "steps": 3, "cfg_scale": 7.5}
    body |= {"width": 64, "height": 128, "sampler_name": "Euler a", "scheduler": "Exponential"}
    drawn = await asyncio.to_thread(service.post, "/alpha/v1/txt2img", json=body)
    data = (await asyncio.to_thread(service.get, drawn.json()["url"])).content
    await _drop(page, "star.png", data)
    await expect(page.locator("#caption")).to_have_text("The settings of star.png are in the form.")
    for name, value in body.items():
        assert await page.input_value(f"#{name}") == str(value), name
    assert await page.is_checked("#layerdiffuse_enabled")


async def test_another_picture_lies_behind(visit: Visit):
    page = visit.page
    await visit.draw(prompt="x")
    photo = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 90)).save(photo, "PNG")
    await page.set_input_files(
        "#open-file", files=[{"name": "wall.png", "mimeType": "image/png", "buffer": photo.getvalue()}]
    )
    await expect(page.locator("#caption")).to_have_text("wall.png lies behind the picture.")
    assert await page.is_checked("[name=backdrop][value=photo]")
    assert await _corner(page) == (200, 30, 90)
    await _drop(page, "broken.png", b"no picture")
    await expect(page.locator("#caption")).to_contain_text("not a picture")
    visit.faults.clear()  # the 422 of the broken one


async def test_backdrops_alpha_and_zoom(visit: Visit):
    page = visit.page
    await visit.draw(prompt="x")
    for backdrop, color in (("white", (255, 255, 255)), ("black", (0, 0, 0))):
        await page.check(f"[name=backdrop][value={backdrop}]")
        assert await _corner(page) == color
    await page.fill("#backdrop-color", "#102030")
    assert await _corner(page) == (0x10, 0x20, 0x30)
    await page.check("#alpha")
    shot = await _viewport(page)
    assert tuple(shot[shot.shape[0] // 2, shot.shape[1] // 2]) == (255, 255, 255)
    await page.focus("#viewport")
    fitted = await page.evaluate("document.getElementById('picture').clientWidth")
    await page.keyboard.press("-")
    assert await page.evaluate("document.getElementById('picture').clientWidth") < fitted
    await page.keyboard.press("0")
    assert await page.evaluate("document.getElementById('picture').clientWidth") == fitted


async def test_downloads(visit: Visit):
    page = visit.page
    await visit.draw(prompt="x")
    png = await _download(page, "#save-png")
    assert images.decode(png)[0].shape == (64, 64, 4)
    await page.check("#trimmed")
    await page.fill("#padding", "2")
    webp = await _download(page, "#save-webp")
    rgba, parameters = images.decode(webp)
    assert webp[8:12] == b"WEBP"
    assert np.array_equal(rgba, images.trim(images.decode(png)[0], 0, 2))
    assert rgba.shape[0] < 64
    assert "Seed: 12345" in (parameters or "")


@pytest.mark.parametrize("language", ["curl", "python", "javascript"])
async def test_the_code_that_it_shows_works(visit: Visit, language: str, tmp_path: Path):
    page = visit.page
    await visit.fill(prompt='it\'s a "cup" – über $HOME', steps="2")
    await page.click("#code summary")
    await page.check(f"[name=language][value={language}]")
    code = str(await page.text_content("#snippet"))
    command = {"curl": ["bash", "-c", code], "python": [sys.executable, "-c", code]}.get(
        language, ["node", "--input-type=module", "-e", code]
    )
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}")
    done = await asyncio.to_thread(subprocess.run, command, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    if language == "python":
        name, data = next((file.name, file.read_bytes()) for file in tmp_path.iterdir())
        assert name.endswith(".png")
    else:
        said = done.stdout.decode()
        url = json.loads(said)["url"] if language == "curl" else said.strip()
        data = (await asyncio.to_thread(httpx.get, url, trust_env=False)).content
    assert 'it\'s a "cup" – über $HOME' in (images.decode(data)[1] or "")


async def test_by_keyboard_alone(visit: Visit):
    page = visit.page
    await _tab_to(page, "prompt", within=6)
    await visit.fill(steps="2")
    await page.focus("#prompt")
    await page.keyboard.press("Control+a")
    await page.keyboard.type("typed")
    await page.keyboard.press("Control+Enter")
    await expect(page.locator("#history li")).to_have_count(1)
    reached = await _tab_to(page, "forget", within=40)
    assert {"draw", "viewport", "save-png", "save-webp", "reuse", "alpha", "zoom-in", "open-file"} <= reached


async def test_a_key_is_asked_for(browser: Browser, tmp_path: Path):
    secret = add_key(tmp_path / "keys.json", "page")
    with served(tmp_path, keys_file=tmp_path / "keys.json", api_auth="user:word") as client:
        context = await browser.new_context(viewport=DESKTOP)
        page = await context.new_page()
        await page.goto(str(client.base_url))
        await expect(page.locator("#key-dialog")).to_be_visible()
        await page.fill("#key", "wrong")
        await page.keyboard.press("Enter")
        await expect(page.locator("#state")).to_contain_text("a key is needed")
        await expect(page.locator("#key-dialog")).to_be_visible()
        for word in (secret, "user:word"):
            if not await page.locator("#key-dialog").is_visible():
                await page.click("#open-key")
            await page.fill("#key", word)
            await page.click("#key-dialog [value=save]")
            await expect(page.locator("#key-dialog")).to_be_hidden()
            await expect(page.locator("#scheduler option")).not_to_have_count(0)
            await page.fill("#width", "64")
            await page.fill("#height", "64")
            before = await page.locator("#history li").count()
            await page.click("#draw")
            await expect(page.locator("#history li")).to_have_count(before + 1)
        assert "X-API-Key" in str(await page.text_content("#snippet"))
        assert word not in str(await page.text_content("#snippet"))
        await context.close()


async def test_a_service_that_was_away_is_waited_for(browser: Browser, tmp_path: Path):
    port = free_port()
    address = f"http://127.0.0.1:{port}"

    def start() -> subprocess.Popen[bytes]:
        return fake_service.start(tmp_path, port, 0.02)

    running = start()
    try:
        await asyncio.to_thread(wait_until, lambda: _answers(address), 60)
        context = await browser.new_context(viewport=DESKTOP)
        visit = await _open(context, address)
        await visit.fill(prompt="patient", steps="150")
        await visit.page.click("#draw")
        await expect(visit.page.locator("#jobs .how")).to_contain_text("Step")
        running.kill()
        running.wait()
        await expect(visit.page.locator("#jobs .how")).to_contain_text("does not answer")
        running = start()
        await expect(visit.page.locator("#history li")).to_have_count(1, timeout=60_000)
        await context.close()
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_in_the_way_of_anybody(browser: Browser, service: httpx.Client, size: ViewportSize, scheme: str):
    context = await browser.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
    visit = await _open(context, str(service.base_url))
    page = visit.page
    await page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    await visit.draw(prompt="x")
    await visit.fill(steps="100")
    await page.click("#draw")
    await expect(page.locator("#jobs .how")).to_contain_text("Step")
    assert await page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    await _no_serious_fault(page)
    await page.click("#open-key")
    await _no_serious_fault(page)
    await context.close()


async def _tab_to(page: Page, wanted: str, within: int) -> set[str]:
    """Press Tab until the element with the id has the focus; the ids on the way."""
    reached: set[str] = set()
    for _ in range(within):
        await page.keyboard.press("Tab")
        reached.add(str(await page.evaluate("document.activeElement.id || document.activeElement.outerHTML")))
        if wanted in reached:
            return reached
    pytest.fail(f"{wanted} is not reached, but {reached}")


async def _no_serious_fault(page: Page) -> None:
    found = await Axe().run(page)
    serious = [each for each in found.response["violations"] if each["impact"] in ("serious", "critical")]
    assert serious == [], json.dumps(serious, indent=1)[:4000]


async def _viewport(page: Page) -> np.ndarray:
    shot = await page.locator("#viewport").screenshot()
    return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"))


async def _corner(page: Page) -> tuple[int, ...]:
    return tuple(int(each) for each in (await _viewport(page))[8, 8])


async def _download(page: Page, button: str) -> bytes:
    async with page.expect_download() as waiting:
        await page.click(button)
    return Path(await (await waiting.value).path()).read_bytes()


async def _drop(page: Page, name: str, data: bytes) -> None:
    transfer = await page.evaluate_handle(
        """([name, bytes]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
          return transfer;
        }""",
        [name, list(data)],
    )
    await page.dispatch_event("#viewport", "drop", {"dataTransfer": transfer})


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ping", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
