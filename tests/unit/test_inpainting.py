"""Images to change and their masks: fitted, filled and composed."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from alphalayer.core.edits import INIT_RESIZE_MODES, EditFields
from alphalayer.core.request import ResizeMode
from alphalayer.images import inpainting
from alphalayer.images.inpainting import KeptImage, fill_masked, fit_edit, fit_init, masked_region
from alphalayer.images.resampling import fit_layer

RED, CLEAR_GREEN = (255, 0, 0, 255), (0, 255, 0, 0)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)


def box(width: int, height: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


@pytest.mark.parametrize("mode", INIT_RESIZE_MODES)
@pytest.mark.parametrize("size", [(64, 192), (200, 40), (48, 32)], ids=str)
@pytest.mark.parametrize("own", [(48, 32), (1, 400), (400, 1), (1, 1)], ids=str)
def test_fit_gives_the_size(mode, size, own):
    assert fit_init(Image.new("RGBA", own), size, mode).size == size


def test_fit_ignores_colours_of_invisible_pixels():
    image = Image.new("RGBA", (8, 8), CLEAR_GREEN)
    image.paste(RED, (0, 0, 4, 8))
    fitted = np.asarray(fit_init(image, (20, 20), "Just Resize"))
    assert fitted[fitted[..., 3] > 0][:, 1].max() == 0


def test_resize_and_fill_repeats_the_border():
    image = Image.fromarray(noise(10, 20))
    fitted = np.asarray(fit_init(image, (21, 20), "Resize and Fill"))
    assert np.array_equal(fitted[:, 5:15], np.asarray(image))
    assert np.array_equal(fitted[:, 0], np.asarray(image)[:, 0])
    assert np.array_equal(fitted[:, -1], np.asarray(image)[:, -1])


def test_cover_of_a_part_equals_the_part_of_a_cover(monkeypatch: pytest.MonkeyPatch):
    y, x = np.mgrid[:200, :30]
    image = Image.fromarray(np.dstack([8 * x, y, 255 - y]).astype(np.uint8))
    whole = np.asarray(fit_init(image, (64, 48), "Crop and Resize")).astype(int)
    monkeypatch.setattr(inpainting, "MAX_SCALED_PIXELS", 0)
    part = np.asarray(fit_init(image, (64, 48), "Crop and Resize"))
    assert np.abs(part - whole).max() <= 1


def test_fill_takes_colours_from_around_the_mask():
    image = Image.new("RGB", (64, 64), (0, 0, 255))
    image.paste((255, 0, 0), (20, 20, 44, 44))
    filled = np.asarray(fill_masked(image, Image.fromarray(box(64, 64, 20, 20, 44, 44))))
    assert (np.abs(filled - np.array([0, 0, 255], int)) <= 2).all()


def test_region_of_a_black_mask_is_the_whole_image():
    assert masked_region(Image.new("L", (48, 32)), 8, (64, 64)) == (0, 0, 48, 32)


@pytest.mark.parametrize("masked_only", [False, True])
def test_compose_keeps_bytes_outside_the_mask(masked_only: bool):
    init, size = noise(96, 80), (64, 64) if masked_only else (96, 80)
    mask = box(96, 80, 24, 16, 66, 58)
    fitted = fit_edit(init, mask, size, EditFields(masked_only=masked_only), is_opaque=False)
    result = fitted.kept.compose(noise(*size, seed=1), "new")
    assert result.shape == init.shape
    assert fitted.kept.mask is not None
    outside, inside = fitted.kept.mask == 0, fitted.kept.mask == 255
    assert outside.any()
    assert inside.any()
    assert np.array_equal(result[outside], init[outside])
    assert not np.array_equal(result[inside], init[inside])


@pytest.mark.parametrize("masked_only", [False, True])
def test_compose_with_a_black_mask_is_the_image(masked_only: bool):
    init = noise(64, 64)
    fields = EditFields(masked_only=masked_only)
    kept = fit_edit(init, np.zeros((64, 64), np.uint8), (64, 64), fields, is_opaque=False).kept
    assert np.array_equal(kept.compose(noise(64, 64, seed=1), "new"), init)


def test_compose_fades_colours_by_their_alpha():
    own, generated = (np.full((1, 1, 4), pixel, np.uint8) for pixel in (RED, CLEAR_GREEN))
    mixed = KeptImage(own, np.full((1, 1), 128, np.uint8)).compose(generated, "new")
    assert mixed[0, 0].tolist() == [255, 0, 0, 127]


def test_compose_takes_the_requested_alpha():
    own, generated = noise(4, 4), noise(4, 4, seed=1)
    results = [KeptImage(own).compose(generated, source) for source in ("new", "keep", "multiply")]
    assert np.array_equal(results[0], generated)
    assert np.array_equal(results[1][..., 3], own[..., 3])
    product = np.rint(generated[..., 3] * (own[..., 3] / 255))
    assert np.array_equal(results[2][..., 3], product)
    assert all(np.array_equal(result[..., :3], generated[..., :3]) for result in results)


def test_opaque_result_keeps_the_image_on_white():
    init = np.full((8, 8, 4), CLEAR_GREEN, np.uint8)
    fitted = fit_edit(init, np.zeros((8, 8), np.uint8), (8, 8), EditFields(), is_opaque=True)
    result = fitted.kept.compose(np.zeros((8, 8, 4), np.uint8), "new", is_opaque=True)
    assert (result == 255).all()
    assert (fitted.rgb == 255).all()


def test_mask_of_another_size_is_stretched_to_the_image():
    mask = box(32, 32, 0, 0, 16, 32)
    fitted = fit_edit(noise(64, 64), mask, (64, 64), EditFields(mask_blur=0), is_opaque=False)
    assert fitted.mask is not None
    assert fitted.mask[:, :24].min() == 255
    assert fitted.mask[:, 40:].max() == 0


def test_latent_resize_limits_the_encoded_image(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inpainting, "MAX_ENCODED_PIXELS", 64 * 64)
    fields = EditFields(init_resize_mode="Latent")
    fitted = fit_edit(noise(256, 64), None, (64, 64), fields, is_opaque=False)
    assert fitted.rgb.shape == (32, 128, 3)
    assert fitted.kept.rgba.shape == (64, 64, 4)


@pytest.mark.parametrize(("left", "top"), [(100, 50), (0, 0), (270, 150)])
def test_blur_reads_the_part_around_the_mask_alone(
    monkeypatch: pytest.MonkeyPatch, left: int, top: int
):
    sizes: list[int] = []
    blur = inpainting._blur_rows
    monkeypatch.setattr(
        inpainting, "_blur_rows", lambda part, kernel: sizes.append(part.size) or blur(part, kernel)
    )
    mask = Image.fromarray(box(300, 200, left, top, left + 20, top + 10))
    softened = np.asarray(inpainting.soften(mask, 8))
    assert max(sizes) <= 62 * 52
    # a corner pixel widens the part to the whole image, and changes its surroundings alone
    mask.putpixel((0, 199), 255)
    mask.putpixel((299, 0), 255)
    whole = np.asarray(inpainting.soften(mask, 8))
    assert max(sizes) == 300 * 200
    area = np.s_[max(top - 21, 0) : top + 31, max(left - 21, 0) : left + 41]
    changed = whole != softened
    assert softened[area].any()
    assert not changed[area].any()


@pytest.mark.parametrize("radius", [0, 4])
def test_thin_mask_generates_the_cells_that_it_touches(radius: int):
    thin = inpainting.soften(Image.fromarray(box(64, 64, 27, 8, 29, 24)), radius)
    cells = inpainting.shrink_mask(np.asarray(thin), (8, 8))
    assert cells[1:3, 3].all()
    assert cells[5:].sum() == cells[:, 5:].sum() == 0
    assert not inpainting.shrink_mask(np.zeros((64, 64), np.uint8), (8, 8)).any()


@pytest.mark.parametrize("mode", ["Just Resize", "Crop and Resize", "Resize and Fill"])
@pytest.mark.parametrize("size", [(2048, 122), (122, 2048)], ids=str)
def test_long_layer_is_fitted_with_little_work(
    monkeypatch: pytest.MonkeyPatch, mode: ResizeMode, size: tuple[int, int]
):
    counts: list[int] = []
    product = np.tensordot

    def count(matrix: np.ndarray, lines: np.ndarray, axes: int) -> np.ndarray:
        counts.append(len(matrix) * lines.size)
        return product(matrix, lines, axes)

    monkeypatch.setattr(np, "tensordot", count)
    layer = fit_layer(noise(*size), (256, 256), mode)
    assert layer.shape == (256, 256, 4)
    # a few dozen for each number of the larger image
    assert 0 < sum(counts) < 60 * noise(*size).size
