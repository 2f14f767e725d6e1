"""Select drawings of the Open Clip Art Library by title, keywords and file name.

Every file states its dedication to the public domain. Drawings that show trademarks, have an
opaque background or have no colour are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from training.data import FOLDER, OPENCLIPART, debian_folder, read_lines

FOLDERS = (
    "animals",
    "buildings/furniture",
    "buildings/homes",
    "buildings",
    "containers",
    "decorations",
    "education",
    "electronics",
    "food",
    "geography/astronomy",
    "office",
    "people/bodypart",
    "people/clothing",
    "plants",
    "recreation/art",
    "recreation/games/chess",
    "recreation/games/dice",
    "recreation/holiday",
    "recreation/music",
    "recreation/party",
    "recreation/sports",
    "recreation/toys",
    "science",
    "signs_and_symbols/weather",
    "tools",
    "transportation",
    "unsorted",
)
LEFT_OUT_FOLDERS = ("aiga-symbols", "roadsigns", "pantyhose", "hummers", "duplicates", "CD_Player")
TRADEMARKS = re.compile(
    r"hummer|tux\b|linux|gnu\b|debian|ubuntu|kde|gnome|firefox|mozilla|apache|windows_|microsoft|apple_"
    r"(logo|mac|ii)|\bmac(book|intosh)?\b|i(pod|mac|phone)|nintendo|game_?boy|playstation|xbox|sony|clie|"
    r"nokia|motorola|canon|nikon|olympus|kodak|lego|volkswagen|vw|bmw|ferrari|mercedes|porsche|toyota|"
    r"skoda|dodge|shelby|cobra|jeep|blazer|fiat|citroen|renault|peugeot|honda|yamaha|vespa|trabant|"
    r"fender|gibson|stratocaster|barbie|disney|mickey|bambi|pokemon|mario|batman|superman|spider_?man|"
    r"star_?wars|road_?runner|coca|pepsi|mcdonald|nasa|olympic|red_cross|unicef|fifa|evel_|logo|marchio|"
    r"adidas|nike|converse|swatch|rolex|rubik|monopoly|van_gogh|picasso|nutella|heineken|guinness|"
    r"abrams|ak47|fingerboard|domo_kun|light_?saber|emule|ec2",
    re.IGNORECASE,
)
LEFT_OUT_WORDS = re.compile(
    r"nude|naked|erotic|sex|cannabis|marijuana|swastika|hitler|bullet_hole|gallows|blood|corpse|"
    r"_b[wn](_|\b)|flourish|corner|boating_rules|sailing_|_ahead|menu_|striscia|outline|"
    r"blueprint|diagram|wireframe|border\b|pattern|background|scene|map\b|flag",
    re.IGNORECASE,
)


def svg_folder() -> Path:
    """Return the folder of the SVG files."""
    return debian_folder(OPENCLIPART) / "usr" / "share" / "openclipart" / "svg"


def describe(path: Path) -> tuple[str, tuple[str, ...]] | None:
    """Read the metadata of a drawing.

    Returns:
        Title and keywords in lower case, or None for a file without a public domain notice.
    """
    text = path.read_text(encoding="utf-8", errors="ignore").lower()
    if not re.search(r"public ?domain", text):
        return None
    metadata = text.partition("<metadata")[2].partition("</metadata>")[0]
    title = re.search(r"<dc:title[^>]*>([^<]*)</dc:title>", metadata)
    subject = re.search(r"<dc:subject>(.*?)</dc:subject>", metadata, re.DOTALL)
    keywords = re.findall(r"<rdf:li>([^<]*)</rdf:li>", subject[1]) if subject else []
    return title[1].strip() if title else "", tuple(keywords)


@lru_cache
def names_by_label() -> dict[str, str]:
    """Return the label of each name and synonym of a concept. Names of objects come first."""
    from training.concepts import read_concepts

    labels: dict[str, str] = {}
    for concept in read_concepts(every=True):
        for name in (concept.name, concept.label.lower()):
            labels.setdefault(name, concept.label)
    for concept in read_concepts(every=True):
        for name in (concept.name, *concept.synonyms, concept.label.lower()):
            labels.setdefault(name, concept.label)
    return labels


@lru_cache
def translated_words() -> dict[str, str]:
    """Return the label of words in file names that are not English."""
    return dict(line.split("\t") for line in read_lines("openclipart_words.tsv"))


def find_label(stem: str, title: str, keywords: tuple[str, ...]) -> str | None:
    """Return the label of a drawing.

    The file name comes first, then the title, then a keyword that is a concept's name as a whole.
    The longest name counts. Of two it is the last one, the head of a compound.
    """
    stem = stem.lower()
    for word, label in translated_words().items():
        if re.search(rf"(^|_|[^a-z]){word}([^a-z]|$)", stem):
            return label
    labels = names_by_label()
    for text in (re.sub(r"[\W\d_]+", " ", stem), title):
        words = re.findall(r"[a-z]+", text)
        for length in range(min(4, len(words)), 0, -1):
            for start in range(len(words) - length, -1, -1):
                run = " ".join(words[start : start + length])
                for name in (run, run.removesuffix("s"), run.removesuffix("es")):
                    if name in labels:
                        return labels[name]
    found = [labels[keyword] for keyword in keywords if keyword in labels]
    return found[-1] if found else None


@lru_cache
def rejected() -> frozenset[str]:
    """Return the file names that a look at the contact sheets ruled out."""
    path = FOLDER / "openclipart_rejected.txt"
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else frozenset()


def overrides() -> dict[str, str]:
    """Return the labels given by hand, by file name."""
    path = FOLDER / "openclipart_labels.tsv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return dict(line.split("\t") for line in lines if "\t" in line)


@lru_cache
def drawings() -> dict[str, tuple[Path, str]]:
    """Return path and label of each drawing by file name without suffix.

    The label of a drawing that shows no concept is its file name after `openclipart:`. The
    autoencoder learns from these as well.
    """
    root, by_hand = svg_folder(), overrides()
    result: dict[str, tuple[Path, str]] = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.svg")):
            name = path.relative_to(root).as_posix()
            if path.stem in result or any(part in name for part in LEFT_OUT_FOLDERS):
                continue
            metadata = describe(path)
            if metadata is None or path.stem in rejected():
                continue
            title, keywords = metadata
            text = " ".join((path.stem, title, *keywords))
            if TRADEMARKS.search(text) or LEFT_OUT_WORDS.search(text):
                continue
            label = by_hand.get(path.stem) or find_label(path.stem, title, keywords)
            result[path.stem] = (path, label or f"openclipart:{path.stem}")
    return result


def label_of(stem: str) -> str:
    """Return the label of a rendered drawing, by its file name without suffix."""
    entry = drawings().get(stem)
    return entry[1] if entry else f"openclipart:{stem}"


def sources() -> Iterator[tuple[str, str]]:
    """Yield the file name without suffix and the path of each drawing."""
    for stem, (path, _) in drawings().items():
        yield stem, str(path)


def is_usable(image: np.ndarray) -> bool:
    """Return whether an image has colour and a transparent surrounding.

    Args:
        image: Straight RGBA, (side, side, 4) uint8.
    """
    alpha = image[..., 3]
    rows, columns = np.flatnonzero(alpha.max(1) > 8), np.flatnonzero(alpha.max(0) > 8)
    if len(rows) < 32 or len(columns) < 32:
        return False
    box = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # A full rectangle is a background. Corners of the bounding box show it.
    size = max(4, min(box.shape[:2]) // 40)
    corners = (box[:size, :size], box[:size, -size:], box[-size:, :size], box[-size:, -size:])
    if sum(corner[..., 3].mean() > 200 for corner in corners) >= 2:
        return False
    solid = box[box[..., 3] > 128][:, :3].astype(np.int16)
    if not len(solid):
        return False
    colorful = (solid.max(1) - solid.min(1) > 30).mean()
    return bool(colorful > 0.12)
