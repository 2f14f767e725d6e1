"""List the concepts that the model learns, with names, synonyms and translations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from training.data import (
    LANGUAGES,
    MINIMUM_DESIGNS,
    Concept,
    designs_by_label,
    emoji_entries,
    read_lines,
    wanted_labels,
)

FACES = re.compile(r"face|cat$|monkey$")


def derive_name(label: str) -> str:
    """Return the usual name of a label: lower case, without quotes and accents of English use."""
    name = label.lower().replace("’", "'").replace("“", "").replace("”", "")
    return name.replace("piñata", "pinata").replace("-", " " if " " not in name else "-")


def _named() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return name and synonyms of the labels in concepts.txt. Further lines add synonyms."""
    words_by_label: dict[str, list[str]] = {}
    for line in read_lines("concepts.txt"):
        label, _, words = line.partition(" = ")
        words_by_label.setdefault(label.strip(), []).extend(w.strip() for w in words.split(";"))
    return {
        label: (words[0], tuple(dict.fromkeys(words[1:])))
        for label, words in words_by_label.items()
    }


@lru_cache
def read_concepts(*, every: bool = False) -> Sequence[Concept]:
    """Return the concepts to learn, sorted by label.

    Args:
        every: Whether to include labels that too few designs show.

    Returns:
        Concepts of at least `MINIMUM_DESIGNS` designs. The emoji sets must be rendered unless
        `every` is set.
    """
    entries = {entry["label"]: entry for entry in emoji_entries()}
    names_by_language = {
        language: {entry["hexcode"]: entry["label"] for entry in emoji_entries(language)}
        for language in LANGUAGES
    }
    named = _named()
    # The Open Clip Art Library's labels need the names of all concepts.
    designs = {} if every else designs_by_label()
    concepts: list[Concept] = []
    for label in sorted({*wanted_labels().values(), *named}):
        if not every and len(designs.get(label, ())) < MINIMUM_DESIGNS:
            continue
        entry = entries.get(label, {})
        name, synonyms = named.get(label, (derive_name(label), ()))
        code = entry.get("hexcode", "")
        translations = [names_by_language[language].get(code, "") for language in LANGUAGES]
        concepts.append(
            Concept(
                label=label,
                name=name,
                synonyms=synonyms,
                keywords=tuple(tag for tag in entry.get("tags", ()) if "_" not in tag),
                characters=entry.get("emoji", ""),
                translations=tuple(text.lower() for text in translations if text),
            )
        )
    return tuple(concepts)


if __name__ == "__main__":
    for concept in read_concepts():
        print(concept.label, "=", concept.name, *concept.synonyms, sep="; ")
