"""Screenshots of the playground for docs/guides/playground/.

`python docs/screenshots.py` takes them. It needs Chromium.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from playwright.async_api import BrowserContext, Page, async_playwright, expect

TARGET = Path(__file__).parent / "guides" / "playground"
PORT = 7899
ADDRESS = f"http://127.0.0.1:{PORT}"
SIZES: dict[str, Any] = {
    "desktop": {"width": 1440, "height": 900},
    "phone": {"width": 390, "height": 844},
}
PROMPTS = ("a slice of pizza", "a green dinosaur", "a red apple")
QUEUED = ("a yellow star", "a blue cup, high quality", "a fish")
SLOW_MS = 600_000


async def take_screenshots() -> None:
    """Generate on the page, and take screenshots of results, a mask, and running jobs.

    Each one is taken in both sizes and both colour schemes.
    """
    async with async_playwright() as playwright:
        path = (
            os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        )
        browser = await playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        context = await browser.new_context()
        page = await _open(context)
        for i, prompt in enumerate(PROMPTS):
            await _generate(page, prompt)
            await page.locator("#history li").nth(i).wait_for(timeout=SLOW_MS)
        history = await context.storage_state()
        await context.close()
        for name, size in SIZES.items():
            is_phone = name == "phone"
            context = await browser.new_context(
                viewport=size, storage_state=history, has_touch=is_phone, is_mobile=is_phone
            )
            page = await _open(context)
            await page.fill("#prompt", PROMPTS[-1])
            await page.locator("#history button").first.click()
            await page.wait_for_selector("#image:not(.preview)")
            await _take_screenshot(page, name, "")
            await _paint_mask(page)
            await _take_screenshot(page, name, "-mask")
            await page.click("#leave-mask")
            await page.check("[name=task][value=image]")
            for prompt in QUEUED:
                await _generate(page, prompt)
            step = page.locator("#progress-words")
            await expect(step).to_contain_text(re.compile(r"Step (8|9|1\d) "), timeout=SLOW_MS)
            await _take_screenshot(page, name, "-running")
            await context.close()
        await browser.close()


async def _take_screenshot(page: Page, name: str, state: str) -> None:
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        await page.wait_for_timeout(500)
        await page.screenshot(
            path=TARGET / f"{name}-{scheme}{state}.png", full_page=name == "phone"
        )


async def _paint_mask(page: Page) -> None:
    """Use the shown image, and paint a part of it."""
    await page.click("#use")
    await page.click(".choice[value=part]")
    box = await page.locator("#mask").bounding_box()
    assert box
    y = box["y"] + 0.7 * box["height"]
    await page.mouse.move(box["x"] + 0.35 * box["width"], y)
    await page.mouse.down()
    await page.mouse.move(box["x"] + 0.65 * box["width"], y, steps=8)
    await page.mouse.up()
    await page.fill("#prompt", "a red apple with a green stripe")


async def _open(context: BrowserContext) -> Page:
    page = await context.new_page()
    await page.goto(ADDRESS)
    await page.wait_for_selector("#scheduler option", state="attached")
    return page


async def _generate(page: Page, prompt: str) -> None:
    """Click the button, and wait until it is enabled again."""
    await page.fill("#prompt", prompt)
    await page.click("#generate")
    await expect(page.locator("#generate-word")).to_have_text("Generate")


def main() -> None:
    """Start a service in an empty folder, take the screenshots, and stop it."""
    TARGET.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "alphalayer",
            "serve",
            "--port",
            str(PORT),
            "--device",
            "cpu",
        ]
        service = subprocess.Popen(command, cwd=folder)
        try:
            asyncio.run(_wait_and_take_screenshots())
        finally:
            service.terminate()
            service.wait(SLOW_MS / 1000)


async def _wait_and_take_screenshots() -> None:
    while not await asyncio.to_thread(_is_ready):
        await asyncio.sleep(0.5)
    await take_screenshots()


def _is_ready() -> bool:
    try:
        with urllib.request.urlopen(f"{ADDRESS}/ping", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
