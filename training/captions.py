"""Write captions: concept, colour, look and style in the phrases that people type."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
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
"""Colours and the words for them. The sentence encoder does not know that crimson is red."""
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
TONES = {
    "white": (0.06, 0.35, 0.65),
    "gray": (0.06, 0.7, 0.05),
    "black": (0.1, 0.3, 0.0),
    "brown": (0.75, 0.6, 0.0),
}
"""Saturation factor, value factor and value offset that make a colour without a hue of its own."""


@dataclass(frozen=True)
class StyleWords:
    """Words for a style, by their place in a phrase."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    frames: tuple[str, ...]


STYLES = {
    "3d": StyleWords(
        ("3d", "glossy", "shaded", "soft 3d"),
        ("3d", "3d render", "glossy 3d icon", "3d icon", "3d style", "smooth shading"),
        ("a 3d render of {a}", "3d {n} icon", "a 3d {n}", "{n} 3d model"),
    ),
    "flat": StyleWords(
        ("flat", "minimal", "simple"),
        ("flat", "flat icon", "flat design", "minimal", "vector", "flat style", "flat vector"),
        ("flat {n} icon", "a flat {n}", "vector {n}", "minimal {n} icon", "a simple flat {n}"),
    ),
    "cartoon": StyleWords(
        ("cartoon", "cute cartoon"),
        ("cartoon", "cartoon style", "emoji style", "cartoon icon"),
        ("a cartoon {n}", "cartoon of {a}", "{n} cartoon", "a cute cartoon {n}"),
    ),
    "sticker": StyleWords(
        ("sticker style", "kawaii"),
        ("sticker", "sticker style", "kawaii", "thick outlines"),
        ("a {n} sticker", "a cute {n} sticker", "sticker of {a}", "{n} sticker", "kawaii {n}"),
    ),
    "clip art": StyleWords(
        ("clip art", "clipart", "inked"),
        ("clip art", "clipart", "ink drawing", "hand drawn", "illustration", "line art colored"),
        ("clipart of {a}", "{n} clipart", "clip art {n}", "a drawing of {a}", "hand drawn {n}"),
    ),
    "outline": StyleWords(
        ("outlined", "die-cut"),
        ("white outline", "with a white border", "die-cut sticker", "outlined", "white rim"),
        ("a {n} sticker with a white border", "die-cut {n} sticker", "{n} with an outline"),
    ),
    "pixel art": StyleWords(
        ("pixel art", "8-bit", "pixelated"),
        ("pixel art", "8-bit", "8 bit style", "retro game sprite", "pixelated", "16-bit sprite"),
        ("pixel art {n}", "a pixel art {n}", "8-bit {n}", "{n} sprite", "pixel {n}"),
    ),
}
"""Styles of the sets, and two that code makes of any image: `outline` and `pixel art`."""
STYLE_SHARE = 0.5
"""Share of the captions that name the style."""
SOFT = ("translucent", "semi-transparent", "see-through", "glass", "ghostly", "made of glass")
GLOWING = ("glowing", "shining", "with a glow", "neon", "luminous")
QUALITY = (
    *("high quality", "best quality", "detailed", "sharp", "masterpiece", "beautiful", "cute"),
    *("4k", "clean edges", "hd", "high resolution"),
)
PLACES = (
    *("on a transparent background", "transparent background", "isolated", "no background"),
    *("on white background", "centered", "single object", "png", "white background"),
)
FRAMES = (
    *("{n}", "{n}", "{n}", "{a}", "{a}", "{a}", "a photo of {a}", "a picture of {a}"),
    *("an image of {a}", "one {n}", "the {n}", "an icon of {a}", "{n} icon", "icon of {a}"),
    *("an illustration of {a}", "cute {n}", "a cute {n}", "a beautiful {n}", "a small {n}"),
    *("draw {a}", "draw me {a}", "game asset of {a}", "{n} game asset", "a simple {n}"),
    *("an emoji of {a}", "{n} emoji", "{n} png", "a single {n}", "{n} logo", "{n} symbol"),
    *("generate {a}", "i want {a}", "{a} for my app", "{n} graphic", "a little {n}"),
)
"""`{n}` stands for the noun, `{a}` for the noun with its article."""
FOREIGN_FRAMES = ("{}", "{}", "{}", "{} icon", "{}, 3d", "emoji {}", "{} sticker", "{}, flat")
FOREIGN_SHARE = 0.1
"""Share of the captions in German, Spanish, French, Chinese, or with the emoji as a word."""
UNWANTED = (
    *("bad, ugly", "bad, ugly", "", "ugly", "low quality, blurry", "bad quality"),
    *("worst quality, low quality", "deformed, ugly", "text, watermark, low quality"),
)
"""Negative prompts, trained like an empty prompt."""


