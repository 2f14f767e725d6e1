"""Input images as conditions, against recorded numbers of OpenCV and of the original.

The table holds the value at (height // 2, width // 3) and the mean of all values by channel, for a
48x32 test image that is fitted to a square. They were computed with OpenCV's INTER_AREA and
INTER_LANCZOS4.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alphalayer.core.request import RESIZE_MODES
from alphalayer.engine.transparency.conditions import condition_image
from alphalayer.images.resampling import border_colour, fit_condition, flatten_on_grey

FITTED = {
    ("Just Resize", 64): ((0.244950, 0.246832, 0.245891), (0.389375, 0.283705, 0.336541)),
    ("Just Resize", 16): ((0.250980, 0.258824, 0.254902), (0.389379, 0.283710, 0.336544)),
    ("Crop and Resize", 64): ((0.286501, 0.246832, 0.266667), (0.371700, 0.249139, 0.310421)),
    ("Crop and Resize", 16): ((0.290196, 0.258824, 0.274510), (0.371687, 0.249118, 0.310402)),
    ("Resize and Fill", 64): ((0.244950, 0.255038, 0.249994), (0.407975, 0.332926, 0.365175)),
    ("Resize and Fill", 16): ((0.250980, 0.288726, 0.269853), (0.407097, 0.330580, 0.363806)),
}
# six digits are recorded, and the mean of 4,096 float32 values is off by a few units of the last
TOLERANCE = 3e-6


def image_of(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    alpha = np.clip((3136 - (2 * x - width + 1) ** 2 - (2 * y - height + 1) ** 2) // 8, 0, 255)
    channels = [4 * x % 256, 4 * y % 256, 2 * (x + y) % 256, alpha]
    return np.stack(channels, axis=-1).astype(np.uint8)


def test_on_grey_flattens_alpha_onto_half():
    flat = flatten_on_grey(image_of(48, 32))
    assert flat[16, 24] == pytest.approx((0.376471, 0.250980, 0.313726), abs=1e-6)
    assert flatten_on_grey(np.zeros((2, 2, 4), np.uint8)) == pytest.approx(0.5, abs=0)


@pytest.mark.parametrize(("mode", "side"), FITTED, ids=str)
def test_fit_equals_recorded_values(mode, side):
    fitted = fit_condition(flatten_on_grey(image_of(48, 32)), (side, side), mode)
    value, mean = FITTED[mode, side]
    assert fitted.shape == (side, side, 3)
    assert fitted[side // 2, side // 3] == pytest.approx(value, abs=TOLERANCE)
    assert fitted.mean((0, 1)) == pytest.approx(mean, abs=TOLERANCE)


def test_fit_keeps_the_overshoot_of_lanczos():
    fitted = fit_condition(flatten_on_grey(image_of(48, 32)), (64, 64), "Just Resize")
    assert fitted.min() == pytest.approx(-0.0019308, abs=1e-6)


def test_border_colour_is_the_median_of_the_border():
    colour = border_colour(flatten_on_grey(image_of(48, 32)))
    assert colour == pytest.approx((0.446078, 0.433691, 0.423779), abs=1e-6)


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("size", [(64, 192), (200, 40), (48, 32)], ids=str)
@pytest.mark.parametrize("own", [(48, 32), (1, 4000), (4000, 1), (1, 1)], ids=str)
def test_condition_image_has_the_requested_size(mode, size, own):
    image = condition_image(image_of(*own), size, mode)
    assert image.shape == (1, 3, size[1], size[0])
    assert image.dtype == torch.float32


def test_widened_convolution_is_a_sum_of_two():
    """Compare with values recorded for weights 1 and 0.5.

    conv(cat(x, c), W) = conv(x, W of x) + conv(c, W of c).
    """
    state = np.random.RandomState(21)
    shapes = ((16, 4, 3, 3), (16, 8, 3, 3), (16,), (16,), (2, 4, 9, 7), (1, 4, 9, 7))
    own, change, bias, shift, x, condition = (
        torch.from_numpy(state.standard_normal(shape)).float() for shape in shapes
    )
    change, shift = change * 0.1, shift * 0.1
    for weight, first, total in (
        (1.0, (0.427409, -6.739087, -3.316536, -0.253257), -45.66349),
        (0.5, (0.454269, -7.090830, -4.260019, -0.130153), -8.40898),
    ):
        merged = own + weight * change[:, :4]
        output = torch.nn.functional.conv2d(x, merged, bias + weight * shift, padding=1)
        output = output + torch.nn.functional.conv2d(condition, weight * change[:, 4:], padding=1)
        assert output.flatten()[:4].tolist() == pytest.approx(first, abs=2e-5)
        assert float(output.sum()) == pytest.approx(total, abs=2e-3)
