"""The page at `/` in Chromium: image, background, zoom, downloads, code and dropped images."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.async_api import Browser, Route, ViewportSize, expect
from tests.browser.visit import DESKTOP, PHONE, Visit, encode_image, open_visit
from tests.support.serving import put_model, served

from alphalayer.images import codecs, postprocess

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def _generate_image(service: httpx.Client, **fields: Any) -> bytes:
    """Generate an image on the service, and return its file."""
    body = {"steps": 3, "width": 64, "height": 128, **fields}
    answer = await asyncio.to_thread(service.post, "/alpha/v1/txt2img", json=body)
    return (await asyncio.to_thread(service.get, answer.json()["url"])).content


async def test_dropped_image_fills_the_form(visit: Visit, service: httpx.Client):
    page = visit.page
    body = {
        "prompt": "a dropped, (fine:1.2) star",
        "negative_prompt": "",
        "seed": 99,
        "steps": 3,
        "cfg_scale": 7.5,
    }
    body |= {"width": 64, "height": 128, "sampler_name": "Euler a", "scheduler": "Exponential"}
    await visit.drop("star.png", await _generate_image(service, **body), use="settings")
    await expect(page.locator("#note")).to_contain_text("The settings of star.png are in the form.")
    assert await visit.values(*body) == {name: str(value) for name, value in body.items()}
    assert await page.is_checked("#layerdiffuse_enabled")
    await expect(page.locator("#carried")).to_be_hidden()


async def test_settings_without_a_field_are_carried_along(visit: Visit, service: httpx.Client):
    page = visit.page
    body = {
        "prompt": "a mug",
        "seed": 9007199254740993,
        "layerdiffuse_method": "conv",
        "layerdiffuse_weight": 0.5,
    }
    body |= {
        "layerdiffuse_stop_at": 0.25,
        "subseed": 9007199254740995,
        "subseed_strength": 0.5,
        "checkpoint": "apples",
    }
    first = await _generate_image(service, **body)
    await visit.drop("mug.png", first, use="settings")
    await expect(page.locator("#carried-words")).to_contain_text("conv")
    assert await page.input_value("#seed") == "9007199254740993"
    await page.select_option("#checkpoint", "apples")
    await page.click("#generate")
    await expect(page.locator("#history li")).to_have_count(1)
    infotext = codecs.decode(await visit.download("#save-png"))[1] or ""
    for text in ("Conv Injection", "weight: 0.5", "ending_step: 0.25", "Seed: 9007199254740993"):
        assert text in (codecs.decode(first)[1] or "")
        assert text in infotext
    assert "conv" in (await visit.facts())["Also"]
    await page.click("#drop-carried")
    assert "layerdiffuse" not in str(await page.text_content("#snippet"))


async def test_dropped_forge_image_lists_unavailable_settings(visit: Visit):
    text = (
        "a cat, <lora:foo:0.8>\nNegative prompt: ugly\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 5, Seed: 7, Size: 512x768, "
        "Model hash: abc, Model: juggernautXL, Clip skip: 2, Refiner: sdxl, Version: f2.0"
    )
    await visit.drop("cat.png", encode_image(parameters=text), use="settings")
    await expect(visit.page.locator("#note")).to_have_text(
        "The settings of cat.png are in the form. "
        "Not available: model juggernautXL, clip skip 2, refiner sdxl."
    )
    values = {
        "prompt": "a cat, <lora:foo:0.8>",
        "sampler_name": "DPM++ 2M",
        "scheduler": "",
        "width": "512",
    }
    assert await visit.values(*values) == values  # "" is the model's own: Karras
    assert not await visit.page.is_checked("#layerdiffuse_enabled")


@pytest.mark.parametrize(
    ("parameters", "unavailable", "checkpoint"),
    [
        ("Model hash: deadbeef12", " Not available: model [deadbeef12].", ""),
        (
            "Model hash: deadbeef12, Model: apples",
            " Not available: model apples [deadbeef12].",
            "apples",
        ),
        ("Model hash: 0123456789, Model: another name", "", "apples"),
        (
            "layerdiffusion_enabled: True, layerdiffusion_decode: forge2",
            " Not available: LayerDiffuse decode forge2 (unless the service is set to it).",
            "",
        ),
    ],
)
async def test_dropped_image_selects_its_model_by_hash(
    browser: Browser, service: httpx.Client, parameters: str, unavailable: str, checkpoint: str
):
    async def with_hash(route: Route) -> None:
        models = await asyncio.to_thread(lambda: service.get("/alpha/v1/models").json())
        for model in models["models"]:
            model["title"] = (
                f"{model['name']} [0123456789]" if model["name"] == "apples" else model["name"]
            )
        await route.fulfill(json=models)

    context = await browser.new_context(viewport=DESKTOP)
    await context.route("**/alpha/v1/models", with_hash)
    visit = await open_visit(context, str(service.base_url))
    text = f"a cat\nSteps: 20, Sampler: Euler, CFG scale: 5, Seed: 7, Size: 512x512, {parameters}"
    await visit.drop("cat.png", encode_image(parameters=text), use="settings")
    await expect(visit.page.locator("#note")).to_have_text(
        f"The settings of cat.png are in the form.{unavailable}"
    )
    assert await visit.values("checkpoint") == {"checkpoint": checkpoint}
    await context.close()


async def test_variation_batch_has_one_seed(visit: Visit, service: httpx.Client):
    page = visit.page
    body = {"prompt": "a mug", "seed": 9007199254740993, "subseed": 5, "subseed_strength": 0.5}
    await visit.drop("mug.png", await _generate_image(service, **body), use="settings")
    await expect(page.locator("#carried-words")).to_contain_text("variation")
    await page.fill("#batch_size", "2")
    await page.click("#generate")
    await expect(page.locator("#history li")).to_have_count(2)
    for i in range(2):
        await page.locator("#history button").nth(i).click()
        assert (await visit.facts())["Seed"] == "9007199254740993"


async def test_dragged_text_keeps_its_default_action(visit: Visit):
    dispatch_drag = """([kind, name]) => {
      const dataTransfer = new DataTransfer();
      if (name) dataTransfer.items.add(new File(["x"], name));
      else dataTransfer.setData("text/plain", "a word");
      return document.getElementById("prompt").dispatchEvent(
        new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
    }"""
    for kind in ("dragover", "drop"):
        assert await visit.page.evaluate(dispatch_drag, [kind, ""])
        assert not await visit.page.evaluate(dispatch_drag, [kind, "cat.txt"])


async def test_dropped_image_lists_unavailable_schedule_and_rng(visit: Visit):
    text = (
        "a cat\nSteps: 20, Sampler: DPM++ 2M SDE, Schedule type: Automatic, CFG scale: 5, "
        "Seed: 7, Size: 64x64, RNG: "
    )
    await visit.drop("cat.png", encode_image(parameters=text + "CPU"), use="settings")
    await expect(visit.page.locator("#note")).to_have_text(
        "The settings of cat.png are in the form. Not available: RNG CPU."
    )
    assert await visit.values("scheduler") == {"scheduler": "Exponential"}
    other = encode_image(parameters=text.replace(" Automatic", " Sigmoid") + "NV")
    await visit.drop("dog.png", other, use="settings")
    await expect(visit.page.locator("#note")).to_have_text(
        "The settings of dog.png are in the form. Not available: schedule type Sigmoid."
    )
    assert await visit.values("scheduler") == {"scheduler": ""}


@pytest.mark.parametrize(
    ("status", "message"),
    [(413, "A proxy before the service refused this request"), (429, "without a reason")],
)
async def test_dropped_image_refused_by_a_proxy_is_reported(
    visit: Visit, status: int, message: str
):
    await visit.page.context.route(
        "**/png-info", lambda route: route.fulfill(status=status, body="no")
    )
    await visit.drop("cat.png", encode_image())
    await expect(visit.page.locator("#note")).to_contain_text(message)
    visit.errors.clear()


async def test_dropped_image_becomes_the_background(visit: Visit):
    page = visit.page
    await visit.render(prompt="x")
    assert not await page.is_visible("#photo-choice")
    await page.set_input_files(
        "#open-photo",
        files=[{"name": "wall.png", "mimeType": "image/png", "buffer": encode_image()}],
    )
    await expect(page.locator("#note")).to_have_text("wall.png is the background.")
    assert await visit.corner() == (200, 30, 90)
    await page.check("[name=backdrop][value=white]")
    await page.check("[name=backdrop][value=photo]")
    assert await visit.corner() == (200, 30, 90)
    await visit.drop("plain.png", encode_image(color=(1, 2, 3)), use="photo")
    await expect(page.locator("#note")).to_have_text("plain.png is the background.")
    assert await visit.corner() == (1, 2, 3)
    visit.requests.clear()
    await visit.drop("large.jpg", encode_image("JPEG"), "image/jpeg", more=13_000_000)
    await expect(page.locator(".choice[value=settings]")).to_be_hidden()
    await visit.drop("large.png", encode_image(), more=13_000_000)
    await expect(page.locator(".choice[value=settings]")).to_contain_text(
        "Settings are read from PNG, WebP and AVIF files up to 11 MB."
    )
    await visit.drop("broken.png", b"no image")
    await expect(page.locator("#note")).to_contain_text("broken.png is not an image")
    assert not [url for url in visit.requests if "png-info" in url]


async def test_opened_image_without_settings_is_reported(visit: Visit):
    await visit.page.set_input_files(
        "#open-file",
        files=[{"name": "wall.png", "mimeType": "image/png", "buffer": encode_image()}],
    )
    await expect(visit.page.locator("#note")).to_contain_text("No settings were found in wall.png.")
    assert await visit.page.get_attribute("#stage", "data-backdrop") == "checkerboard"


async def test_background_and_alpha_change_the_viewport(visit: Visit):
    page = visit.page
    await visit.render(prompt="x")
    for backdrop, color in (("white", (255, 255, 255)), ("black", (0, 0, 0))):
        await page.check(f"[name=backdrop][value={backdrop}]")
        assert await visit.corner() == color
    await page.fill("#backdrop-color", "#102030")
    assert await visit.corner() == (0x10, 0x20, 0x30)
    await page.check("#alpha")
    screenshot = await visit.viewport()
    assert tuple(screenshot[screenshot.shape[0] // 2, screenshot.shape[1] // 2]) == (255, 255, 255)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
async def test_zoom_stays_in_its_frame(browser: Browser, service: httpx.Client, size: ViewportSize):
    context = await browser.new_context(viewport=size)
    visit = await open_visit(context, str(service.base_url))
    page = visit.page
    await page.evaluate(
        "document.querySelectorAll('details').forEach((details) => (details.open = true))"
    )
    await visit.render(prompt="x", width="256", height="256")
    level, width = page.locator("#zoom-level"), "document.getElementById('image').clientWidth"
    fitted = {"desktop": 200, "phone": 142}["desktop" if size is DESKTOP else "phone"]
    await expect(level).to_have_text(f"{fitted} %")  # no more than twice as large by itself
    for zoom in ("400 %", "800 %", "800 %") if size is DESKTOP else ("200 %", "400 %", "800 %"):
        await page.click("#zoom-in")
        await expect(level).to_have_text(zoom)
        assert await visit.fits()
    assert await page.evaluate(width) == 2048
    frame = "document.getElementById('viewport')"
    # the middle stays in the middle
    assert await page.evaluate(f"Math.abs({frame}.scrollLeft + {frame}.clientWidth / 2 - 1024) < 4")
    before = await page.evaluate(f"{frame}.scrollLeft")
    await page.locator("#viewport").scroll_into_view_if_needed()
    box = await page.locator("#viewport").bounding_box()
    assert box
    await page.mouse.move(box["x"] + 150, box["y"] + 150)
    await page.mouse.down()
    await page.mouse.move(box["x"] + 110, box["y"] + 140)
    await page.mouse.up()
    assert await page.evaluate(f"{frame}.scrollLeft") == before + 40
    await page.focus("#viewport")
    await page.keyboard.press("-")
    await expect(level).to_have_text("400 %")
    await page.keyboard.press("0")
    await expect(level).to_have_text(f"{fitted} %")
    await page.keyboard.down("Control")
    await page.mouse.wheel(0, -100)
    await page.keyboard.up("Control")
    await expect(level).not_to_have_text(f"{fitted} %")
    assert await visit.fits()
    await context.close()


async def test_downloads_are_png_and_trimmed_webp(visit: Visit):
    page = visit.page
    await visit.render(prompt="x")
    png = await visit.download("#save-png")
    assert codecs.decode(png)[0].shape == (64, 64, 4)
    await page.check("#trimmed")
    await page.fill("#padding", "2")
    webp = await visit.download("#save-webp")
    rgba, parameters = codecs.decode(webp)
    assert webp[8:12] == b"WEBP"
    assert np.array_equal(rgba, postprocess.trim(codecs.decode(png)[0], 0, 2))
    assert rgba.shape[0] < 64
    assert "Seed: 12345" in (parameters or "")


@pytest.mark.parametrize("language", ["curl", "python", "javascript"])
async def test_shown_code_saves_the_image(visit: Visit, language: str, tmp_path: Path):
    page = visit.page
    prompt = 'it\'s a "cup" – über $HOME'
    await visit.fill(prompt=prompt, steps="2")
    await page.click("#open-code")
    await page.check(f"[name=language][value={language}]")
    code = str(await page.text_content("#snippet"))
    command = {"curl": ["bash", "-c", code], "python": [sys.executable, "-c", code]}.get(
        language, ["node", "--input-type=module", "-e", code]
    )
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}")
    result = await asyncio.to_thread(
        subprocess.run, command, cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    (saved,) = tmp_path.iterdir()
    assert saved.suffix == ".png"
    assert prompt in (codecs.decode(saved.read_bytes())[1] or "")


async def test_signed_images_open_again_after_a_reload(browser: Browser, tmp_path: Path):
    secret = {"sign_file_urls": "a secret of 16 characters"}
    with served(put_model(tmp_path), default_model="alphalayer-mini", **secret) as client:
        context = await browser.new_context(viewport=DESKTOP, accept_downloads=True)
        visit = await open_visit(context, str(client.base_url))
        page = visit.page
        await visit.render(prompt="a red apple")
        await page.wait_for_function("() => document.getElementById('image').naturalWidth === 64")
        assert visit.errors == []
        await page.reload()
        await page.wait_for_function(
            "() => document.querySelector('#history img')?.naturalWidth === 64"
        )
        await page.click("#history button")
        await page.wait_for_function("() => document.getElementById('image').naturalWidth === 64")
        assert (await visit.download("#save-webp"))[8:12] == b"WEBP"
        await context.close()
