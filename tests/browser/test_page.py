"""The page at `/` in Chromium: generation, queue, history, keys and an unreachable service."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from playwright.async_api import Browser, Page, ViewportSize, expect
from tests.browser.visit import DESKTOP, PHONE, Visit, open_visit
from tests.support import fake_service
from tests.support.serving import free_port, put_model, served, wait_until

from alphalayer.auth.api_keys import add_key

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_first_image_shows_progress_and_facts(visit: Visit):
    page = visit.page
    await visit.start("a red apple", steps=60)
    await expect(page.locator("#progress-prompt")).to_have_text("a red apple")
    await page.wait_for_selector("#image.preview[src*='preview_']")
    assert float(await page.get_attribute("#progress-bar", "value") or 0) > 0
    assert await page.locator("#stop").evaluate(
        "button => button.getBoundingClientRect().bottom <= innerHeight"
    )
    await expect(page.locator("#queue")).to_be_hidden()
    await expect(page.locator("#actions")).to_be_visible()
    await expect(page.locator("#progress")).to_be_hidden()
    await expect(page.locator("#caption")).to_have_text("a red apple")
    assert await page.locator("#image").get_attribute("alt") == "a red apple"
    assert await page.evaluate("document.getElementById('image').naturalWidth") == 64
    facts = await visit.facts()
    assert facts["Size"] == "64 × 64"
    assert (facts["Seed"], facts["Steps"], facts["Guidance"]) == ("12345", "60", "3")
    assert {"Model", "Sampler", "Schedule", "Negative prompt"} <= set(facts)


async def test_invalid_fields_are_reported_before_a_request(visit: Visit):
    page = visit.page
    await visit.fill(prompt=" ", width="9", seed="1.5", batch_size="9")
    visit.requests.clear()
    await page.click("#generate")
    await expect(page.locator("#prompt-error")).to_contain_text("Describe an image")
    await expect(page.locator("#width-error")).to_have_text("A whole number from 64 to 2048.")
    await expect(page.locator("#batch_size-error")).to_have_text("A whole number from 1 to 8.")
    await expect(page.locator("#seed-error")).to_contain_text("A whole number")
    await expect(page.locator("#height-error")).to_be_empty()
    assert await page.evaluate("document.activeElement.id") == "prompt"
    assert not [url for url in visit.requests if "jobs" in url]
    await visit.expect_no_serious_violation()
    await page.fill("#batch_size", "1")
    await visit.render(prompt="x", seed="7")
    await expect(page.locator("#prompt-error")).to_be_empty()


async def test_error_of_the_service_is_shown_at_its_field(visit: Visit):
    page = visit.page
    await visit.fill(prompt="x")
    await page.evaluate("document.getElementById('sampler_name').options[0].value = 'Eulr'")
    await page.click("#generate")
    await expect(page.locator("#sampler_name-error")).to_have_text(
        re.compile('^Unknown sampler "Eulr"')
    )
    assert [error for error in visit.errors if "422" not in error] == []
    visit.errors.clear()  # Chromium logs each error response to its console


async def test_stage_follows_the_running_or_selected_job(visit: Visit):
    page = visit.page
    await visit.start("first")
    await visit.fill(prompt="second", steps="30")
    await page.click("#generate")
    rows = page.locator("#jobs li")
    await expect(rows).to_have_count(2)
    await expect(rows.nth(1)).to_contain_text("Next in the queue")
    await expect(page.locator("#progress-prompt")).to_have_text("first")
    await rows.nth(1).locator(".what").click()
    await expect(page.locator("#progress-prompt")).to_have_text("second")
    assert float(await page.get_attribute("#progress-bar", "value") or 0) == 0
    await page.get_by_role("button", name="Cancel first").click()
    await expect(page.locator("#note")).to_have_text("Cancelled.")
    assert await page.evaluate("document.activeElement !== document.body")
    await expect(page.locator("#history li")).to_have_count(1)
    assert "second" in str(await page.locator("#history button").get_attribute("title"))
    await expect(page.locator("#queue")).to_be_hidden()


async def test_old_image_can_be_viewed_while_a_job_runs(visit: Visit):
    page = visit.page
    await visit.render(prompt="old")
    await visit.start("new")
    await page.locator("#history button").click()
    await expect(page.locator("#caption")).to_have_text("old")
    await expect(page.locator("#progress")).to_be_hidden()
    await page.locator("#jobs .what").click()
    await expect(page.locator("#progress-prompt")).to_have_text("new")
    await page.click("#stop")
    await expect(page.locator("#actions")).to_be_visible()
    await expect(page.locator("#caption")).to_have_text("old")
    assert await page.evaluate("document.activeElement.id") == "viewport"


async def test_closed_page_cancels_its_job(visit: Visit, service: httpx.Client):
    await visit.start("left alone")
    job = service.get("/alpha/v1/jobs", params={"limit": 1}).json()["jobs"][0]
    await visit.page.goto("about:blank")

    def state() -> str:
        return service.get(f"/alpha/v1/jobs/{job['id']}").json()["state"]

    await asyncio.to_thread(wait_until, lambda: state() == "cancelled")


async def test_history_survives_a_reload_and_restores_settings(visit: Visit):
    page = visit.page
    await visit.render(prompt="a blue cup", seed="7", cfg_scale="4.5")
    await page.fill("#cfg_scale", "")
    await visit.render(prompt="a green hat", seed="9007199254740993")
    await page.reload()
    await expect(page.locator("#history li")).to_have_count(2)
    await page.locator("#history button").nth(1).click()
    await expect(page.locator("#caption")).to_have_text("a blue cup")
    assert (await visit.facts())["Guidance"] == "4.5"
    await page.click("#reuse")
    settings = {
        "prompt": "a blue cup",
        "seed": "7",
        "steps": "5",
        "cfg_scale": "4.5",
        "width": "64",
    }
    assert await visit.values(*settings) == settings
    await page.locator("#history button").nth(0).click()
    assert (await visit.facts())["Seed"] == "9007199254740993"
    await page.click("#forget")
    await expect(page.locator("#history li")).to_have_count(0)
    await page.click("#forget")
    await expect(page.locator("#history li")).to_have_count(2)


async def test_undo_keeps_images_of_another_tab(visit: Visit):
    page = visit.page
    await visit.render(prompt="old")
    await page.click("#forget")
    await expect(page.locator("#history li")).to_have_count(0)
    other = await open_visit(page.context, visit.address)
    await other.render(prompt="new")
    await expect(page.locator("#history li")).to_have_count(1)
    await page.click("#forget")
    await expect(page.locator("#history li")).to_have_count(2)


async def test_reuse_reports_unavailable_settings(visit: Visit):
    page = visit.page
    await page.select_option("#checkpoint", "apples")
    await expect(page.locator("#checkpoint-help")).to_be_hidden()
    await visit.render(prompt="apple")
    await page.click("#reuse")
    await expect(page.locator("#note")).to_be_empty()
    assert await page.input_value("#checkpoint") == "apples"
    await page.evaluate(
        """() => {
          const [entry] = JSON.parse(localStorage.getItem("alphalayer.history"));
          Object.assign(entry.settings, { checkpoint: "pears", sampler_name: "Eulr" });
          localStorage.setItem("alphalayer.history", JSON.stringify([entry]));
        }"""
    )
    await page.reload()
    await expect(page.locator("#scheduler option")).not_to_have_count(0)
    await page.locator("#history button").click()
    await page.click("#reuse")
    await expect(page.locator("#note")).to_have_text("Not available: model pears, sampler Eulr.")
    assert await page.input_value("#checkpoint") == ""
    await expect(page.locator("#checkpoint-help")).to_contain_text("small built-in model")


async def test_reuse_of_a_batch_image_sets_its_own_seed(visit: Visit):
    page = visit.page
    await visit.fill(prompt="pair", seed="7", batch_size="2")
    await page.click("#generate")
    await expect(page.locator("#history li")).to_have_count(2)
    await page.locator("#history button").nth(1).click()
    await page.click("#reuse")
    assert await visit.values("seed", "batch_size") == {"seed": "8", "batch_size": "1"}


async def test_two_tabs_share_one_history(visit: Visit):
    other = await open_visit(visit.page.context, visit.address)
    await visit.render(prompt="here")
    await expect(other.page.locator("#history li")).to_have_count(1)
    await other.render(prompt="there")
    await expect(visit.page.locator("#history li")).to_have_count(2)
    await visit.page.reload()
    await expect(visit.page.locator("#history li")).to_have_count(2)


async def test_deleted_image_keeps_its_settings_in_the_history(visit: Visit):
    page = visit.page
    await visit.render(prompt="kept")
    await page.evaluate(
        """() => {
          const [entry] = JSON.parse(localStorage.getItem("alphalayer.history"));
          const settings = { ...entry.settings, prompt: "gone" };
          const gone = { ...entry, name: "alpha_1_gone.png", settings };
          localStorage.setItem("alphalayer.history", JSON.stringify([gone]));
        }"""
    )
    await page.reload()
    await expect(page.locator("#history span")).to_have_text("gone")
    await page.locator("#history button").click()
    await expect(page.locator("#empty")).to_contain_text("has removed this image")
    await expect(page.locator("#save-png")).to_be_hidden()
    await page.click("#reuse")
    assert await page.input_value("#prompt") == "gone"
    visit.errors.clear()
    await page.reload()
    await expect(page.locator("#history span")).to_have_text("gone")  # and is not requested again


async def test_page_is_usable_by_keyboard(visit: Visit):
    page = visit.page
    await _tab_to(page, "prompt", within=6)
    await visit.fill(steps="2")
    await page.focus("#prompt")
    await page.keyboard.press("Control+a")
    await page.keyboard.type("typed")
    await page.keyboard.press("Control+Enter")
    await expect(page.locator("#history li")).to_have_count(1)
    reached = await _tab_to(page, "forget", within=40)
    assert {
        "generate",
        "viewport",
        "save-png",
        "save-webp",
        "reuse",
        "alpha",
        "zoom-in",
        "choose-photo",
    } <= reached


async def test_page_opens_the_key_dialog_once(browser: Browser, tmp_path: Path):
    secret = add_key(tmp_path / "keys.json", "page")
    with served(tmp_path, keys_file=tmp_path / "keys.json", api_auth="user:word") as client:
        context = await browser.new_context(viewport=DESKTOP)
        visit = Visit(await context.new_page(), str(client.base_url))
        page = visit.page
        await page.goto(visit.address)
        await expect(page.locator("#key-error")).to_have_text("This service needs a key.")
        await visit.expect_no_serious_violation()
        await page.keyboard.press("Escape")
        await visit.fill()
        await page.click("#generate")
        await expect(page.locator("#key-dialog")).to_be_visible()
        assert len(visit.errors) == 1, "one refused request, and no other"
        await page.fill("#key", "wrong")
        await page.keyboard.press("Enter")
        await expect(page.locator("#key-error")).to_have_text("This key is not known.")
        for key in (secret, "user:word"):
            if not await page.locator("#key-dialog").is_visible():
                await page.click("#open-key")
            await page.fill("#key", key)
            await page.click("#key-dialog [value=save]")
            await expect(page.locator("#key-dialog")).to_be_hidden()
            await expect(page.locator("#state")).to_be_empty()
            await expect(page.locator("#scheduler option")).not_to_have_count(0)
            await visit.render()
            await expect(page.locator("#form-error")).to_be_empty()
        assert "X-API-Key" in str(await page.text_content("#snippet"))
        assert key not in str(await page.text_content("#snippet"))
        await context.close()


async def test_page_waits_for_an_unreachable_service(browser: Browser, tmp_path: Path):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    async with _start_service(tmp_path, port) as process:
        context = await browser.new_context(viewport=DESKTOP)
        visit = await open_visit(context, address)
        page = visit.page
        await visit.start("patient")
        process.kill()
        await expect(page.locator("#state")).to_have_text(
            "The service cannot be reached. Trying again…"
        )
        await expect(page.locator("#progress-words")).to_have_text("Waiting for the service")
        await page.click("#stop")
        await expect(page.locator("#progress-words")).to_contain_text("Not cancelled.")
        await expect(page.locator("#stop")).to_be_enabled()
        await page.click("#generate")
        await expect(page.locator("#form-error")).to_contain_text(
            "Press Generate again when it is back"
        )
        await visit.expect_no_serious_violation()
        process.start()
        await expect(page.locator("#state")).to_be_empty(timeout=60_000)
        await expect(page.locator("#form-error")).to_be_empty()
        await page.click("#stop")
        await expect(page.locator("#note")).to_have_text("Cancelled.")
        await context.close()


async def test_page_shows_why_the_service_is_not_ready(browser: Browser, tmp_path: Path):
    gate = tmp_path / "gate"
    options = {"engine": "tests.browser.gated:create_engine", "engine_options": {"gate": str(gate)}}
    with served(tmp_path, wait_ready=False, **options) as client:
        context = await browser.new_context(viewport=DESKTOP)
        visit = await open_visit(context, str(client.base_url))
        page = visit.page
        await visit.fill(prompt="early")
        await page.click("#generate")
        await expect(page.locator("#progress-words")).to_have_text("Starting: loading the model")
        await expect(page.locator("#state")).to_be_empty()
        gate.write_text("fine")
        await expect(page.locator("#history li")).to_have_count(1, timeout=15_000)
        gate.write_text("broken")
        supervisors = client.app.state.parts.pool.supervisors  # type: ignore[attr-defined]
        os.kill(supervisors[0].process_id, signal.SIGKILL)
        message = "The service cannot generate images: the card is gone. Put it back."
        await expect(page.locator("#state")).to_have_text(message, timeout=15_000)
        await page.click("#generate")
        await expect(page.locator("#progress-words")).to_have_text(
            "Waiting: the service cannot generate images"
        )
        await visit.expect_no_serious_violation()
        gate.write_text("fine")
        await expect(page.locator("#history li")).to_have_count(2, timeout=15_000)
        await expect(page.locator("#state")).to_be_empty()
        await context.close()


async def test_page_runs_more_jobs_than_browser_connections(browser: Browser, tmp_path: Path):
    # slow enough that the first job runs until it is stopped, also on a busy machine
    with served(put_model(tmp_path), engine_options={"step_s": 0.1}) as client:
        context = await browser.new_context(viewport=DESKTOP)
        visit = await open_visit(context, str(client.base_url))
        page = visit.page
        await visit.start("job 0")
        for i in range(1, 8):
            await visit.fill(prompt=f"job {i}", steps="1")
            await page.click("#generate")
            await expect(page.locator("#jobs li")).to_have_count(i + 1)
        await expect(page.locator("#jobs .how").last).to_contain_text("Number 7 in the queue")
        no_overlap = """all => all.every((cell) => {
          const next = cell.nextSibling.getBoundingClientRect();
          return cell.getBoundingClientRect().right <= next.left;
        })"""
        assert await page.locator("#jobs .how").evaluate_all(no_overlap)
        await page.get_by_role("button", name="Cancel job 7").click()
        await expect(page.locator("#jobs li")).to_have_count(7)
        # a hidden page opens no stream, and still receives the outcome
        await page.evaluate("Object.defineProperty(document, 'hidden', { get: () => true })")
        await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        visit.requests.clear()
        await page.click("#stop")
        await expect(page.locator("#history li")).to_have_count(6, timeout=15_000)
        assert not [url for url in visit.requests if url.endswith("/events")]
        await context.close()


async def test_proxy_error_counts_as_an_unreachable_service(visit: Visit):
    page = visit.page
    await visit.start("first", steps=40)
    await visit.fill(prompt="second", steps="5")
    await page.click("#generate")
    await expect(page.locator("#jobs li")).to_have_count(2)
    await page.context.route("**/*", lambda route: route.fulfill(status=503, body="no endpoints"))
    await expect(page.locator("#state")).to_contain_text("cannot be reached")
    await expect(page.locator("#jobs li").last).to_contain_text("Waiting for the service")
    await page.context.unroute_all()
    await expect(page.locator("#history li")).to_have_count(2)
    await expect(page.locator("#state")).to_be_empty()
    assert [error for error in visit.errors if "503" not in error] == []
    visit.errors.clear()


async def test_page_without_a_model_list_uses_worker_defaults(
    browser: Browser, service: httpx.Client
):
    context = await browser.new_context(viewport=DESKTOP)
    await context.route("**/alpha/v1/models", lambda route: route.fulfill(json={"models": []}))
    visit = await open_visit(context, str(service.base_url))
    page = visit.page
    assert await page.locator("#checkpoint, #sampler_name").evaluate_all(
        "all => all.map((field) => field.value)"
    ) == [
        "",
        "",
    ]
    for field in ("width", "height", "steps"):
        await page.fill(f"#{field}", "")
    await page.fill("#prompt", "any")
    await expect(page.locator("#brief")).to_have_text("seed 12345")
    await page.click("#generate")
    await expect(page.locator("#caption")).to_have_text("any")
    # the defaults of the worker, from the infotext of the image
    assert await visit.facts() == {
        **{
            "Model": "fake",
            "Size": "1024 × 1024",
            "Steps": "20",
            "Guidance": "5",
            "Sampler": "DPM++ 2M SDE",
        },
        **{"Schedule": "Karras", "Seed": "12345", "Negative prompt": "bad, ugly"},
    }
    assert await page.locator("#checkpoint option").all_text_contents() == ["Default"]
    assert await page.text_content("#state") == ""
    assert visit.errors == []
    await context.close()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_page_has_no_serious_accessibility_error(
    browser: Browser, service: httpx.Client, size: ViewportSize, scheme: str
):
    context = await browser.new_context(
        viewport=size,
        color_scheme=scheme,  # type: ignore[arg-type]
    )
    visit = await open_visit(context, str(service.base_url))
    page = visit.page
    await visit.expect_no_serious_violation()
    await page.evaluate(
        "document.querySelectorAll('details').forEach((details) => (details.open = true))"
    )
    await visit.render(prompt="x" * 300)
    await visit.expect_no_serious_violation()
    await visit.start("one", steps=100)
    await page.click("#generate")
    await expect(page.locator("#jobs li")).to_have_count(2)
    assert await visit.fits()
    await visit.expect_no_serious_violation()
    for dialog in ("key", "code"):
        await page.click(f"#open-{dialog}")
        await visit.expect_no_serious_violation()
        await page.keyboard.press("Escape")
    await context.close()


class _Service:
    """A service in its own process, which can be killed and started again."""

    def __init__(self, folder: Path, port: int):
        self._folder, self._port = folder, port
        self.start()

    def start(self) -> None:
        """Start the process."""
        self._process: subprocess.Popen[bytes] = fake_service.start(self._folder, self._port, 0.02)

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self._process.kill()
        self._process.wait()


@asynccontextmanager
async def _start_service(folder: Path, port: int) -> AsyncGenerator[_Service, None]:
    service = _Service(folder, port)
    try:
        await asyncio.to_thread(wait_until, lambda: _answers(f"http://127.0.0.1:{port}"), 60)
        yield service
    finally:
        service.kill()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ping", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


async def _tab_to(page: Page, element_id: str, within: int) -> set[str]:
    """Move the focus by Tab to an element, and return all focused ids."""
    reached: set[str] = set()
    for _ in range(within):
        await page.keyboard.press("Tab")
        reached.add(
            str(
                await page.evaluate("document.activeElement.id || document.activeElement.outerHTML")
            )
        )
        if element_id in reached:
            return reached
    pytest.fail(f"{element_id} is not reached, but {reached}")
