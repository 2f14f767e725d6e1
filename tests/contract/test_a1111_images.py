"""Images in requests of the AUTOMATIC1111 dialect: img2img, inpaint and enlarging, over HTTP."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image
from tests.support.serving import put_model, served

from alphalayer.engine.fake import render_disc
from alphalayer.images import codecs
from alphalayer.images.infotext import read_parameters

FG2BLE = "(SDXL) From Foreground to Blending"
DISC = Image.fromarray(render_disc("a disc", 1, 48, 32))
OPAQUE = DISC.convert("RGB")
MASK = Image.new("L", (24, 16), 255)
SMALL = {"prompt": "an apple", "width": 64, "height": 64, "steps": 2, "seed": 7}


def b64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def bomb() -> str:
    """Return a small PNG of 400 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 6, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    file = base64.b64decode(b64(DISC))
    return base64.b64encode(file[:8] + chunk + file[33:]).decode()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(put_model(tmp_path_factory.mktemp("service"))) as client:
        yield client


@pytest.fixture(scope="module")
def api(client: httpx.Client) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{str(client.base_url).rstrip('/')}/sdapi/v1")


def img2img(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/sdapi/v1/img2img", json={**SMALL, "init_images": [b64(DISC)], **fields})


def test_webuiapi_img2img_of_an_opaque_image_is_opaque(api: webuiapi.WebUIApi):
    result = api.img2img(images=[OPAQUE], **SMALL)
    settings = read_parameters(result.info["infotexts"][0])
    assert (settings["Denoising strength"], settings["Size"]) == ("0.75", "64x64")
    assert "layerdiffusion_enabled" not in settings
    assert (result.info["denoising_strength"], len(result.images)) == (0.75, 1)
    assert result.parameters["init_images"] is result.parameters["mask"] is None
    assert result.parameters["inpaint_full_res"] is True


def test_webuiapi_img2img_of_a_transparent_image_is_transparent(api: webuiapi.WebUIApi):
    result = api.img2img(images=[DISC], denoising_strength=0.5, **SMALL)
    settings = read_parameters(result.info["infotexts"][0])
    assert (settings["Denoising strength"], settings["layerdiffusion_enabled"]) == ("0.5", "True")
    assert "Mask blur" not in settings


def test_webuiapi_inpaint_writes_the_mask_into_the_settings(api: webuiapi.WebUIApi):
    result = api.img2img(
        images=[DISC],
        mask_image=MASK,
        mask_blur=8,
        inpainting_fill=1,
        inpaint_full_res_padding=16,
        **SMALL,
    )
    shown = api.png_info(result.image)
    expected = {
        "Mask blur": "8",
        "Inpaint area": "Only masked",
        "Masked area padding": "16",
        "Masked content": "original",
    }
    assert expected.items() <= shown.parameters.items()
    assert result.info["extra_generation_params"]["Mask blur"] == 8


def test_script_images_and_the_image_to_change_are_independent(client: httpx.Client):
    args = [True, FG2BLE, 1, 1, b64(DISC)]
    answer = img2img(
        client,
        init_images=[f"data:image/png;base64,{b64(OPAQUE)}"],
        alwayson_scripts={"LayerDiffuse": {"args": args}},
    )
    assert answer.status_code == 200, answer.text
    settings = read_parameters(json.loads(answer.json()["info"])["infotexts"][0])
    assert settings["layerdiffusion_fg_image"] == "True"


def test_init_images_are_repeated_only_if_requested(client: httpx.Client):
    sent = {"init_images": [b64(DISC)], "mask": b64(MASK), "send_images": False}
    for include in (False, True):
        echoed = img2img(client, **sent, include_init_images=include).json()["parameters"]
        repeated = (sent["init_images"], sent["mask"]) if include else (None, None)
        assert (echoed["init_images"], echoed["mask"]) == repeated


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_images": None}, "init_images: it must be given"),
        ({"init_images": []}, "init_images: got 0 images; exactly 1"),
        ({"init_images": ["a"] * 17}, "init_images: got 17 images; exactly 1"),
        ({"init_images": "abc"}, 'init_images: got "abc"; a list'),
        ({"init_images": [5]}, "init_images.0: got 5; a text"),
        ({"init_images": ["?"]}, "init_images: not base64"),
        ({"init_images": ["aGk="]}, "init_images: not an image"),
        ({"init_images": [""]}, "init_images: it is empty"),
        ({"init_images": [bomb()]}, "init_images: the image is too large"),
        ({"init_images": ["https://example.com/a.png"]}, "init_images: URLs are not fetched"),
        ({"init_images": None, "mask": "aGk="}, "init_images: it must be given"),
        ({"mask": "aGk="}, "mask: not an image"),
        ({"mask": bomb()}, "mask: the image is too large"),
        ({"mask": 5}, "mask: got 5; a text"),
        ({"denoising_strength": -0.1}, "denoising_strength: got -0.1; at least 0"),
        ({"denoising_strength": 1.1}, "denoising_strength: got 1.1; at most 1"),
        ({"denoising_strength": "strong"}, "denoising_strength: "),
        ({"resize_mode": 4}, "resize_mode: got 4; at most 3"),
        ({"inpainting_fill": 4}, "inpainting_fill: got 4; at most 3"),
        ({"inpainting_mask_invert": 2}, "inpainting_mask_invert: got 2; at most 1"),
        ({"mask_blur": 65}, "mask_blur: got 65; at most 64"),
        ({"mask": b64(MASK), "mask_blur_x": 8}, "mask_blur_y: got 4, and mask_blur_x is 8"),
        ({"inpaint_full_res_padding": 257}, "inpaint_full_res_padding: got 257; at most 256"),
        ({"mask_round": False}, "mask_round: this is not implemented"),
        ({"latent_mask": b64(MASK)}, "latent_mask: this is not implemented"),
        ({"initial_noise_multiplier": 0.5}, "initial_noise_multiplier: this is not implemented"),
        (
            {"override_settings": {"img2img_color_correction": True}},
            "override_settings.img2img_color_correction: this is not implemented",
        ),
        (
            {"override_settings": {"img2img_background_color": "red"}},
            'override_settings.img2img_background_color: got "red"; a colour',
        ),
        (
            {"init_images": [b64(OPAQUE)], "layerdiffuse_enabled": True},
            "init_images: the image is opaque, and LayerDiffuse changes images with transparency. "
            "Remove its background first, or switch LayerDiffuse off.",
        ),
        (
            {
                "init_images": [b64(OPAQUE)],
                "alwayson_scripts": {"LayerDiffuse": {"args": [True]}},
            },
            "init_images: the image is opaque",
        ),
        (
            {"alwayson_scripts": {"LayerDiffuse": {"args": [True, FG2BLE, 1, 1, "?"]}}},
            "alwayson_scripts.LayerDiffuse.args.fg_image: not base64",
        ),
        (
            {"alwayson_scripts": {"LayerDiffuse": {"args": [True, FG2BLE]}}},
            f'alwayson_scripts.LayerDiffuse.args: mode "{FG2BLE}" takes one image',
        ),
        ({"alwayson_scripts": {"ADetailer": {"args": [True]}}}, "ADetailer"),
        ({"prompt": ""}, "prompt: "),
    ],
)
def test_img2img_wrong_value_is_named(client: httpx.Client, fields: dict[str, Any], words: str):
    answer = img2img(client, **fields)
    assert (answer.status_code, list(answer.json())) == (422, ["detail"])
    assert answer.json()["detail"].startswith(words) or words in ("ADetailer",), answer.text


