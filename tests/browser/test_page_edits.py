"""The page at `/` in Chromium: images to change, painted masks and layers."""

from __future__ import annotations

import asyncio
import io
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.async_api import Browser, Locator, expect
from tests.browser.visit import Visit, open_visit
from tests.support.serving import put_model, served

from alphalayer.core.modes import MODES
from alphalayer.engine.base import RgbaImage
from alphalayer.images import codecs

pytestmark = pytest.mark.asyncio(loop_scope="module")
ENGINE = "tests.browser.painting:create_engine"
SIDE = 64
MISSING = "bgble2fg"
"""The one mode whose file the service lacks."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = put_model(tmp_path_factory.mktemp("service"))
    (folder / "models" / "layer_model" / MODES[MISSING].files[0]).unlink()
    options = {"step_s": 0.02}
    with served(folder, engine=ENGINE, engine_options=options, default_model="apples") as client:
        yield client


def rgba(*, opaque: bool = False) -> RgbaImage:
    """Return an image of many colours, whose left quarter is transparent."""
    pixels = np.random.default_rng(5).integers(0, 256, (SIDE, SIDE, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:, : SIDE // 4, 3] = 255 * opaque
    return pixels


async def drop(visit: Visit, use: str, *, opaque: bool = False) -> None:
    await visit.drop("noise.png", codecs.encode(rgba(opaque=opaque)), use=use)


async def change(visit: Visit, **fields: str) -> RgbaImage:
    """Generate, and return the pixels of the result."""
    await visit.render(width="", height="", **fields)
    return codecs.decode(await visit.download("#save-png"))[0]


async def paint(visit: Visit, *places: tuple[float, float]) -> None:
    """Paint a line with the mouse. Places are fractions of the image."""
    canvas = visit.page.locator("#mask")
    await canvas.scroll_into_view_if_needed()
    box = await canvas.bounding_box()
    assert box
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    await visit.page.mouse.move(*points[0])
    await visit.page.mouse.down()
    for point in points[1:]:
        await visit.page.mouse.move(*point)
    await visit.page.mouse.up()


async def painted(visit: Visit) -> float:
    """Return the share of the mask that is painted."""
    return await visit.page.evaluate(
        """() => {
          const { width, height } = document.getElementById("mask");
          const pen = document.getElementById("mask").getContext("2d");
          const { data } = pen.getImageData(0, 0, width, height);
          return data.filter((value, i) => i % 4 === 3 && value).length / (width * height);
        }"""
    )


async def titles(visit: Visit) -> list[str]:
    """Return the names of the listed layers, from the top."""
    return await visit.page.locator("#layers b").all_text_contents()


async def test_dropped_image_is_changed_as_a_whole(visit: Visit, service: httpx.Client):
    page = visit.page
    await drop(visit, "whole")
    await expect(page.locator("#generate-word")).to_have_text("Change")
    await expect(page.locator(".refs[data-role=init] .name")).to_have_text("noise.png")
    await page.locator("#strength").fill("0.5")
    pixels = await change(visit, prompt="a star")
    own = rgba()
    assert pixels.shape == own.shape
    assert np.array_equal(pixels[0, 0], own[0, 0])  # outside of the disc
    assert not np.array_equal(pixels, own)
    facts = await visit.facts()
    assert (facts["From"], facts["Size"]) == ("noise.png", "64 × 64")
    assert "data:" not in await page.evaluate("JSON.stringify(localStorage)")
    await page.reload()
    await expect(page.locator("#history li")).to_have_count(1)
    await page.click("#history button")
    assert (await visit.facts())["From"] == "noise.png"


async def test_painted_mask_limits_the_change(visit: Visit):
    page = visit.page
    await drop(visit, "part")
    await expect(page.locator("#mask")).to_be_focused()
    await paint(visit, (0.6, 0.5), (0.7, 0.5), (0.8, 0.5))
    once = await painted(visit)
    await paint(visit, (0.5, 0.1), (0.9, 0.1))
    twice = await painted(visit)
    await page.click("#mask-undo")
    assert await painted(visit) == once < twice
    await page.click("#mask-redo")
    assert await painted(visit) == twice
    await page.keyboard.press("Control+z")
    await page.focus("#mask")
    await page.keyboard.press("Control+z")
    assert await painted(visit) == once
    await visit.expect_no_serious_violation()
    pixels = await change(visit, prompt="a star")
    is_changed = (pixels != rgba()).any(axis=2)
    rows, columns = np.nonzero(is_changed)
    assert 24 <= rows.min() <= rows.max() <= 40
    assert 32 <= columns.min() <= columns.max() <= 57
    assert 0.5 * once < is_changed.mean() <= once
    await page.click("#open-mask")
    assert await painted(visit) == once


async def test_mask_is_painted_with_keys(visit: Visit):
    page = visit.page
    await drop(visit, "part")
    await page.focus("#mask")
    await page.keyboard.press("Space")
    dot = await painted(visit)
    assert dot > 0
    for _ in range(3):
        await page.keyboard.press("]")
    await page.keyboard.down("Space")
    await page.keyboard.press("Shift+ArrowRight")
    await page.keyboard.up("Space")
    line = await painted(visit)
    assert line > 2 * dot
    await page.keyboard.press("i")
    assert await painted(visit) > 1 - line
    await page.keyboard.press("i")
    await page.keyboard.press("e")
    await expect(page.locator("[data-tool=eraser]")).to_have_attribute("aria-pressed", "true")
    await page.keyboard.press("Space")
    assert await painted(visit) < line
    await page.click("#mask-clear")
    await visit.fill(prompt="a star")
    await page.click(".bar [type=submit]")
    await expect(page.locator("#mask-error")).to_have_text(
        "Nothing is painted. Paint the part to change."
    )


async def test_opaque_image_is_changed_without_transparency(visit: Visit):
    page = visit.page
    await drop(visit, "whole", opaque=True)
    await visit.fill(prompt="a star", width="", height="")
    await page.click("#generate")
    await expect(page.locator("#init-error")).to_contain_text("The image is opaque")
    visit.errors.clear()  # Chromium logs each error response to its console
    await page.click("#go-opaque")
    await expect(page.locator("#history li")).to_have_count(1)
    await expect(page.locator("#init-error")).to_be_empty()
    assert not await page.is_checked("#layerdiffuse_enabled")
    await page.click("#use")
    await expect(page.locator("#dropped-name")).to_contain_text("64 × 64")


async def test_change_without_an_image_is_reported(visit: Visit):
    page = visit.page
    await page.check("[name=task][value=img2img]")
    await visit.fill(prompt="a star")
    await page.click("#generate")
    await expect(page.locator("#init-error")).to_have_text("Choose the image to change.")
    await page.set_input_files(
        "#init", files=[{"name": "x.png", "mimeType": "image/png", "buffer": b"no image"}]
    )
    await expect(page.locator("#init-error")).to_contain_text("x.png is not an image")


async def test_pasted_image_is_shown_with_its_choices(visit: Visit):
    await visit.page.evaluate(
        """(bytes) => {
          const clipboardData = new DataTransfer();
          const file = new File([new Uint8Array(bytes)], "paste.png", { type: "image/png" });
          clipboardData.items.add(file);
          const paste = new ClipboardEvent("paste", { clipboardData, bubbles: true });
          document.body.dispatchEvent(paste);
        }""",
        list(codecs.encode(rgba(opaque=True))),
    )
    page = visit.page
    await expect(page.locator("#dropped-name")).to_have_text("paste.png, 64 × 64")
    await expect(page.locator(".choice[value=foreground]")).to_be_disabled()
    await expect(page.locator(".choice[value=background] em")).to_have_text("needs files")
    await page.click("#leave-choose")
    await expect(page.locator("#viewport")).to_be_visible()


async def test_layers_are_hidden_moved_and_downloaded(visit: Visit):
    page = visit.page
    await drop(visit, "foreground")
    await expect(page.locator("#generate-word")).to_have_text("Generate layers")
    await visit.render(prompt="a star", width="", height="")
    assert await titles(visit) == ["Composite", "Blended", "Foreground", "Background"]
    eyes = page.locator("#layers .eye")
    pressed = [await eyes.nth(i).get_attribute("aria-pressed") for i in range(4)]
    assert pressed == ["false", "false", "true", "true"]
    await visit.expect_no_serious_violation()
    shown = codecs.decode(await visit.download("#save-shown"))[0]
    await page.click("[aria-label='Show Foreground']")
    hidden = codecs.decode(await visit.download("#save-shown"))[0]
    assert not np.array_equal(shown, hidden)
    await page.click("[aria-label='Show Foreground']")
    await page.focus("[aria-label^='Move Foreground']")
    await page.keyboard.press("ArrowUp")
    assert await titles(visit) == ["Composite", "Foreground", "Blended", "Background"]
    await expect(page.locator("[aria-label^='Move Foreground']")).to_be_focused()
    await expect(page.locator("#moved")).to_have_text("Foreground is layer 2 of 4.")
    await drag(
        visit, page.locator("[aria-label^='Move Background']"), page.locator("#layers li").first
    )
    assert await titles(visit) == ["Background", "Composite", "Foreground", "Blended"]
    for kind, start in {"psd": b"8BPS", "ora": b"PK", "tiff": b"II"}.items():
        assert (await visit.download(f"[data-document={kind}]")).startswith(start), kind
    archive = zipfile.ZipFile(io.BytesIO(await visit.download("[data-document=zip]")))
    assert len(archive.namelist()) == 4
    foreground = codecs.decode(await visit.download("[aria-label='Download Foreground']"))[0]
    is_visible = rgba()[..., 3] > 0
    assert np.array_equal(foreground[is_visible], rgba()[is_visible])
    await page.reload()
    await page.click("#history button")
    await expect(page.locator("#layers li")).to_have_count(4)
    assert (await visit.download("[data-document=ora]")).startswith(b"PK")


async def drag(visit: Visit, grip: Locator, target: Locator) -> None:
    """Drag the grip of a layer with the mouse."""
    await grip.scroll_into_view_if_needed()
    start, end = await grip.bounding_box(), await target.bounding_box()
    assert start
    assert end
    x = start["x"] + 8
    await visit.page.mouse.move(x, start["y"] + 8)
    await visit.page.mouse.down()
    await visit.page.mouse.move(x, end["y"] + end["height"] / 2, steps=8)
    await visit.page.mouse.up()


async def test_only_layers_with_files_are_offered(visit: Visit):
    page = visit.page
    await page.check("[name=task][value=layers]")
    options = page.locator("#want option")
    await expect(options).to_have_count(4)
    await expect(page.locator("#want-help")).to_be_empty()
    await page.set_input_files(
        "#background",
        files=[
            {
                "name": "desk.png",
                "mimeType": "image/png",
                "buffer": codecs.encode(rgba(opaque=True)),
            }
        ],
    )
    await expect(page.locator("#want-help")).to_have_text(
        "For the others, run: alphalayer models pull layerdiffuse-bgble2fg"
    )
    assert await page.input_value("#want") == "blended"
    assert await page.locator("#want option:disabled").count() == 2
    await page.select_option("#checkpoint", "alphalayer-mini")
    await expect(page.locator("#want-help")).to_have_text(
        "This model generates no layers from background."
    )
    await page.click("[aria-label='Remove the background']")
    await expect(options).to_have_text(["Foreground"])
    await expect(page.locator("#want-help")).to_have_text("This model cannot generate the others.")


async def test_edits_fit_a_narrow_phone(browser: Browser, service: httpx.Client):
    size = {"width": 360, "height": 740}
    context = await browser.new_context(
        viewport=size,  # type: ignore[arg-type]
        color_scheme="dark",
        has_touch=True,
        is_mobile=True,
    )
    visit = await open_visit(context, str(service.base_url))
    page = visit.page
    await visit.drop("noise.png", codecs.encode(rgba()))
    await expect(page.locator(".choose")).to_be_visible()
    await expect(page.locator("#choose-title")).to_be_focused()
    await visit.expect_no_serious_violation()
    assert await visit.fits()
    await page.tap(".choice[value=part]")
    await page.tap("#mask")
    assert await painted(visit) > 0
    await visit.expect_no_serious_violation()
    assert await visit.fits()
    await page.evaluate("document.getElementById('options').open = true")
    await page.check("[name=task][value=layers]", force=True)
    await visit.render(prompt="a star")
    await expect(page.locator(".layered")).to_be_visible()
    await visit.expect_no_serious_violation()
    assert await visit.fits()
    assert visit.errors == visit.external_requests == []
    await context.close()


async def test_shown_code_sends_the_image(visit: Visit, tmp_path: Path):
    page = visit.page
    await drop(visit, "whole")
    await visit.fill(prompt='it\'s a "cup"', steps="2", width="", height="")
    await page.click("#open-code")
    for language in ("curl", "python", "javascript"):
        await page.check(f"[name=language][value={language}]")
        code = str(await page.text_content("#snippet"))
        command = {"curl": ["bash", "-c", code], "python": [sys.executable, "-c", code]}.get(
            language, ["node", "--input-type=module", "-e", code]
        )
        if not shutil.which(command[0]):
            continue
        folder = tmp_path / language
        folder.mkdir()
        (folder / "noise.png").write_bytes(codecs.encode(rgba()))
        result = await asyncio.to_thread(
            subprocess.run, command, cwd=folder, capture_output=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stderr
        (saved,) = folder.glob("alpha_*.png")
        assert 'it\'s a "cup"' in (codecs.decode(saved.read_bytes())[1] or "")


async def test_signed_sets_of_layers_are_downloaded(browser: Browser, tmp_path: Path):
    put_model(tmp_path)
    secret = "a secret of 16 characters"
    with served(tmp_path, default_model="apples", sign_file_urls=secret) as client:
        context = await browser.new_context(accept_downloads=True)
        visit = await open_visit(context, str(client.base_url))
        page = visit.page
        await drop(visit, "foreground")
        await visit.fill(prompt="a star", width="", height="", batch_size="2")
        await page.click("#generate")
        await expect(page.locator("#history li")).to_have_count(2)
        for name in ("", "&set=2"):
            visit.requests.clear()
            await visit.download("[data-document=zip]")
            (request,) = (url for url in visit.requests if "layers.zip" in url)
            assert "signature=" in request
            assert request.endswith(name)
            assert ("set=" in request) == bool(name)
            await page.locator("#history button").last.click()
        assert visit.errors == []
        await context.close()
