"""Download icon sets and render them as 512x512 RGBA images with the concept each one shows.

The training sets are under MIT, Apache-2.0, CC-BY-4.0 or in the public domain. The share-alike
sets are rendered for the evaluation only. DATA.md lists every package with its licence.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CACHE = Path(
    os.environ.get("ALPHALAYER_TRAINING_CACHE", Path.home() / ".cache" / "alphalayer-training")
)
FOLDER = Path(__file__).parent
SIDE = 512
MARGIN_SHARE = 1 / 32
LABELS = "emojibase-data@17.0.0"
OPENCLIPART = "openclipart-svg=1:0.18+dfsg-19"
LANGUAGES = ("de", "es", "fr", "zh")


@dataclass(frozen=True)
class ImageSet:
    """Icon set of one vendor.

    Attributes:
        package: npm name and version, or Debian name and version for `openclipart`.
        design: Name of the design. Sets with the same design show the same drawings.
        style: Key of `captions.STYLES`.
        side: Side of the renders in pixels.
    """

    package: str
    design: str
    style: str
    side: int = SIDE


TRAINING_SETS = {
    # This set has raster images of 256 pixels only.
    "fluent-3d": ImageSet("@lobehub/fluent-emoji-3d@1.1.0", "fluent", "3d", 256),
    "fluent": ImageSet("@iconify-json/fluent-emoji@1.2.7", "fluent", "3d"),
    "fluent-flat": ImageSet("@iconify-json/fluent-emoji-flat@1.2.6", "fluent", "flat"),
    "noto": ImageSet("@iconify-json/noto@1.2.9", "noto", "cartoon"),
    "noto-v1": ImageSet("@iconify-json/noto-v1@1.2.5", "noto-v1", "cartoon"),
    "twemoji": ImageSet("@iconify-json/twemoji@1.2.5", "twemoji", "flat"),
    "streamline": ImageSet("@iconify-json/streamline-emojis@1.2.4", "streamline", "sticker"),
    "openclipart": ImageSet(OPENCLIPART, "openclipart", "clip art"),
}
EVALUATION_SETS = {
    "openmoji": ImageSet("@iconify-json/openmoji@1.2.29", "openmoji", "", 256),
    "emojione-v1": ImageSet("@iconify-json/emojione-v1@1.2.3", "emojione", "", 256),
    "emojitwo": ImageSet("@iconify-json/emojione@1.2.3", "emojione", "", 256),
    "fxemoji": ImageSet("@iconify-json/fxemoji@1.2.2", "fxemoji", "", 256),
}
"""Sets of other vendors. The classifier of `evaluate` learns from these alone."""
OBJECT_GROUPS = {0, 3, 4, 5, 6, 7}
"""Smileys, animals and nature, food, travel, activities, objects."""
MINIMUM_DESIGNS = 3
"""Number of designs that an emoji needs to become a concept."""


@dataclass(frozen=True)
class Concept:
    """Thing to generate.

    Attributes:
        label: Unicode's English short name, or a name of our own.
        name: Usual name.
        synonyms: Other names.
        keywords: Keywords of emojibase. They describe the concept but do not name it.
        characters: The emoji itself.
        translations: Names in other languages.
    """

    label: str
    name: str
    synonyms: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    characters: str = ""
    translations: tuple[str, ...] = ()


def package_folder(spec: str) -> Path:
    """Return the folder of an npm package, downloaded at the first call."""
    name, _, version = spec.rpartition("@")
    stem = f"{name.strip('@').replace('/', '-')}-{version}"
    folder = CACHE / "packages" / stem
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        archive_path = folder.parent / f"{stem}.tgz"
        if not archive_path.is_file():
            subprocess.run(
                ["npm", "pack", "--silent", spec],
                cwd=folder.parent,
                check=True,
                capture_output=True,
            )
        with tarfile.open(archive_path) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def debian_folder(spec: str) -> Path:
    """Return the folder of an unpacked Debian package, downloaded at the first call.

    Needs `apt-get` and `dpkg-deb`.
    """
    folder = CACHE / "packages" / spec.replace(":", "-").replace("=", "-")
    if not folder.is_dir():
        downloads = CACHE / "packages" / "debian"
        downloads.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", spec], cwd=downloads, check=True)
        archive = next(downloads.glob(f"{spec.partition('=')[0]}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    return folder


@lru_cache
def emoji_entries(language: str = "en") -> list[dict[str, Any]]:
    """Return emojibase's entries: label, hexcode, emoji, tags, group."""
    path = package_folder(LABELS) / language / "data.json"
    return json.loads(path.read_text(encoding="utf-8"))


def normalize_hexcode(code: str) -> str:
    """Return a code point sequence in lower case and without variation selectors."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def slugify(text: str) -> str:
    """Return a text as lower-case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@lru_cache
def wanted_labels() -> dict[str, str]:
    """Return the labels of all object emoji and named concepts by hexcode."""
    named = {line.partition(" = ")[0].strip() for line in read_lines("concepts.txt")}
    return {
        normalize_hexcode(entry["hexcode"]): entry["label"]
        for entry in emoji_entries()
        if entry.get("group") in OBJECT_GROUPS or entry["label"] in named
    }


