"""Requests of `img2img` as jobs, with images in a folder."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alphalayer.api.a1111.img2img import Img2ImgRequest
from alphalayer.api.a1111.schemas import Txt2ImgRequest
from alphalayer.api.a1111.settings import OverrideSettings
from alphalayer.api.pixel_pool import PixelPool
from alphalayer.api.uploads import store_uploads
from alphalayer.core.edits import EditFields
from alphalayer.core.request import GenerationRequest
from alphalayer.images import codecs, enlarging
from alphalayer.images.codecs import Rgba
from alphalayer.storage.objects import open_storage

CONV = "(SDXL) Only Generate Transparent Image (Conv Injection)"
CLEAR = np.array([[[200, 30, 30, 255], [200, 30, 30, 0]]], np.uint8)
SOLID = np.full((1, 2, 4), 255, np.uint8)
GREY = np.array([[[255, 255, 255, 255], [0, 0, 0, 255]]], np.uint8)
OFF = {"alwayson_scripts": {"LayerDiffuse": {"args": [False]}}}


def b64(rgba: Rgba) -> str:
    return base64.b64encode(codecs.encode(rgba)).decode()


class Requests:
    """Requests whose images are stored in a folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def generation(self, image: Rgba = CLEAR, stored: Any = None, **fields: Any):
        """Return the request of a body."""
        body = Img2ImgRequest.model_validate(
            {"prompt": "an apple", "init_images": [b64(image)], **fields}
        )
        service: Any = SimpleNamespace(
            noise="nv",
            decode="official",
            prompt_comments=True,
            pixels=PixelPool(10**9),
            storage=open_storage(str(self._folder)),
        )
        options = OverrideSettings(**(stored or {}))
        images = asyncio.run(store_uploads(service, body.uploads(options)))
        service.pixels.close()
        return body.to_spec(service, options, images).generation

    def image(self, request: GenerationRequest, role: str) -> Rgba:
        """Return a stored image of a request."""
        (name,) = (image.file_name for image in request.inputs if image.role == role)
        return codecs.decode((self._folder / name).read_bytes())[0]


@pytest.fixture
def requests(tmp_path: Path) -> Requests:
    return Requests(tmp_path)


def test_defaults_are_those_of_automatic1111(requests: Requests):
    request = requests.generation()
    assert (request.steps, request.cfg_scale, request.size) == (50, 7, (512, 512))
    assert (request.sampler, request.seed) == ("Euler", -1)
    assert (request.strength, request.init_resize_mode) == (0.75, "Just Resize")
    assert (request.exact_steps, request.roles) == (False, {"init"})
    without_mask = EditFields(init_resize_mode="Just Resize").model_dump()
    assert without_mask.items() <= request.model_dump().items()
    masked = requests.generation(mask=b64(GREY))
    assert (masked.mask_fill, masked.masked_only, masked.mask_padding) == ("fill", True, 0)
    assert (masked.mask_blur, masked.roles) == (4, {"init", "mask"})


@pytest.mark.parametrize(
    ("image", "fields", "mode"),
    [
        (CLEAR, {}, "attention"),
        (SOLID, {}, "opaque"),
        (CLEAR, {"layerdiffuse_enabled": False}, "opaque"),
        (CLEAR, OFF, "opaque"),
        (SOLID, OFF, "opaque"),
        (CLEAR, {"alwayson_scripts": {"LayerDiffuse": {"args": [True, CONV]}}}, "conv"),
        (CLEAR, {"layerdiffuse_enabled": True}, "attention"),
    ],
)
def test_mode_is_by_the_transparency_of_the_image_or_the_script(
    requests: Requests, image: Rgba, fields: dict[str, Any], mode: str
):
    assert requests.generation(image, **fields).mode == mode


def test_image_is_flattened_only_without_layerdiffuse(requests: Requests):
    for background, options in (
        ((255, 255, 255), {}),
        ((0, 0, 255), {"stored": {"img2img_background_color": "#0000ff"}}),
        ((0, 255, 0), {"override_settings": {"img2img_background_color": "#00ff00"}}),
    ):
        flat = requests.image(requests.generation(**OFF, **options), "init")
        assert flat[0].tolist() == [[200, 30, 30, 255], [*background, 255]]
        kept = requests.image(requests.generation(**options), "init")
        np.testing.assert_array_equal(kept, CLEAR)


def test_mask_is_stored_inverted_if_requested(requests: Requests):
    for invert, row in ((0, [255, 0]), (1, [0, 255])):
        request = requests.generation(mask=b64(GREY), inpainting_mask_invert=invert)
        assert requests.image(request, "mask")[0, :, 0].tolist() == row


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"resize_mode": 3}, {"init_resize_mode": "Latent"}),
        ({"resize_mode": "1"}, {"init_resize_mode": "Crop and Resize"}),
        ({"denoising_strength": 0}, {"strength": 0}),
        ({"override_settings": {"img2img_fix_steps": True}}, {"exact_steps": True}),
        ({"stored": {"img2img_fix_steps": True}}, {"exact_steps": True}),
        ({"mask": b64(GREY), "mask_blur": 0}, {"mask_blur": 0}),
        ({"mask": b64(GREY), "mask_blur_x": 9, "mask_blur_y": 9}, {"mask_blur": 9}),
        ({"mask": b64(GREY), "mask_blur": 5, "mask_blur_x": 9}, {"mask_blur": 5}),
        ({"mask": b64(GREY), "inpainting_fill": 3}, {"mask_fill": "latent nothing"}),
        (
            {"mask": b64(GREY), "inpaint_full_res_padding": 16},
            {"masked_only": True, "mask_padding": 16},
        ),
        ({"mask": b64(GREY), "inpaint_full_res": 0}, {"masked_only": False}),
    ],
)
def test_fields_become_those_of_the_request(
    requests: Requests, fields: dict[str, Any], expected: dict[str, Any]
):
    assert expected.items() <= requests.generation(**fields).model_dump().items()


def test_fix_steps_has_no_effect_on_txt2img():
    service: Any = SimpleNamespace(noise="nv", decode="official", prompt_comments=True)
    stored = OverrideSettings(img2img_fix_steps=True)
    body = Txt2ImgRequest(prompt="an apple")
    assert body.to_spec(service, stored) == body.to_spec(service, OverrideSettings())


def test_enlarged_part_covers_the_size():
    assert enlarging.cover(100, 50, (10, 10)) == (25, 0, 75, 50)
    assert enlarging.cover(50, 100, (20, 10)) == (0, 37.5, 50, 62.5)


def test_invisible_pixels_do_not_change_enlarged_colours():
    image = np.zeros((40, 30, 4), np.uint8)
    image[10:30, 10:20] = (200, 100, 50, 255)
    image[10, 10, 3] = 1
    enlarged = enlarging.enlarge(image, (60, 80), (0, 0, 30, 40))
    difference = np.abs(enlarged[..., :3].astype(int) - (200, 100, 50))
    assert difference.max() <= 6  # the averages have 8 bits
    assert difference[enlarged[..., 3] > 0].max() <= 3
    assert enlarged[40, 30, 3] == 255
    assert enlarged[0, 0, 3] == 0
