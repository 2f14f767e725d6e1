"""The embedded model: it generates what the prompt names, and its patch makes it transparent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from alphalayer import catalog
from alphalayer.core.request import GenerationRequest, ImageInput
from alphalayer.engine.base import RenderTask
from alphalayer.engine.pipeline import LocalEngine

FEW_STEPS = {"steps": 10, "sampler": "DPM++ 2M"}
"""About as good as the defaults, in half the time."""
SMALL = {**FEW_STEPS, "width": 128, "height": 128}
"""For comparisons of images whose content does not matter."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return LocalEngine(tmp_path_factory.mktemp("no-models"), device="cpu", dtype="fp32")


def render(engine: LocalEngine, prompt: str, **fields) -> np.ndarray:
    return engine.generate(GenerationRequest(prompt=prompt, **fields)).images[0].rgba


@pytest.fixture(scope="module")
def apple(engine):
    """Return an image with the default settings."""
    return render(engine, "a red apple, high quality")


@pytest.fixture(scope="module")
def small_apple(engine):
    return render(engine, "a red apple, high quality", **SMALL)


def test_embedded_model_is_the_default_without_models(tmp_path):
    entry = catalog.resolve_model(None, catalog.find_models(tmp_path))
    assert entry.name == "alphalayer-mini"
    files = [file for file in entry.path.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40_000_000
    assert {"README.md", "NOTICE"} <= {file.name for file in files}


def test_red_apple_is_red_on_transparent_background(apple):
    assert apple.shape == (256, 256, 4)
    alpha = apple[..., 3]
    assert alpha[[0, 0, -1, -1], [0, -1, 0, -1]].max() == 0
    assert alpha[96:160, 96:160].mean() > 200
    red, green, blue = apple[alpha > 200][:, :3].mean(0)
    assert red > 1.5 * green
    assert red > 1.5 * blue


def test_color_word_changes_the_color(engine, apple):
    def color(rgba):
        return rgba[rgba[..., 3] > 200][:, :3].mean(0)

    red, green, _ = color(render(engine, "a green apple", **FEW_STEPS))
    assert green > red
    assert color(render(engine, "a blue apple", **FEW_STEPS))[2] > 3 * color(apple)[2]


def test_other_seed_or_prompt_gives_another_image(engine, small_apple):
    def difference(prompt, **fields):
        return np.abs(small_apple.astype(float) - render(engine, prompt, **SMALL, **fields)).mean()

    assert difference("a red apple, high quality", seed=7) > 0.5
    assert difference("a penguin") > 10
    assert difference("a red apple, high quality") == 0


def test_embedded_model_without_patch_renders_opaque(engine, small_apple):
    opaque = render(engine, "a red apple, high quality", mode="opaque", **SMALL)
    assert opaque[..., 3].min() == 255
    # the patch with weight 0: the transparent decoder finds no transparency in the latent of an
    # opaque image
    unpatched = render(engine, "a red apple, high quality", layerdiffuse_weight=0.0, **SMALL)
    assert (unpatched[..., 3] > 128).mean() > (small_apple[..., 3] > 128).mean() + 0.1


def test_requested_size_is_rendered(engine):
    assert render(engine, "a star", width=200, height=120, steps=2).shape == (120, 200, 4)


def edit(engine: LocalEngine, inputs: dict[str, np.ndarray], **fields) -> np.ndarray:
    stored = tuple(ImageInput(role=role, file_name=f"input_{'0' * 64}.png") for role in inputs)
    task = RenderTask(GenerationRequest(inputs=stored, **fields, **FEW_STEPS), inputs=inputs)
    return engine.render([task])[0].images[0].rgba


def draw_tree() -> np.ndarray:
    """Return an unknown image: hard edges, half-transparent crown."""
    image = Image.new("RGBA", (1024, 1024))
    drawing = ImageDraw.Draw(image)
    drawing.rectangle((450, 520, 574, 920), (120, 72, 30, 255))
    drawing.ellipse((260, 120, 764, 624), (40, 150, 60, 150))
    return np.asarray(image.convert("RGBa").resize((256, 256)).convert("RGBA"))


def test_encoder_keeps_alpha_and_colors_of_unknown_image(engine):
    """Change an image by almost nothing. The mean error of alpha is below 4 %.

    Without the encoder's offset it would be above 30 %.
    """
    tree = draw_tree()
    changed = edit(engine, {"init": tree}, prompt="a tree", strength=0.01)
    difference = np.abs(changed.astype(float) - tree)
    assert difference[..., 3].mean() < 0.04 * 255
    trunk, crown = np.s_[150:220, 120:135], np.s_[60:120, 90:160]
    assert difference[trunk].mean((0, 1)).max() < 15
    assert difference[crown].mean((0, 1)).max() < 50
    assert changed[[0, 0, -1, -1], [0, -1, 0, -1], 3].max() == 0


def test_inpainting_changes_masked_part_only(engine, apple):
    mask = np.full_like(apple, 255)
    mask[96:, :, :3] = 0
    changed = edit(engine, {"init": apple, "mask": mask}, prompt="a lemon", mask_blur=0)
    assert np.array_equal(changed[96:], apple[96:])
    assert np.abs(changed[:96].astype(float) - apple[:96]).mean() > 3


def test_model_card_has_its_sections():
    text = (Path(catalog.EMBEDDED_MODEL) / "README.md").read_text(encoding="utf-8")
    for word in ("Licence", "concepts", "What it cannot", "Transparency"):
        assert word in text
