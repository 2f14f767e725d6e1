"""Put drawings of one set together into compounds such as "cat with a crown"."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from training.data import Concept, read_lines


@dataclass(frozen=True)
class Part:
    """Drawing in a compound. Centre and side are shares of the image."""

    label: str
    x: float
    y: float
    side: float


@lru_cache
def read_compounds() -> dict[Concept, tuple[Part, ...]]:
    """Return the parts of each compound of compounds.tsv, from back to front."""
    compounds: dict[Concept, tuple[Part, ...]] = {}
    for line in read_lines("compounds.tsv"):
        words, _, places = line.partition("\t")
        name, *synonyms = [word.strip() for word in words.split(";")]
        parts: list[Part] = []
        label: list[str] = []
        for token in places.split(" "):
            # Labels have spaces. A place ends the label before it.
            text, at, place = token.partition("@")
            label.append(text)
            if at:
                x, y, side = (float(number) for number in place.split(","))
                parts.append(Part(" ".join(label), x, y, side))
                label = []
        compounds[Concept(f"compound {name}", name, tuple(synonyms))] = tuple(parts)
    return compounds


def compose(parts: tuple[Part, ...], drawings: dict[str, np.ndarray]) -> np.ndarray | None:
    """Lay the parts of a compound over each other.

    Args:
        parts: Parts from back to front.
        drawings: Straight RGBA by label, (side, side, 4) uint8.

    Returns:
        Straight RGBA of the same size, or None if a part has no drawing.
    """
    if any(part.label not in drawings for part in parts):
        return None
    side = len(next(iter(drawings.values())))
    canvas = Image.new("RGBA", (side, side))
    for part in parts:
        drawing = Image.fromarray(drawings[part.label])
        drawing = drawing.crop(drawing.getbbox() or (0, 0, side, side))
        scale = part.side * side / max(drawing.size)
        size = tuple(max(1, round(length * scale)) for length in drawing.size)
        layer = Image.new("RGBA", (side, side))
        corner = (round(part.x * side - size[0] / 2), round(part.y * side - size[1] / 2))
        layer.paste(drawing.resize(size, Image.Resampling.LANCZOS), corner)
        canvas = Image.alpha_composite(canvas, layer)
    return np.asarray(canvas)
