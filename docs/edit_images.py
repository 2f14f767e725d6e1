"""Images of the guide "Layers and edits", made by the commands that it shows.

`python docs/edit_images.py` writes them to docs/guides/layers-and-edits/.
It runs the blocks of the guide that need the included model alone, from its first to its last.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

GUIDE = Path(__file__).parent / "guides" / "layers-and-edits.md"
TARGET = GUIDE.with_suffix("")
STRIPS = {
    "strength": ("apple", "pear-0.3", "pear-0.6", "pear-0.9"),
    "alpha": ("apple", "pear-0.9", "pear-keep", "pear-multiply"),
    "mask": ("cat", "mask", "robot"),
    "masked-only": ("cat", "corner", "heart", "heart-whole"),
}
"""Files of the guide's commands in each strip, without their suffix."""
SIDE, CELL = 192, 12
"""Pixels of an image in a strip, and of a square of the checkerboard."""
COMMAND = f"{sys.executable} -m alphalayer"


def run_guide(folder: Path) -> None:
    """Run the guide's programs and its commands `generate` in a folder."""
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", GUIDE.read_text("utf-8"), re.M | re.S)
    for language, code in blocks:
        if language == "python" and "ImageDraw" in code:
            subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
        elif "run.py generate" in code:
            command = code.replace("python3 run.py", COMMAND)
            subprocess.run(["bash", "-ec", command], cwd=folder, check=True)


def make_background(width: int) -> Image.Image:
    """Return a checkerboard over black."""
    board = Image.new("L", (width // CELL, SIDE // CELL))
    board.putdata(
        [204 if (x + y) % 2 else 255 for y in range(board.height) for x in range(board.width)]
    )
    background = Image.new("RGBA", (width, 2 * SIDE), "black")
    background.paste(board.resize((width, SIDE), Image.Resampling.NEAREST), (0, 0))
    return background


def make_strip(images: Sequence[Image.Image]) -> Image.Image:
    """Lay images beside each other on a checkerboard, and again on black."""
    strip = make_background(SIDE * len(images))
    for column, image in enumerate(images):
        resized = image.convert("RGBA").convert("RGBa").resize((SIDE, SIDE)).convert("RGBA")
        for row in range(2):
            strip.alpha_composite(resized, (column * SIDE, row * SIDE))
    return strip.convert("RGB")


def main() -> None:
    """Run the guide and write its strips."""
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run_guide(Path(folder))
        for name, files in STRIPS.items():
            images = [Image.open(Path(folder) / f"{file}.png") for file in files]
            make_strip(images).save(TARGET / f"{name}.webp", quality=85)


if __name__ == "__main__":
    main()
