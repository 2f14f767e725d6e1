"""Chromium, and a service with the fake engine, for the tests of the page.

Without Chromium, the tests are skipped.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import Browser, async_playwright
from tests.browser.visit import CHROMIUM, DESKTOP, FLAGS, Visit, open_visit
from tests.support.serving import put_model, served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    if not CHROMIUM:
        pytest.skip("needs Chromium (or its path in CHROMIUM)")
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        await chromium.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = put_model(tmp_path_factory.mktemp("service"))
    with served(folder, engine_options={"step_s": 0.02}, default_model="alphalayer-mini") as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def visit(browser: Browser, service: httpx.Client) -> AsyncIterator[Visit]:
    """Yield the open page; fail on console errors and on requests to other servers."""
    context = await browser.new_context(viewport=DESKTOP, accept_downloads=True)
    open_page = await open_visit(context, str(service.base_url))
    yield open_page
    await context.close()
    assert open_page.errors == []
    assert open_page.external_requests == []