def test_script_images_are_not_repeated(client: httpx.Client):
    args = [True, FG2BLE, 1, 1, b64(DISC)]
    sent = {"alwayson_scripts": {"LayerDiffuse": {"args": args}}, "send_images": False}
    for include, image in ((False, None), (True, b64(DISC))):
        echoed = img2img(client, **sent, include_init_images=include).json()["parameters"]
        assert echoed["alwayson_scripts"] == {"LayerDiffuse": {"args": [*args[:4], image]}}


def test_img2img_number_that_is_not_finite_is_refused(client: httpx.Client):
    body = json.dumps({**SMALL, "init_images": [b64(DISC)], "denoising_strength": float("nan")})
    answer = client.post(
        "/sdapi/v1/img2img", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("denoising_strength: ")


def test_img2img_fields_without_effect_are_ignored(client: httpx.Client):
    others = {
        "mask_blur_x": 8,
        "image_cfg_scale": 1.5,
        "initial_noise_multiplier": 1.0,
        "enable_hr": True,
        "latent_mask": "",
        "mask": "",
        "future_field": {},
    }
    assert img2img(client, **others).json()["images"] == img2img(client).json()["images"]


def test_webuiapi_extra_images_are_enlarged_with_their_alpha(api: webuiapi.WebUIApi):
    result = api.extra_single_image(DISC, upscaler_1="Lanczos", upscaling_resize=2)
    assert result.info == "Postprocess upscale by: 2, Postprocess upscaler: Lanczos"
    enlarged = np.asarray(result.image)
    assert enlarged.shape == (64, 96, 4)
    exact = render_disc("a disc", 1, 96, 64)
    assert np.abs(enlarged[..., 3].astype(int) - exact[..., 3]).mean() < 4
    visible = enlarged[..., 3] > 0
    assert (np.abs(enlarged.astype(int) - exact)[visible][:, :3] <= 1).all()
    first, second = api.extra_batch_images(
        [DISC, OPAQUE],
        resize_mode=1,
        upscaling_resize_w=64,
        upscaling_resize_h=96,
        upscaler_1="Nearest",
    ).images
    assert first.size == second.size == (64, 96)
    assert np.asarray(second)[..., 3].min() == 255


def test_extra_image_without_an_upscaler_is_unchanged(client: httpx.Client):
    text = codecs.encode(np.asarray(DISC), parameters="an apple")
    body = {"image": base64.b64encode(text).decode(), "resize_mode": 1}
    answer = client.post("/sdapi/v1/extra-single-image", json=body).json()
    rgba, parameters = codecs.decode(base64.b64decode(answer["image"]))
    np.testing.assert_array_equal(rgba, np.asarray(DISC))
    assert (parameters, answer["html_info"]) == ("an apple", "")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image": "?"}, "image: not base64"),
        ({"image": bomb()}, "image: the image is too large"),
        ({"image": None}, "image: it must be given"),
        ({"upscaler_1": "4x-Sharp"}, "upscaler_1: only None, Lanczos, Nearest enlarge images"),
        ({"upscaling_resize": 9}, "upscaling_resize: got 9; at most 8"),
        ({"resize_mode": 2}, "resize_mode: got 2; at most 1"),
        ({"gfpgan_visibility": 0.5}, "gfpgan_visibility: this is not implemented"),
        ({"codeformer_visibility": 1}, "codeformer_visibility: this is not implemented"),
        (
            {"extras_upscaler_2_visibility": 1, "upscaler_2": "Lanczos"},
            "extras_upscaler_2_visibility: this is not implemented",
        ),
        (
            {"resize_mode": 1, "upscaling_resize_w": 5000, "upscaling_resize_h": 4000},
            "upscaling_resize_w: the result would have 5000x4000 pixels; at most 16,000,000",
        ),
        (
            {"resize_mode": 1, "upscaling_crop": False, "upscaling_resize_h": 16384},
            "upscaling_resize_w: the result would have ",
        ),
    ],
)
def test_extra_image_wrong_value_is_named(client: httpx.Client, fields: dict[str, Any], words: str):
    body = {"image": b64(DISC), "upscaler_1": "Lanczos", **fields}
    answer = client.post("/sdapi/v1/extra-single-image", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(words), answer.text


def test_extra_image_is_not_stored(client: httpx.Client):
    outputs = client.app.state.service.storage  # type: ignore[attr-defined]
    before = outputs.list()
    body = {"image": b64(DISC), "upscaler_1": "Lanczos", "upscaling_resize": 3}
    assert client.post("/sdapi/v1/extra-single-image", json=body).status_code == 200
    assert outputs.list() == before


def test_extra_image_has_the_limit_of_uploads(client: httpx.Client):
    large = base64.b64encode(bytes(20_000_001)).decode()
    answer = client.post("/sdapi/v1/extra-single-image", json={"image": large})
    assert (answer.status_code, answer.json()["detail"][:41]) == (
        422,
        "image: the file has 20,000,001 bytes; at ",
    )


def test_broken_image_of_a_batch_is_named(client: httpx.Client):
    files = [{"data": b64(DISC), "name": "a"}, {"data": "aGk="}]
    answer = client.post("/sdapi/v1/extra-batch-images", json={"imageList": files})
    assert answer.json()["detail"].startswith("imageList.1.data: not an image")
    many = client.post("/sdapi/v1/extra-batch-images", json={"imageList": files[:1] * 33})
    assert many.json()["detail"].startswith("imageList: got 33 entries; at most 32")
