"""Full-size files of attention sharing load with a full-size SD 1.5 and generate their layers.

The files have random numbers: 4 GB, float16. Not part of the default run:
`python3 run.py test -m full_size -s` needs 16 GiB of memory and some minutes.
"""

from __future__ import annotations

import math
import resource
import time

import numpy as np
import pytest

from alphalayer.core.modes import MODES
from alphalayer.core.request import GenerationRequest, ImageInput
from alphalayer.engine.base import RenderTask
from alphalayer.engine.pipeline import LocalEngine
from tests.full_size.full_size_models import sd15_shapes, sharing_shapes, write_sd15_models

pytestmark = pytest.mark.full_size

COUNTS = {
    "sd15_attention": (640, 175_098_496),
    "sd15_fg2bg": (1180, 281_425_568),
    "sd15_bg2fg": (1180, 281_425_568),
    "sd15_joint": (1152, 277_138_048),
}
"""Tensors and numbers of the published files."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    models = tmp_path_factory.mktemp("models")
    write_sd15_models(models)
    return LocalEngine(models, device="cpu")


def test_full_size_shapes_are_those_of_published_files():
    unet = {name: shape for name, shape in sd15_shapes().items() if ".diffusion_model." in name}
    assert (len(unet), sum(map(math.prod, unet.values()))) == (686, 859_520_964)
    for mode, counts in COUNTS.items():
        shapes = sharing_shapes(mode)
        assert (len(shapes), sum(map(math.prod, shapes.values()))) == counts


@pytest.mark.parametrize("mode", COUNTS)
def test_full_size_file_loads_and_renders(engine: LocalEngine, mode: str):
    info = MODES[mode]
    inputs = tuple(ImageInput(role=role, file_name=f"input_{0:064x}.png") for role in info.needs)
    request = GenerationRequest(
        prompt="an apple",
        mode=mode,
        inputs=inputs,
        batch_size=len(info.layers),
        steps=2,
        width=64,
        height=64,
    )
    start = time.perf_counter()
    image = np.full((64, 64, 4), 128, np.uint8)
    result = engine.render([RenderTask(request, inputs=dict.fromkeys(info.needs, image))])[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{mode}: {time.perf_counter() - start:.1f} s, {peak:.1f} GiB, {result.seconds}")
    assert [layer.role for layer in result.images] == list(info.layers)
    assert all(layer.rgba.shape == (64, 64, 4) for layer in result.images)
