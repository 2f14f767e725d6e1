"""A user of the page."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
from axe_playwright_python.async_playwright import Axe
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.async_api import BrowserContext, Page, ViewportSize, expect

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(
        None,
        map(
            shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        ),
    ),
    None,
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
DESKTOP, PHONE = ViewportSize(width=1280, height=900), ViewportSize(width=390, height=844)


class Visit:
    """An open page, its requests and its errors."""

    def __init__(self, page: Page, address: str):
        self.page, self.address = page, address
        self.errors: list[str] = []
        self.external_requests: list[str] = []
        self.requests: list[str] = []
        page.on(
            "console",
            lambda message: self.errors.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._record(request.url))
        page.set_default_timeout(20_000)

    def _record(self, url: str) -> None:
        if not url.startswith((self.address, "blob:", "data:")):
            self.external_requests.append(url)
        self.requests.append(url.removeprefix(self.address))

    async def render(self, **fields: str) -> None:
        """Fill the form, generate, and wait for the image."""
        await self.fill(**fields)
        before = await self.page.locator("#history li").count()
        await self.page.click("#generate")
        await expect(self.page.locator("#history li")).to_have_count(before + 1)

    async def fill(self, **fields: str) -> None:
        """Fill the form for small images, few steps and other values."""
        for name, value in {"width": "64", "height": "64", "steps": "5", **fields}.items():
            await self.page.fill(f"#{name}", value)

    async def start(self, prompt: str, steps: int = 150) -> None:
        """Generate, and wait until the job runs."""
        await self.fill(prompt=prompt, steps=str(steps))
        await self.page.click("#generate")
        await expect(self.page.locator("#progress-words")).to_contain_text("Step")

    async def values(self, *names: str) -> dict[str, str]:
        """Return the values of form fields."""
        return {name: await self.page.input_value(f"#{name}") for name in names}

    async def facts(self) -> dict[str, str]:
        """Return the facts below the image."""
        terms = await self.page.locator("#facts dt").all_text_contents()
        return dict(
            zip(terms, await self.page.locator("#facts dd").all_text_contents(), strict=True)
        )

    async def drop(
        self, name: str, data: bytes, mime: str = "image/png", more: int = 0, use: str = ""
    ) -> None:
        """Drop a file on the page, and choose its `use`; `more` bytes are added to it."""
        transfer = await self.page.evaluate_handle(
            """([name, bytes, type, more]) => {
              const transfer = new DataTransfer();
              const parts = [new Uint8Array(bytes), new Uint8Array(more)];
              transfer.items.add(new File(parts, name, { type }));
              return transfer;
            }""",
            [name, list(data), mime, more],
        )
        await self.page.dispatch_event("#viewport", "drop", {"dataTransfer": transfer})
        if use:
            await self.page.click(f".choice[value={use}]")

    async def download(self, button: str) -> bytes:
        """Click a download button, and return the file."""
        async with self.page.expect_download() as waiting:
            await self.page.click(button)
        return Path(await (await waiting.value).path()).read_bytes()

    async def viewport(self) -> np.ndarray:
        """Return the pixels of the viewport, (height, width, 3)."""
        screenshot = await self.page.locator("#viewport").screenshot()
        return np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB"))

    async def corner(self) -> tuple[int, ...]:
        """Return the colour of the background."""
        return tuple(int(value) for value in (await self.viewport())[8, 8])

    async def fits(self) -> bool:
        """Return whether the page does not scroll sideways."""
        return await self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    async def expect_no_serious_violation(self) -> None:
        """Check the page with axe for serious violations."""
        result = await Axe().run(self.page)
        serious = [
            violation
            for violation in result.response["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
        assert serious == [], json.dumps(serious, indent=1)[:4000]


async def open_visit(context: BrowserContext, address: str) -> Visit:
    """Open the page and wait until it has loaded the options of the service."""
    visit = Visit(await context.new_page(), address)
    await visit.page.goto(address)
    await expect(visit.page.locator("#scheduler option")).not_to_have_count(0)
    return visit


def encode_image(
    format: str = "PNG", parameters: str = "", color: tuple[int, int, int] = (200, 30, 90)
) -> bytes:
    """Return an image file of one colour, with the `parameters` text of AUTOMATIC1111."""
    info, file = PngInfo(), io.BytesIO()
    if parameters:
        info.add_text("parameters", parameters)
    Image.new("RGB", (40, 40), color).save(
        file, format, **({"pnginfo": info} if format == "PNG" else {})
    )
    return file.getvalue()