def read_lines(name: str) -> list[str]:
    """Return the lines of a file of this folder that are neither empty nor comments."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _sources(name: str) -> Iterator[tuple[str, str]]:
    """Yield the label and the file path or SVG text of each image of an emoji set."""
    folder = package_folder({**TRAINING_SETS, **EVALUATION_SETS}[name].package)
    wanted = wanted_labels()
    if name == "fluent-3d":
        for path in sorted((folder / "assets").glob("*.webp")):
            if label := wanted.get(normalize_hexcode(path.stem)):
                yield label, str(path)
        return
    by_slug = {slugify(label): code for code, label in wanted.items()}
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    characters = folder / "chars.json"
    codes: dict[str, str] = {}
    if characters.is_file():
        for code, icon in json.loads(characters.read_text()).items():
            if normalize_hexcode(code) in wanted:
                codes.setdefault(icon, normalize_hexcode(code))
    for icon, body in icons["icons"].items():
        code = codes.get(icon) or by_slug.get(icon)
        if code:
            yield wanted[code], _svg_of_icon(icons, body)


def _svg_of_icon(icons: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """Return an Iconify icon as a square SVG."""
    width, height = (body.get(key, icons.get(key, 16)) for key in ("width", "height"))
    left, top, side = body.get("left", 0), body.get("top", 0), max(width, height)
    view_box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIDE}" height="{SIDE}" viewBox="{view_box}">{body["body"]}</svg>'
    )


def render(source: str, side: int) -> np.ndarray | None:
    """Render an SVG text, an SVG file or a raster file.

    Args:
        source: SVG text or path.
        side: Side of the result in pixels.

    Returns:
        Straight RGBA, (side, side, 4) uint8, or None for an image that cannot be rendered or is
        almost empty.
    """
    import resvg_py

    inner = side - 2 * round(side * MARGIN_SHARE)
    try:
        if source.startswith("<svg"):
            options: dict[str, Any] = {"svg_string": source}
        elif source.endswith(".svg"):
            options = {"svg_path": source}
        else:
            options = {}
        if options:
            data = resvg_py.svg_to_bytes(**options, width=inner, height=inner)
            image = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
        else:
            image = Image.open(source).convert("RGBA")
    except BaseException:  # resvg panics on a few broken files
        return None
    scale = inner / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    array = np.asarray(canvas)
    return array if (array[..., 3] > 8).mean() > 0.03 else None


def _render_task(task: tuple[str, int]) -> np.ndarray | None:
    return render(*task)


def load_set(name: str) -> tuple[np.ndarray, list[str]]:
    """Load a set's images and their labels, rendered at the first call.

    Returns:
        Straight RGBA, (count, side, side, 4) uint8 mapped from disk, and a label for each.
    """
    from training import openclipart

    array_path = CACHE / "images" / f"{name}.npy"
    labels_path = array_path.with_suffix(".json")
    if not labels_path.is_file():
        array_path.parent.mkdir(parents=True, exist_ok=True)
        side = {**TRAINING_SETS, **EVALUATION_SETS}[name].side
        pairs = list(openclipart.sources() if name == "openclipart" else _sources(name))
        with Pool(int(os.environ.get("ALPHALAYER_TRAINING_PROCESSES", "1"))) as pool:
            rendered = pool.map(_render_task, [(source, side) for _, source in pairs], chunksize=8)
        kept = [
            (label, image)
            for (label, _), image in zip(pairs, rendered, strict=True)
            if image is not None and (name != "openclipart" or openclipart.is_usable(image))
        ]
        np.save(array_path, np.stack([image for _, image in kept]))
        labels_path.write_text(json.dumps([label for label, _ in kept]))
    labels = json.loads(labels_path.read_text())
    if name == "openclipart":
        labels = [openclipart.label_of(stem) for stem in labels]
    return np.load(array_path, mmap_mode="r"), labels


def load_sets(sets: Mapping[str, ImageSet]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Load several sets by name; see `load_set`."""
    return {name: load_set(name) for name in sets}


def designs_by_label() -> dict[str, set[str]]:
    """Return the designs that show each label, of the rendered training sets."""
    designs: dict[str, set[str]] = defaultdict(set)
    for name, image_set in TRAINING_SETS.items():
        labels_path = CACHE / "images" / f"{name}.json"
        labels = load_set(name)[1] if labels_path.is_file() else ()
        for number, label in enumerate(labels):
            # Each drawing of the Open Clip Art Library has an author of its own.
            own = f" {number}" if name == "openclipart" else ""
            designs[label].add(image_set.design + own)
    return designs


def report() -> None:
    """Print the size of each set and the number of concepts by number of designs."""
    for name in {**TRAINING_SETS, **EVALUATION_SETS}:
        images, labels = load_set(name)
        count, side = images.shape[:2]
        print(f"{name}: {count} images of {side} px, {len(set(labels))} labels")
    designs = designs_by_label()
    for minimum in (2, 3, 4, 5):
        count = sum(len(names) >= minimum for names in designs.values())
        print(f"labels in at least {minimum} designs: {count}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", help="sets to render; all if none is named")
    for set_name in parser.parse_args().sets:
        print(set_name, load_set(set_name)[0].shape, flush=True)
    report() if not parser.parse_args().sets else None
