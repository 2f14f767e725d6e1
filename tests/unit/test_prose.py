"""The documents keep the rules of plain language that CONTRIBUTING.md lists."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest
from tests.support.language import (
    EXCEPTIONS,
    Block,
    count_words,
    find_banned_words,
    read_markdown,
    split_sentences,
)

ROOT = Path(__file__).parents[2]
MAX_LINE = 100
MAX_PARAGRAPH_LINES = 5
MAX_LINES_WITHOUT_HEADING = 40
MAX_MEAN_WORDS, MAX_P90_WORDS = 15, 24
GENERATED = {
    ROOT / "docs" / "reference" / name for name in ("api.md", "cli.md", "metrics.md", "settings.md")
}
"""Documents made from docstrings and descriptions, which `test_language.py` checks."""
RECORDS = {ROOT / "docs" / "log.md"}
"""Dated notes, which stay as they were written."""

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
DOCUMENTS = sorted(
    {
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    }
    - GENERATED
    - RECORDS
)
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh"))
RIDDLE = re.compile(r"(?:What|How|Which|Who|Whom|Where|When|Why|Whether|Be|In|Behind|From)\b|.*\?$")


def path_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose_of(path: Path) -> list[Block]:
    return read_markdown(path.read_text(encoding="utf-8"))


def sentences_of(path: Path) -> list[str]:
    return [
        sentence
        for block in prose_of(path)
        if block.kind in ("paragraph", "item")
        for sentence in split_sentences(block.text)
    ]


def long_lines(path: Path) -> list[int]:
    """Return long lines, except tables, code of documents and addresses of one word."""
    found, is_code = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        is_code ^= path.suffix == ".md" and line.lstrip().startswith("```")
        is_free = is_code or line.lstrip().startswith("|") or " " not in line.strip()
        without_links = re.sub(r"(?<=\])\([^()\s]+\)|https?://\S+", "", line)
        if not is_free and len(without_links) > MAX_LINE:
            found.append(number)
    return found


@pytest.mark.parametrize("path", [*DOCUMENTS, *EXAMPLES], ids=path_of)
def test_document_lines_are_short(path):
    assert long_lines(path) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=path_of)
def test_document_uses_no_banned_word(path):
    found = [
        f"{path_of(path)}:{block.line + banned.line - 1}: {banned.word} (use: {banned.better})"
        for block in prose_of(path)
        for banned in find_banned_words(block.text)
        if (path_of(path), banned.word.lower()) not in EXCEPTIONS
    ]
    assert found == []


@pytest.mark.parametrize("path", EXAMPLES, ids=path_of)
def test_example_uses_no_banned_word(path):
    text = re.sub(r"\w*_\w*|[\w.]+\(", "", path.read_text(encoding="utf-8"))
    assert find_banned_words(text) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=path_of)
def test_document_prose_has_no_semicolon(path):
    kinds = ("paragraph", "item", "heading")
    found = [block.line for block in prose_of(path) if block.kind in kinds and ";" in block.text]
    assert found == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=path_of)
def test_document_headings_are_nouns_or_tasks(path):
    headings = [block.text for block in prose_of(path) if block.kind == "heading"]
    assert headings
    assert [heading for heading in headings if RIDDLE.match(heading)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=path_of)
def test_document_paragraphs_are_short(path):
    kinds = ("paragraph", "item")
    found = [
        block.line
        for block in prose_of(path)
        if block.kind in kinds and block.lines > MAX_PARAGRAPH_LINES
    ]
    assert found == []


@pytest.mark.parametrize("path", GUIDES, ids=path_of)
def test_guide_has_a_heading_on_every_screen(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    places = [block.line for block in prose_of(path) if block.kind == "heading"]
    gaps = [after - before for before, after in zip(places, [*places[1:], len(lines)], strict=True)]
    assert max(gaps) <= MAX_LINES_WITHOUT_HEADING


@pytest.mark.parametrize("path", GUIDES, ids=path_of)
def test_guide_sentences_are_short(path):
    words = [count_words(sentence) for sentence in sentences_of(path)]
    assert statistics.mean(words) <= MAX_MEAN_WORDS
    assert statistics.quantiles(words, n=10)[-1] <= MAX_P90_WORDS


def test_exceptions_are_in_use():
    used = {
        (path_of(path), banned.word.lower())
        for path in DOCUMENTS
        for block in prose_of(path)
        for banned in find_banned_words(block.text)
    }
    assert set(EXCEPTIONS) <= used


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Draw the picture.", ["Draw", "picture"]),
        ("Return an image.\nNobody is told.", ["Nobody", "told"]),
        ("Call `render_disc` with ``news``.", []),
        ("Withdraw the drawer from the bedroom.", []),
        ("A seed is drawn from a distribution.", []),
    ],
)
def test_find_banned_words_returns_words_in_order(text, words):
    assert [banned.word for banned in find_banned_words(text)] == words


def test_find_banned_words_returns_the_line():
    (banned,) = find_banned_words("Return an image.\nMend it.")
    assert (banned.line, banned.better) == (2, "fix")


def test_read_markdown_leaves_code_and_addresses_out():
    text = (
        "# Title\n\nSee [the page](https://draw.example.com) and `draw`.\n\n"
        "```bash\ndraw\n```\n\n| a |\n|---|\n| b |\n"
    )
    blocks = [(block.kind, block.text, block.line) for block in read_markdown(text)]
    assert blocks == [
        ("heading", "Title", 1),
        ("paragraph", "See the page and Code.", 3),
        ("cell", "a", 9),
        ("cell", "b", 11),
    ]


def test_split_sentences_keeps_numbers_and_names_whole():
    text = "It takes 1.5 GB. See `run.py` (Python 3.10 to 3.13).\nA second one."
    assert len(split_sentences(text)) == 3


def test_count_words_takes_a_path_as_one_word():
    assert count_words("Put files into models/Lora - all of them.") == 7
