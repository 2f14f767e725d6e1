"""Contact sheets of the shipped model from fixed seeds: every prompt of sheet_prompts.txt over a checkerboard and over black; the README's
strip."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from alphalayer import catalog
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.request import GenerationRequest

DOCS = Path(__file__).parents[1] / "docs" / "embedded-model"
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


def prompts() -> list[str]:
    """The 64 prompts of the sheets."""
    return (Path(__file__).parent / "sheet_prompts.txt").read_text(encoding="utf-8").split("\n")[:64]


@lru_cache(1000)
def draw(engine: LocalEngine, prompt: str, seed: int = SEED) -> np.ndarray:
    """One picture, (256, 256, 4) uint8."""
    return engine.generate(GenerationRequest(prompt=prompt, seed=seed, model="alphalayer-mini")).images[0].rgba


def checkerboard(side: int, cell: int = 16) -> np.ndarray:
    """Grey squares, (side, side, 3)."""
    y, x = np.ogrid[:side, :side]
    return np.where((x // cell + y // cell)[..., None] % 2, 204.0, 255.0) * np.ones(3)


def over(rgba: np.ndarray, background: np.ndarray) -> np.ndarray:
    """A picture laid on a background, uint8."""
    alpha = rgba[..., 3:] / 255
    return np.rint(rgba[..., :3] * alpha + background * (1 - alpha)).astype(np.uint8)


def sheet(pictures: list[np.ndarray], background: np.ndarray) -> Image.Image:
    """The pictures in rows of eight."""
    laid = [over(picture, background) for picture in pictures]
    rows = [np.concatenate(laid[i : i + COLUMNS], 1) for i in range(0, len(laid), COLUMNS)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    """Draw and write the sheets."""
    engine = LocalEngine(Path("models"), device="cpu", dtype="fp32")
    assert catalog.EMBEDDED_MODEL.is_dir()
    DOCS.mkdir(parents=True, exist_ok=True)
    drawn = {prompt: draw(engine, prompt) for prompt in prompts()}
    side = next(iter(drawn.values())).shape[0]
    backgrounds = {"checkerboard": checkerboard(side), "black": np.zeros((side, side, 3))}
    for name, background in backgrounds.items():
        sheet(list(drawn.values()), background).resize((COLUMNS * 160, COLUMNS * 160)).save(
            DOCS / f"{name}.webp", quality=85
        )
    sheet([drawn[prompt] for prompt in STRIP], backgrounds["checkerboard"]).resize((COLUMNS * 128, 128)).save(
        DOCS / "strip.png"
    )
    corners = [picture[[0, 0, -1, -1], [0, -1, 0, -1], 3].max() for picture in drawn.values()]
    soft = [float(((picture[..., 3] > 8) & (picture[..., 3] < 247)).mean()) for picture in drawn.values()]
    print(
        f"corners empty in {sum(corner == 0 for corner in corners)} of {len(corners)}; half-transparent pixels {np.mean(soft):.3f}"
    )


if __name__ == "__main__":
    main()
