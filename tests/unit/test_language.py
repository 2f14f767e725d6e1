"""The source code and the names of tests keep the language rules of CONTRIBUTING.md."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from tests.support.language import (
    SOURCE_EXCEPTIONS,
    Block,
    begins_with_verb,
    find_banned_words,
    read_python,
)

ROOT = Path(__file__).parents[2]
MAX_FIRST_LINE = 80
MAX_TEST_NAME = 60
SOURCES = sorted((ROOT / "src" / "alphalayer").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def path_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def prose_of(path: Path) -> list[Block]:
    return read_python(path.read_text(encoding="utf-8"))


def function_docstrings(path: Path) -> list[tuple[int, str]]:
    return [(block.line, block.text) for block in prose_of(path) if block.kind == "function"]


def banned_words_of(path: Path) -> list[tuple[str, str]]:
    """Return the banned words of a file, each with its line and replacement."""
    return [
        (banned.word.lower(), f"line {block.line + banned.line - 1}: use {banned.better}")
        for block in prose_of(path)
        for banned in find_banned_words(block.text)
    ]


def names_of_tests(path: Path) -> list[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, functions) and node.name.startswith("test_")
    ]


@pytest.mark.parametrize("path", SOURCES, ids=path_of)
def test_source_uses_no_banned_word(path):
    words = banned_words_of(path)
    assert [word for word in words if (path_of(path), word[0]) not in SOURCE_EXCEPTIONS] == []


@pytest.mark.parametrize("path", SOURCES, ids=path_of)
def test_function_docstrings_begin_with_a_verb(path):
    others = [line for line, text in function_docstrings(path) if not begins_with_verb(text)]
    assert others == []


@pytest.mark.parametrize("path", SOURCES, ids=path_of)
def test_function_docstrings_have_a_short_first_line(path):
    long = [
        line
        for line, text in function_docstrings(path)
        if len(text.strip().splitlines()[0]) > MAX_FIRST_LINE
    ]
    assert long == []


@pytest.mark.parametrize("path", TESTS, ids=path_of)
def test_names_of_tests_are_short(path):
    names = names_of_tests(path)
    assert names
    assert [name for name in names if len(name) > MAX_TEST_NAME] == []


@pytest.mark.parametrize("path", TESTS, ids=path_of)
def test_names_of_tests_use_no_banned_word(path):
    words = {name: find_banned_words(name.replace("_", " ")) for name in names_of_tests(path)}
    assert {name: banned for name, banned in words.items() if banned} == {}


def test_source_exceptions_are_in_use():
    used = {(path_of(path), word) for path in SOURCES for word, _ in banned_words_of(path)}
    assert set(SOURCE_EXCEPTIONS) <= used


@pytest.mark.parametrize(
    ("docstring", "is_verb"),
    [
        ("Return the image.", True),
        ("Process the queue.", True),
        ("The image.", False),
        ("Whether it is there.", False),
        ("Returns the image.", False),
        ("Encoding of images.", False),
    ],
)
def test_begins_with_verb_knows_imperatives(docstring, is_verb):
    assert begins_with_verb(docstring) is is_verb


def test_read_python_returns_docstrings_strings_and_comments():
    text = '''"""A module."""
NAME = "a/path"


def name():  # why
    """Return
    a name."""
    return f"hello {NAME}, again"
'''
    assert [(block.kind, block.text.split()[0], block.line) for block in read_python(text)] == [
        ("string", "A", 1),
        ("comment", "#", 5),
        ("function", "Return", 6),
        ("string", "hello", 8),
        ("string", ",", 8),
    ]
