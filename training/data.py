"""The pictures: emoji sets of the npm registry, rendered to 256x256 RGBA, each with the concept it shows.

Sets for training are under MIT, Apache-2.0 or CC-BY-4.0 (see DATA.md); the share-alike sets are rendered for the independent
evaluation only. Everything lies below one cache folder.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CACHE = Path(os.environ.get("ALPHALAYER_TRAINING_CACHE", Path.home() / ".cache" / "alphalayer-training"))
SIDE = 256
MARGIN = 8
LABELS = "emojibase-data@17.0.0"
TRAINING_SETS = {
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
}
"""Two vendors, Microsoft and Google."""
EVALUATION_SETS = {
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "emojione-v1": "@iconify-json/emojione-v1@1.2.3",
    "emojitwo": "@iconify-json/emojione@1.2.3",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
"""Other vendors; what judges the model learns from these and has seen nothing of the two above."""
GROUPS = {0, 3, 4, 5, 6, 7}
"""Smileys, animals and nature, food, travel, activities, objects: no people, flags or symbols, but for the concepts named."""


@dataclass(frozen=True)
class Concept:
    """One thing to draw: its Unicode label, its usual name, and other words for it."""

    label: str
    name: str
    synonyms: tuple[str, ...]
    keywords: tuple[str, ...]


def read_concepts() -> list[Concept]:
    """The concepts of concepts.txt, with emojibase's keywords."""
    tags = {entry["label"]: tuple(entry.get("tags", ())) for entry in _labels()}
    concepts: list[Concept] = []
    for line in (Path(__file__).parent / "concepts.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            label, _, words = line.partition(" = ")
            name, *synonyms = [word.strip() for word in words.split(";")]
            concepts.append(Concept(label.strip(), name, tuple(synonyms), tags.get(label.strip(), ())))
    return concepts


def package(spec: str) -> Path:
    """The folder of an npm package, fetched once."""
    name, _, version = spec.rpartition("@")
    folder = CACHE / "packages" / f"{name.strip('@').replace('/', '-')}-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", spec], cwd=folder.parent, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(folder.parent / packed) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def _labels() -> list[dict[str, Any]]:
    return json.loads((package(LABELS) / "en" / "data.json").read_text(encoding="utf-8"))


def _plain(code: str) -> str:
    """A code point sequence without variation selectors, in lower case."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _sources(name: str, spec: str, wanted: dict[str, str], by_slug: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """(label, what to render) of every picture of a set whose code point is wanted."""
    folder = package(spec)
    if name == "fluent-3d":
        for file in sorted((folder / "assets").glob("*.webp")):
            label = wanted.get(_plain(file.stem))
            if label:
                yield label, str(file)
        return
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    file = folder / "chars.json"
    codes: dict[str, str] = {}
    for code, icon in (json.loads(file.read_text()) if file.is_file() else {}).items():
        if _plain(code) in wanted:
            codes.setdefault(icon, _plain(code))
    for icon, body in icons["icons"].items():
        code = codes.get(icon) or by_slug.get(icon)
        if code:
            wide, high = (body.get(key, icons.get(key, 16)) for key in ("width", "height"))
            left, top, side = body.get("left", 0), body.get("top", 0), max(wide, high)
            yield (
                wanted[code],
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'width="{SIDE - 2 * MARGIN}" height="{SIDE - 2 * MARGIN}" '
                f'viewBox="{left - (side - wide) / 2} {top - (side - high) / 2} {side} {side}">{body["body"]}</svg>',
            )


def _render(source: str) -> np.ndarray | None:
    """RGBA, (256, 256, 4) uint8, of a WebP file or an SVG text; None if it cannot be rendered or is all but empty."""
    inner = SIDE - 2 * MARGIN
    if source.startswith("<svg"):
        import resvg_py

        try:
            image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=source))))
        except BaseException:  # the renderer panics on a few broken drawings
            return None
    else:
        image = Image.open(source)
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(image.convert("RGBA").resize((inner, inner), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    picture = np.asarray(canvas)
    return picture if (picture[..., 3] > 8).mean() > 0.03 else None


def load(sets: dict[str, str]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Each set's pictures, (N, 256, 256, 4) uint8 mapped from disk, and their labels; rendered at the first call."""
    entries = [each for each in _labels() if each.get("group") in GROUPS] + [
        each for each in _labels() if each["label"] in {concept.label for concept in read_concepts()}
    ]
    wanted = {_plain(each["hexcode"]): each["label"] for each in entries}
    by_slug = {_slug(each["label"]): _plain(each["hexcode"]) for each in entries}
    loaded: dict[str, tuple[np.ndarray, list[str]]] = {}
    for name, spec in sets.items():
        pictures, labels = CACHE / "pictures" / f"{name}.npy", CACHE / "pictures" / f"{name}.json"
        if not labels.is_file():
            pictures.parent.mkdir(parents=True, exist_ok=True)
            sources = list(_sources(name, spec, wanted, by_slug))
            with Pool() as pool:
                rendered = pool.map(_render, [source for _, source in sources], chunksize=8)
            kept = [i for i, picture in enumerate(rendered) if picture is not None]
            np.save(pictures, np.stack([rendered[i] for i in kept]))
            labels.write_text(json.dumps([sources[i][0] for i in kept]))
        loaded[name] = (np.load(pictures, mmap_mode="r"), json.loads(labels.read_text()))
    return loaded


if __name__ == "__main__":
    concepts = read_concepts()
    known = {each["label"] for each in _labels()}
    print("unknown labels:", [concept.label for concept in concepts if concept.label not in known])
    counts: dict[str, int] = {}
    for name, (pictures, labels) in load({**TRAINING_SETS, **EVALUATION_SETS}).items():
        print(
            f"{name}: {len(pictures)} pictures, {len({c.label for c in concepts} & set(labels))} of {len(concepts)} concepts"
        )
        if name in TRAINING_SETS:
            for label in set(labels):
                counts[label] = counts.get(label, 0) + 1
    print("in few sets:", {c.label: counts.get(c.label, 0) for c in concepts if counts.get(c.label, 0) < 4})
