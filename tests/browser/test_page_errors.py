"""The page at `/` in Chromium with a wrong key, a lost response or a browser without storage."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from playwright.async_api import Browser, Route, expect
from tests.browser.visit import DESKTOP, Visit, open_visit
from tests.support.serving import served

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_mistyped_key_loses_no_running_job(browser: Browser, tmp_path: Path):
    with served(tmp_path, api_auth="ann:one", engine_options={"step_s": 0.02}) as client:
        context = await browser.new_context(viewport=DESKTOP)
        await context.add_init_script(
            "localStorage.getItem('alphalayer.key')"
            " ?? localStorage.setItem('alphalayer.key', 'ann:one')"
        )
        visit = await open_visit(context, str(client.base_url))
        page = visit.page
        await visit.start("first", steps=100)
        await visit.fill(prompt="second", steps="5")
        await page.click("#generate")
        await expect(page.locator("#jobs li")).to_have_count(2)
        await _enter(visit, "ann:typo")
        await expect(page.locator("#key-error")).to_have_text("This key is not known.")
        await expect(page.locator("#jobs .how").last).to_have_text("Waiting for the key")
        await page.fill("#key", "ann:one")
        await page.keyboard.press("Enter")
        await expect(page.locator("#history li")).to_have_count(2)
        await expect(page.locator("#key-dialog")).to_be_hidden()
        await context.close()


async def test_key_with_invalid_characters_is_not_stored(visit: Visit):
    page = visit.page
    await _enter(visit, "alk_abc…")
    await expect(page.locator("#key-error")).to_have_text(
        "A key cannot contain “…”. Copy it again."
    )
    await page.fill("#key", "user:pässwört…")
    await page.keyboard.press("Enter")
    await expect(page.locator("#key-dialog")).to_be_hidden()
    await visit.render(prompt="x")
    await page.evaluate("localStorage.setItem('alphalayer.key', 'alk_abc…')")
    await page.reload()
    await expect(page.locator("#scheduler option")).not_to_have_count(0)
    await visit.render(prompt="y")
    await expect(page.locator("#state")).to_be_empty()


async def test_key_dialog_keeps_typed_text_after_a_retry(browser: Browser, service: httpx.Client):
    context = await browser.new_context(viewport=DESKTOP)
    await context.route(
        "**/alpha/v1/models",
        lambda route: route.fulfill(status=401, json={"detail": "a key is needed."}),
    )
    page = await context.new_page()
    await page.goto(str(service.base_url))
    await expect(page.locator("#key-dialog")).to_be_visible()
    await page.fill("#key", "alk_half")
    # after an outage, the page sends the request again, and is refused again
    await context.route("**/readyz", lambda route: route.abort())
    await expect(page.locator("#state")).to_contain_text("cannot be reached", timeout=15_000)
    await context.unroute("**/readyz")
    await expect(page.locator("#state")).to_contain_text("needs a key")
    assert await page.input_value("#key") == "alk_half"
    await context.close()


async def test_request_with_a_lost_response_runs_once(visit: Visit, service: httpx.Client):
    page = visit.page

    async def lose(route: Route) -> None:
        await route.fetch()
        await route.abort()

    def job_ids() -> set[str]:
        return {
            job["id"] for job in service.get("/alpha/v1/jobs", params={"limit": 200}).json()["jobs"]
        }

    before = await asyncio.to_thread(job_ids)
    await page.context.route("**/alpha/v1/jobs", lose)
    await visit.fill(prompt="lost", seed="-1")
    await page.click("#generate")
    await expect(page.locator("#form-error")).to_contain_text("the job runs only once")
    await page.context.unroute("**/alpha/v1/jobs")
    await page.context.route(
        "**/alpha/v1/jobs", lambda route: route.fulfill(status=429, json={"detail": "too much."})
    )
    await page.click("#generate")
    await expect(page.locator("#form-error")).to_have_text("Too much.")
    await page.context.unroute("**/alpha/v1/jobs")
    await page.click("#generate")
    await expect(page.locator("#history li")).to_have_count(1)
    await page.click("#generate")
    await expect(page.locator("#history li")).to_have_count(2)
    assert len(await asyncio.to_thread(job_ids) - before) == 2
    visit.errors.clear()


async def test_api_link_opens_in_another_tab(visit: Visit, service: httpx.Client):
    await visit.start("kept", steps=40)
    async with visit.page.expect_popup():
        await visit.page.click("text=API")
    await expect(visit.page.locator("#history li")).to_have_count(1)


async def test_browser_without_storage_generates(browser: Browser, service: httpx.Client):
    context = await browser.new_context(viewport=DESKTOP)
    await context.add_init_script(
        "Object.defineProperty(window, 'localStorage',"
        " { get() { throw new DOMException('denied') } })"
    )
    visit = await open_visit(context, str(service.base_url))
    await visit.render(prompt="kept for now")
    await _enter(visit, "any")
    await visit.render(prompt="another")
    assert visit.errors == []
    await context.close()


async def _enter(visit: Visit, key: str) -> None:
    """Save a key."""
    await visit.page.click("#open-key")
    await visit.page.fill("#key", key)
    await visit.page.keyboard.press("Enter")
