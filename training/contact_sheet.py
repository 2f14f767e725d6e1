"""Write contact sheets of the shipped model from fixed seeds, and the strip of the README.

Every prompt of sheet_prompts.txt is laid over a checkerboard and over black.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from training.alphalayer_imports import MODEL_FOLDER, GenerationRequest, LocalEngine
from training.data import FOLDER

DOCS = FOLDER.parent / "docs" / "embedded-model"
SEED = 12345
COLUMNS = 8
STRIP = (
    "a red apple",
    "a cute cat",
    "a slice of pizza",
    "a rose",
    "a rocket",
    "a crystal ball",
    "translucent soap bubbles",
    "a red heart",
)


def read_prompts() -> list[str]:
    """Return the 64 prompts of the sheets."""
    return (FOLDER / "sheet_prompts.txt").read_text(encoding="utf-8").split("\n")[:64]


def make_engine() -> LocalEngine:
    """Return an engine on the CPU in float32."""
    assert MODEL_FOLDER.is_dir(), "run `python -m training.export` first"
    return LocalEngine(Path("models"), device="cpu", dtype="fp32")


@lru_cache(1000)
def generate(engine: LocalEngine, prompt: str, seed: int = SEED) -> np.ndarray:
    """Generate one image with the model's defaults, (side, side, 4) uint8."""
    request = GenerationRequest(prompt=prompt, seed=seed, model="alphalayer-mini")
    return engine.generate(request).images[0].rgba


def make_checkerboard(side: int, cell: int = 16) -> np.ndarray:
    """Return squares of two greys, (side, side, 3)."""
    y, x = np.ogrid[:side, :side]
    return np.where((x // cell + y // cell)[..., None] % 2, 204.0, 255.0) * np.ones(3)


def composite(rgba: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Lay an image on a background, uint8."""
    alpha = rgba[..., 3:] / 255
    return np.rint(rgba[..., :3] * alpha + background * (1 - alpha)).astype(np.uint8)


def make_sheet(rgba: list[np.ndarray], background: np.ndarray) -> Image.Image:
    """Lay images on a background, in rows of eight."""
    laid = [composite(image, background) for image in rgba]
    rows = [np.concatenate(laid[i : i + COLUMNS], 1) for i in range(0, len(laid), COLUMNS)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    """Generate the images, write the sheets, print how many have four empty corners."""
    engine = make_engine()
    DOCS.mkdir(parents=True, exist_ok=True)
    generated = {prompt: generate(engine, prompt) for prompt in read_prompts()}
    side = next(iter(generated.values())).shape[0]
    backgrounds = {
        "checkerboard": make_checkerboard(side),
        "black": np.zeros((side, side, 3)),
    }
    for name, background in backgrounds.items():
        sheet = make_sheet(list(generated.values()), background)
        rows = -(-len(generated) // COLUMNS)
        sheet.resize((COLUMNS * 160, rows * 160)).save(DOCS / f"{name}.webp", quality=85)
    strip = make_sheet([generated[prompt] for prompt in STRIP], backgrounds["checkerboard"])
    strip.resize((COLUMNS * 128, 128)).save(DOCS / "strip.png")
    corners = [image[[0, 0, -1, -1], [0, -1, 0, -1], 3].max() for image in generated.values()]
    soft = [((image[..., 3] > 8) & (image[..., 3] < 247)).mean() for image in generated.values()]
    empty = sum(corner == 0 for corner in corners)
    print(f"corners empty in {empty} of {len(corners)}; half-transparent {np.mean(soft):.3f}")


if __name__ == "__main__":
    main()