@dataclass(frozen=True)
class Subject:
    """What an image shows: a concept, the colour to name if any, and the looks to name."""

    concept: Concept
    color: str | None = None
    looks: tuple[str, ...] = ()


def describe(subject: Subject, style: str | None, rng: random.Random) -> str:
    """Return a caption, from the bare name to a long prompt.

    Args:
        subject: What the image shows.
        style: Key of `STYLES`, or None to name no style.
        rng: Source of random numbers.
    """
    foreign = (*subject.concept.translations, subject.concept.characters)
    plain = not subject.color and not subject.looks
    if plain and any(foreign) and rng.random() < FOREIGN_SHARE:
        return rng.choice(FOREIGN_FRAMES).format(rng.choice([word for word in foreign if word]))
    noun = noun_phrase(subject, rng)
    words = STYLES[style] if style and rng.random() < STYLE_SHARE else None
    extras: list[str] = []
    frame = rng.choice(FRAMES) if rng.random() < 0.6 else "{a}"
    if words is not None:
        place = rng.random()
        if place < 0.35:
            frame = rng.choice(words.frames)
        elif place < 0.55:
            noun = f"{rng.choice(words.before)} {noun}"
        else:
            extras.append(rng.choice(words.after))
    text = frame.format(n=noun, a=with_article(noun) if rng.random() < 0.8 else noun)
    for choices, chance in ((QUALITY, 0.3), (QUALITY, 0.12), (PLACES, 0.15)):
        if rng.random() < chance:
            extras.append(rng.choice(choices))
    rng.shuffle(extras)
    return ", ".join([text, *extras])


def noun_phrase(subject: Subject, rng: random.Random) -> str:
    """Return the noun with its colour and looks, such as "crimson apple" or "glass apple"."""
    concept = subject.concept
    use_synonym = concept.synonyms and rng.random() < 0.5
    noun = rng.choice(concept.synonyms) if use_synonym else concept.name
    if subject.color:
        # "red apple" is a name of the apple. A blue one is no "blue red apple".
        first, _, rest = noun.partition(" ")
        noun = rest if rest and first in COLORS else noun
        words = COLORS[subject.color]
        noun = f"{rng.choice(words) if rng.random() < 0.5 else subject.color} {noun}"
    for look in subject.looks:
        noun = f"{noun} {look}" if look.startswith(("with", "made")) else f"{look} {noun}"
    return noun


def with_article(noun: str) -> str:
    """Return a noun with its indefinite article. Plural nouns and mass nouns get one too."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def phrase_of_anything(
    concepts: Sequence[Concept], others: Sequence[str], rng: random.Random
) -> str:
    """Return a text for the encoders to learn from.

    Args:
        concepts: Concepts of the model.
        others: Names of things that the model does not know.
        rng: Source of random numbers.

    Returns:
        A caption, keywords, a pair of concepts, or a caption of something unknown.
    """
    kind = rng.random()
    concept = rng.choice(concepts)
    color = rng.choice(list(COLORS)) if rng.random() < 0.45 else None
    looks = (rng.choice(SOFT + GLOWING),) if rng.random() < 0.1 else ()
    if kind < 0.6:
        return describe(Subject(concept, color, looks), rng.choice(list(STYLES)), rng)
    frame = rng.choice(FRAMES)
    if kind < 0.7 and concept.keywords:
        keyword = rng.choice(concept.keywords)
        return frame.format(n=keyword, a=with_article(keyword))
    if kind < 0.8 and concept.keywords:
        return f"{rng.choice(concept.keywords)} {concept.name}"
    if kind < 0.9:
        link = rng.choice(("and", "with", "next to", "on"))
        other = with_article(rng.choice(concepts).name)
        return f"{noun_phrase(Subject(concept, color), rng)} {link} {other}"
    other = rng.choice(others)
    return frame.format(n=other, a=with_article(other))


def is_held_out(color: str, concept: Concept) -> bool:
    """Return whether a colour of a concept is kept out of the training: one pair in forty."""
    return zlib.crc32(f"{color}/{concept.label}".encode()) % 40 == 0
