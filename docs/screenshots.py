"""Takes the playground's screenshots in docs/guides/playground/: `python docs/screenshots.py`. Needs Chromium and a model to draw with."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from playwright.async_api import async_playwright

TARGET = Path(__file__).parent / "guides" / "playground"
PORT = 7899
ADDRESS = f"http://127.0.0.1:{PORT}"
SIZES: dict[str, Any] = {"desktop": {"width": 1280, "height": 1080}, "phone": {"width": 390, "height": 844}}
PROMPTS = ("a slice of pizza", "a green dinosaur", "a red apple")


async def shoot() -> None:
    """Draw on the page as a person would, in both schemes and sizes."""
    async with async_playwright() as playwright:
        path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        for scheme in ("light", "dark"):
            for name, size in SIZES.items():
                context = await browser.new_context(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
                page = await context.new_page()
                await page.goto(ADDRESS)
                await page.wait_for_selector("#scheduler option", state="attached")
                for i, prompt in enumerate(PROMPTS):
                    await page.fill("#prompt", prompt)
                    await page.click("#draw")
                    await page.locator("#history li").nth(i).wait_for(timeout=120_000)
                await page.screenshot(path=TARGET / f"{name}-{scheme}.png", full_page=name == "phone")
                await context.close()
        await browser.close()


def main() -> None:
    """Start a service in an empty folder, take the pictures, stop it."""
    TARGET.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "alphalayer.cli", "serve", "--port", str(PORT), "--device", "cpu"]
        service = subprocess.Popen(command, cwd=folder)
        try:
            asyncio.run(_wait_and_shoot())
        finally:
            service.terminate()
            service.wait(60)


async def _wait_and_shoot() -> None:
    while not await asyncio.to_thread(_is_ready):
        await asyncio.sleep(0.5)
    await shoot()


def _is_ready() -> bool:
    try:
        with urllib.request.urlopen(f"{ADDRESS}/ping", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
