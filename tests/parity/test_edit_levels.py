"""Numbers of AUTOMATIC1111 and OpenCV for img2img: steps by strength, masks and regions."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from alphalayer.core.cost import count_steps, image_cost, last_steps
from alphalayer.core.request import GenerationRequest, ImageInput, ModelDefaults
from alphalayer.engine.sampling.levels import ddim_timesteps
from alphalayer.engine.sampling.partial import Levels
from alphalayer.engine.sampling.samplers import SAMPLERS
from alphalayer.engine.sampling.samplers import count_steps as count_levels
from alphalayer.engine.sampling.schedules import SigmaTable
from alphalayer.images.inpainting import grow, shrink_mask, soften

TABLE = SigmaTable.from_betas()
STRENGTHS = {
    1.0: (20, 14.61464),
    0.9: (19, 11.72536),
    0.75: (16, 5.78941),
    0.7: (15, 4.49984),
    0.5: (11, 1.48321),
    0.4: (9, 0.79095),
    0.3: (7, 0.39639),
    0.2: (5, 0.18417),
    0.05: (2, 0.04848),
    0.0: (1, 0.02917),
}
"""Calls and first level of 20 steps of Karras."""
EXACT = {0.75: (26, 5.03310), 0.5: (40, 1.18174), 0.3: (66, 0.33648)}
"""Steps of the whole schedule and first level of exactly 20 steps."""


def levels_of(sampler: str = "DPM++ 2M", steps: int = 20, **fields) -> tuple[Levels, int]:
    """Return the levels of an edit, and the steps that its cost counts."""
    image = ImageInput(role="init", file_name=f"input_{'0' * 64}.png")
    request = GenerationRequest(
        prompt="x", sampler=sampler, scheduler="Karras", steps=steps, inputs=(image,), **fields
    )
    last = last_steps(request.resolve(ModelDefaults()))
    assert last is not None
    levels = SAMPLERS[sampler].choose_levels("Karras", last.taken, TABLE, last.total)
    return levels, count_steps(sampler, "Karras", last.taken, last.total)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_strength_selects_the_calls_of_a1111(strength: float):
    (sigmas, start, span), counted = levels_of(strength=strength)
    calls, first = STRENGTHS[strength]
    assert count_levels(sigmas) == counted == calls
    assert start == float(sigmas[0]) == pytest.approx(first, abs=1e-5)
    assert len(span) == 21


@pytest.mark.parametrize("strength", EXACT)
def test_exact_steps_are_the_end_of_a_longer_schedule(strength: float):
    (sigmas, start, span), counted = levels_of(strength=strength, exact_steps=True)
    total, first = EXACT[strength]
    assert count_levels(sigmas) == counted == 20
    assert len(span) == total + 1
    assert start == pytest.approx(first, abs=1e-5)


def test_strength_is_a_plain_product():
    """0.29 * 100 is a little below 29."""
    assert levels_of(steps=100, strength=0.29)[1] == 29


@pytest.mark.parametrize(("sampler", "calls"), [("DDIM", 5), ("PLMS", 5), ("UniPC", 6)])
def test_timestep_samplers_begin_below_the_level_of_the_noise(sampler: str, calls: int):
    (sigmas, start, _), counted = levels_of(sampler, steps=8, strength=0.75)
    assert count_levels(sigmas) == counted == calls
    timesteps = ddim_timesteps(8, TABLE)
    assert int(timesteps[6]) == 751
    assert start == pytest.approx(float(TABLE.sigmas[751]))
    assert float(sigmas[0]) == pytest.approx(float(TABLE.sigmas[626]), rel=1e-5)


def box_mask() -> Image.Image:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:44, 16:40] = 255
    return Image.fromarray(mask)


def test_soft_mask_equals_opencv():
    row = np.asarray(soften(box_mask(), 4))[32, 8:25]
    expected = [7, 12, 21, 32, 48, 67, 90, 115, 140, 165, 188, 207, 223, 234, 243, 248, 252]
    assert row.tolist() == expected


def test_mask_of_cells_is_shrunk_by_pillow_and_rounded():
    cells = shrink_mask(np.asarray(soften(box_mask(), 4)), (8, 8))
    rows = ["".join(str(int(cell)) for cell in row) for row in cells[2:6]]
    assert rows == ["00010000", "00111000", "00111000", "00010000"]


@pytest.mark.parametrize(
    ("box", "size", "limit", "expected"),
    [
        ((10, 10, 138, 42), (512, 512), (1024, 1024), (10, 0, 138, 128)),
        ((900, 900, 1000, 1020), (1024, 1024), (1024, 1024), (890, 900, 1010, 1020)),
        ((0, 0, 200, 1000), (1024, 1024), (1024, 1024), (0, 0, 1000, 1000)),
        ((100, 100, 500, 200), (1024, 512), (768, 640), (100, 50, 500, 250)),
        ((0, 0, 100, 640), (1024, 512), (768, 640), (0, 0, 768, 640)),
    ],
)
def test_region_grows_to_the_ratio_of_the_size(box, size, limit, expected):
    assert grow(box, size, limit) == expected


def test_cost_of_an_edit_grows_with_its_strength():
    image = ImageInput(role="init", file_name=f"input_{'0' * 64}.png")
    request = GenerationRequest(prompt="x", width=1024, height=1024, steps=20)
    plain = image_cost(request).total
    costs = [
        image_cost(request.model_copy(update={"inputs": (image,), "strength": strength})).total
        for strength in (0.2, 0.75, 1.0)
    ]
    saved = [15, 4, 0]  # of 20 steps
    assert costs == pytest.approx([plain - steps for steps in saved])
