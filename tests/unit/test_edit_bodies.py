"""Jobs of `/v1/images/edits`: what is changed, how much, and at which size."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alphalayer.api.openai.edits import EditsRequest
from alphalayer.api.pixel_pool import PixelPool
from alphalayer.api.uploads import store_uploads
from alphalayer.core.inputs import size_for_image
from alphalayer.core.job import JobSpec
from alphalayer.images import codecs
from alphalayer.storage import read
from alphalayer.storage.objects import open_storage


def png(width: int, height: int, alpha: int) -> bytes:
    """Return an image whose left half has the given alpha."""
    rgba = np.full((height, width, 4), 255, np.uint8)
    rgba[:, : width // 2, 3] = alpha
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    return buffer.getvalue()


UPLOADS = {
    "opaque": png(96, 64, 255),
    "cut-out": png(96, 64, 128),
    "large": png(4096, 1024, 0),
    "mask": png(96, 64, 0),
}


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Any]:
    pixels = PixelPool(250_000_000)
    yield SimpleNamespace(
        storage=open_storage(str(tmp_path)),
        pixels=pixels,
        prompt_comments=True,
        noise="nv",
        decode="official",
        url_signer=None,
    )
    pixels.close()


async def spec_of(service: Any, image: str, **fields: Any) -> JobSpec:
    body = {"prompt": "an apple", "images": [{"file_id": image}], **fields}
    edit = EditsRequest.model_validate(body)
    return edit.to_spec(service, None, await store_uploads(service, edit.uploads(UPLOADS)))


@pytest.mark.parametrize(
    ("image", "background", "kind", "mode", "colour"),
    [
        ("cut-out", "auto", "png", "attention", None),
        ("cut-out", "transparent", "png", "attention", None),
        ("cut-out", "opaque", "png", "attention", "#ffffff"),
        ("cut-out", "auto", "jpeg", "attention", "#ffffff"),
        ("opaque", "auto", "png", "opaque", None),
        ("opaque", "opaque", "webp", "opaque", "#ffffff"),
    ],
)
async def test_edit_of_an_opaque_image_stays_opaque(
    service: Any, image: str, background: str, kind: str, mode: str, colour: str | None
):
    spec = await spec_of(service, image, background=background, output_format=kind)
    assert (spec.generation.mode, spec.output.background) == (mode, colour)
    assert spec.generation.uses_init


async def test_edit_fidelity_sets_the_strength(service: Any):
    for fidelity, strength in ((None, 0.75), ("low", 0.75), ("high", 0.5)):
        spec = await spec_of(service, "cut-out", input_fidelity=fidelity)
        assert spec.generation.strength == strength


async def test_edit_size_is_that_of_the_image(service: Any):
    assert (await spec_of(service, "cut-out")).generation.size == (96, 64)
    assert (await spec_of(service, "large")).generation.size == (2048, 512)
    assert (await spec_of(service, "large", size="640x128")).generation.size == (640, 128)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((64, 64), (64, 64)),
        ((2048, 2048), (2048, 2048)),
        ((301, 203), (304, 200)),
        ((16, 24), (64, 96)),
        ((4000, 3000), (2048, 1536)),
        ((16384, 16), (2048, 64)),
        ((1, 2048), (64, 2048)),
        ((1, 1), (64, 64)),
    ],
)
def test_size_for_image_keeps_the_shape(size: tuple[int, int], fitted: tuple[int, int]):
    assert size_for_image(size) == fitted
    assert size_for_image((size[1], size[0])) == (fitted[1], fitted[0])


async def test_edit_mask_changes_what_is_transparent(service: Any):
    spec = await spec_of(service, "opaque", mask={"file_id": "mask"})
    (name,) = (image.file_name for image in spec.generation.inputs if image.role == "mask")
    mask, _ = codecs.decode(await read(service.storage, name))
    assert mask[:, :48, :3].min() == 255
    assert mask[:, 48:, :3].max() == 0


async def test_edit_with_further_images_warns(service: Any):
    images = [{"file_id": "cut-out"}, {"file_id": "opaque"}]
    spec = await spec_of(service, "cut-out", images=images)
    assert spec.generation.warnings == ("image: ignored 1. Only the first is changed.",)
    assert len(spec.generation.inputs) == 1
