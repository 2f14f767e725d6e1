"""What is said about a picture: concept, colour and style in many wordings, and the colours a picture can be given."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from training.data import Concept

COLORS = {
    "red": ("red", "crimson", "scarlet", "ruby", "cherry red", "bright red"),
    "orange": ("orange", "tangerine colored", "amber", "bright orange"),
    "yellow": ("yellow", "golden", "lemon yellow", "bright yellow", "gold"),
    "green": ("green", "emerald", "lime", "lime green", "olive", "dark green", "bright green"),
    "teal": ("teal", "turquoise", "cyan", "aqua"),
    "blue": ("blue", "azure", "navy", "navy blue", "sky blue", "light blue", "dark blue", "cobalt"),
    "purple": ("purple", "violet", "lavender", "indigo", "lilac"),
    "pink": ("pink", "magenta", "hot pink", "rose colored", "fuchsia"),
    "brown": ("brown", "chocolate brown", "tan", "maroon"),
    "white": ("white", "snow white", "ivory", "pale"),
    "black": ("black", "jet black", "dark"),
    "gray": ("gray", "grey", "silver", "silvery"),
}
HUES = {
    "red": 0.0,
    "orange": 0.08,
    "yellow": 0.14,
    "green": 0.34,
    "teal": 0.48,
    "blue": 0.6,
    "purple": 0.76,
    "pink": 0.91,
}
STYLES = {
    "fluent-3d": ("3d render", "glossy 3d icon", "3d", "3d sticker", "soft 3d"),
    "fluent": ("smooth 3d icon", "shaded icon", "glossy icon"),
    "fluent-flat": ("flat icon", "flat", "minimal", "flat design"),
    "noto": ("cartoon", "emoji", "cartoon icon"),
    "noto-v1": ("old cartoon", "clip art", "blob emoji"),
    "fxemoji": ("simple drawing", "web icon"),
    "twemoji": ("flat sticker", "sticker", "vector illustration"),
    "emojitwo": ("emoji icon", "vector icon", "illustration"),
}
SOFT = ("translucent", "semi-transparent", "see-through", "glass", "ghostly", "made of glass")
GLOWING = ("glowing", "shining", "with a glow", "neon", "luminous")
QUALITY = ("high quality", "best quality", "detailed", "sharp", "masterpiece", "beautiful", "cute", "4k", "clean edges")
PLACES = (
    "on a transparent background",
    "isolated",
    "no background",
    "on white background",
    "centered",
    "single object",
)
FRAMES = (
    "{}", "{}", "{}", "{}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}", "a sticker of {}", "one {}",
    "the {}", "an icon of {}", "an illustration of {}", "cute {}", "a cute {}", "a beautiful {}", "a small {}", "draw {}",
    "game asset of {}", "a cartoon {}", "a simple {}", "a single {}", "an emoji of {}", "clipart of {}",
)  # fmt: skip
UNWANTED = (
    "bad, ugly",
    "bad, ugly",
    "",
    "ugly",
    "low quality, blurry",
    "bad quality",
    "worst quality, low quality",
    "deformed, ugly",
)
"""What stands in negative prompts: trained as if nothing had been said."""


@dataclass(frozen=True)
class Subject:
    """One thing of a picture: what, in which colour if one is to be said, in which look."""

    concept: Concept
    color: str | None = None
    look: tuple[str, ...] = ()


def describe(subject: Subject, style: str | None, rng: random.Random) -> str:
    """One wording of a picture, from the bare name to a long prompt."""
    phrase = noun(subject, rng)
    if rng.random() < 0.45:
        phrase = _with_article(phrase)
    frame = rng.choice(FRAMES) if rng.random() < 0.5 else "{}"
    if frame.endswith(" {}") and frame.split()[-2] in (
        "a",
        "one",
        "the",
        "single",
        "cute",
        "small",
        "beautiful",
        "simple",
        "cartoon",
    ):
        phrase = noun(subject, rng)
    text = frame.format(phrase)
    extras: list[str] = []
    if style and rng.random() < 0.4:
        extras.append(rng.choice(STYLES[style]))
    for words, chance in ((QUALITY, 0.35), (QUALITY, 0.15), (PLACES, 0.15)):
        if rng.random() < chance:
            extras.append(rng.choice(words))
    rng.shuffle(extras)
    return ", ".join([text, *extras])


def noun(subject: Subject, rng: random.Random) -> str:
    """The thing with its colour and look: "crimson apple", "glass apple"."""
    concept = subject.concept
    words = concept.name if rng.random() < 0.5 or not concept.synonyms else rng.choice(concept.synonyms)
    if subject.color:
        # "red apple" is a name of the apple; a blue one is no "blue red apple"
        plain = words.split(" ", 1)
        words = plain[1] if len(plain) > 1 and plain[0] in COLORS else words
        words = f"{rng.choice(COLORS[subject.color]) if rng.random() < 0.5 else subject.color} {words}"
    for look in subject.look:
        words = f"{words} {look}" if look.startswith(("with", "made")) else f"{look} {words}"
    return words


def phrase_of_anything(concepts: list[Concept], others: list[str], rng: random.Random) -> str:
    """A text for the encoders to learn from: concepts in all wordings, keywords, pairs, and things that are not drawn."""
    kind = rng.random()
    concept = rng.choice(concepts)
    color = rng.choice(list(COLORS)) if rng.random() < 0.45 else None
    look = (rng.choice(SOFT + GLOWING),) if rng.random() < 0.1 else ()
    if kind < 0.6:
        return describe(Subject(concept, color, look), rng.choice(list(STYLES)), rng)
    if kind < 0.7 and concept.keywords:
        return rng.choice(FRAMES).format(rng.choice(concept.keywords))
    if kind < 0.8 and concept.keywords:
        return f"{rng.choice(concept.keywords)} {concept.name}"
    if kind < 0.9:
        return f"{noun(Subject(concept, color), rng)} {rng.choice(('and', 'with', 'next to', 'on'))} a {rng.choice(concepts).name}"
    return rng.choice(FRAMES).format(rng.choice(others))


def is_held_out(color: str, concept: Concept) -> bool:
    """Whether this colour of this concept is kept out of training: about one pair in forty, fixed."""
    return zlib.crc32(f"{color}/{concept.label}".encode()) % 40 == 0


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
