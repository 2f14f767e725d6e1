"""Find other words for the concepts in WordNet: synonyms, kinds and what they are a kind of.

Embeddings of a small sentence encoder cannot tell a synonym from an unknown noun. The list of
this module can: captions use it, and a warning for unknown words needs it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from training.concepts import read_concepts
from training.data import Concept, debian_folder, emoji_entries, read_lines

WORDNET = "wordnet-base=1:3.0-37"
DEPTH = 2
"""Levels of kinds below a concept: 1 for "poodle", 2 for "toy poodle"."""
LEXICAL_FILES = {
    1: {"08", "18"},
    3: {"05", "13", "17", "20"},
    4: {"06", "13", "20"},
    5: {"06", "15", "17", "19"},
    6: {"04", "06", "10", "18"},
    7: {"06", "10", "13", "21", "27"},
    8: {"06", "10", "23", "25"},
}
"""WordNet's lexicographer files of each emoji group. They choose the sense of a name.

05 animals, 06 artifacts, 08 the body, 13 food, 17 natural objects, 18 persons, 20 plants.
"""
OBJECT_FILES = {"05", "06", "13", "17", "18", "20"}


@dataclass(frozen=True)
class Synset:
    """Set of words with one meaning."""

    lexical_file: str
    words: tuple[str, ...]
    kinds: tuple[str, ...]
    parents: tuple[str, ...]


@lru_cache
def read_synsets() -> dict[str, Synset]:
    """Return the noun synsets by offset; see wndb(5WN) for the format."""
    path = debian_folder(WORDNET) / "usr" / "share" / "wordnet" / "data.noun"
    synsets: dict[str, Synset] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        fields = line.partition(" | ")[0].split(" ")
        count = int(fields[3], 16)
        words = tuple(fields[4 + 2 * number] for number in range(count))
        pointers = fields[5 + 2 * count :]
        by_symbol = {
            symbol: tuple(
                pointers[start + 1]
                for start in range(0, len(pointers) - 3, 4)
                if pointers[start] == symbol
            )
            for symbol in ("~", "@")
        }
        synsets[fields[0]] = Synset(fields[1], words, by_symbol["~"], by_symbol["@"])
    return synsets


@lru_cache
def read_senses() -> dict[str, tuple[str, ...]]:
    """Return the offsets of the senses of each noun, the most frequent first."""
    path = debian_folder(WORDNET) / "usr" / "share" / "wordnet" / "index.noun"
    senses: dict[str, tuple[str, ...]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            senses[fields[0]] = tuple(fields[-int(fields[2]) :])
    return senses


def find_sense(name: str, lexical_files: set[str]) -> str | None:
    """Return the offset of a noun's most frequent sense in some lexicographer files."""
    for offset in read_senses().get(name.replace(" ", "_"), ()):
        if read_synsets()[offset].lexical_file in lexical_files:
            return offset
    return None


def _usual_words(offset: str) -> Iterator[str]:
    """Yield the words of a synset that have it as one of their first two senses."""
    for word in read_synsets()[offset].words:
        text = word.replace("_", " ")
        plain = text.islower() and text.replace(" ", "").replace("-", "").isalpha()
        if plain and text.count(" ") < 3 and offset in read_senses().get(word, ())[:2]:
            yield text


def _words(offset: str, known: set[str], depth: int = 0) -> Iterator[tuple[int, str]]:
    """Yield the words of a synset and of its kinds, each with its distance from the top."""
    synset = read_synsets()[offset]
    if depth and any(word.replace("_", " ") in known for word in synset.words):
        return  # This kind is a concept of its own.
    yield from ((depth, word) for word in _usual_words(offset))
    if depth < DEPTH:
        for kind in synset.kinds:
            yield from _words(kind, known, depth + 1)
    if depth == 0:
        for parent in synset.parents:
            yield from ((DEPTH + 1, word) for word in _usual_words(parent))


@lru_cache
def read_thesaurus() -> dict[str, tuple[int, str]]:
    """Return the words that are no names, each with its distance and its concept's label.

    The distance is 0 for a synonym, 1 for a kind, 2 for a kind of a kind, 3 for what the concept
    is a kind of.
    """
    groups = {entry["label"]: entry.get("group", -1) for entry in emoji_entries()}
    concepts = read_concepts()
    known = {name for concept in concepts for name in (concept.name, *concept.synonyms)}
    found: dict[str, tuple[int, str]] = {}
    for concept in concepts:
        files = LEXICAL_FILES.get(groups.get(concept.label, -1), OBJECT_FILES)
        for name in dict.fromkeys((concept.name, *concept.synonyms, concept.label.lower())):
            offset = find_sense(name, files)
            for distance, word in _words(offset, known) if offset else ():
                if word not in known and (word not in found or found[word][0] > distance):
                    found[word] = (distance, concept.label)
    return found


def words_of(concept: Concept, most: int = 24) -> tuple[str, ...]:
    """Return a concept's other words, the nearest and shortest first."""
    return tuple(word for _, _, word in sorted(_by_label()[concept.label])[:most])


@lru_cache
def _by_label() -> dict[str, list[tuple[int, int, str]]]:
    words: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for word, (distance, label) in read_thesaurus().items():
        words[label].append((distance, len(word), word))
    return words


def main() -> None:
    """Print the size of the list and how many of the hand-written synonyms it has."""
    thesaurus = read_thesaurus()
    names = {concept.label: concept.name for concept in read_concepts()}
    pairs = [line.split("\t") for line in read_lines("synonyms.tsv")]
    right = [names.get(thesaurus.get(word, (0, ""))[1], "").endswith(name) for word, name in pairs]
    present = [word in thesaurus for word, _ in pairs]
    print(
        f"{len(thesaurus)} words; of {len(pairs)} synonyms {sum(present)} are in it, "
        f"{sum(right)} with the concept meant"
    )


if __name__ == "__main__":
    main()
