"""Rules of plain language: banned words, sentences of prose, and their exceptions.

The word list serves documents and source code. Use `find_banned_words` for plain text,
`read_markdown` for a document, whose code and addresses are not prose, and `read_python` for
source code, whose docstrings, comments and strings are.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token

BANNED_WORDS = {
    r"draw|draws|drew|drawn|drawing|drawings": "generate, render",
    r"pictures?": "image",
    r"faults?": "error",
    r"mend|mends|mended|mending": "fix",
    r"whoever|whom|somebody|nobody|anybody|everybody|who may ask": "client, user",
    r"at work": "running",
    r"shelf|shelves|put aside|puts aside": "cache, offload",
    r"errands?": "pending job",
    r"keyrings?": "API key store",
    r"news": "notification",
    r"room": "capacity, space, memory",
    r"ending|endings": "shutdown, file extension",
    r"tell|tells|told|telling": "report, return, log",
    r"say|says|said|saying": "report, return, state",
    r"stands|stood": "is",
    r"asked for|ask for|asks for|asked of": "request",
    r"that ecosystem|old stack|old flags?": "AUTOMATIC1111, Forge",
    r"doomed|eagerness": "expired, wake-up sampling",
    r"the house|as of old|anew": "a plain word",
}
"""Patterns of words that are not used, each with the term that replaces it."""

ALLOWED_PHRASES = {
    r"room temperature": "physics",
    r"randomly drawn|drawn from (?:a|the) (?:normal )?distribution": "statistics",
    r"Whole picture": "a value of AUTOMATIC1111",
    r"Black Forest Labs[’']? drawings": "a proper name",
}
"""Patterns of phrases that may hold a banned word, each with the reason."""

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""Words that one document may use: (path, word in lower case) and the reason."""

SOURCE_EXCEPTIONS: dict[tuple[str, str], str] = {}
"""Words that one source file may use: (path, word in lower case) and the reason."""

NOT_VERBS = frozenset(
    """
    a an all and as by each every for if in it its like many most no none not of on one only or
    same some several text that the their these they this those three true false two what when
    where whether which who whose why with without how also both
    """.split()
)
"""First words of a docstring that are no imperative verb."""

VERBS_WITH_S = frozenset({"access", "address", "compress", "discuss", "express", "pass", "process"})
"""Imperative verbs that end like the third person."""

_BANNED = [
    (re.compile(rf"\b(?:{words})\b", re.IGNORECASE), better)
    for words, better in BANNED_WORDS.items()
]
_ALLOWED = re.compile("|".join(ALLOWED_PHRASES), re.IGNORECASE)
_SENTENCE_END = re.compile(r"""(?<=[.!?])["')]*\s+(?=["'(]*[A-Z0-9/§])""")
_WORD = re.compile(r"[^\W_](?:[\w'’.,:/+-]*\w)?")
CODE = "Code"
"""The word that stands for a piece of code within a sentence."""


@dataclass(frozen=True)
class BannedWord:
    """A banned word in a text, its line (from 1) and the terms to use instead."""

    word: str
    line: int
    better: str


def find_banned_words(text: str) -> list[BannedWord]:
    """Return the banned words of a text in the order of their lines.

    Args:
        text: Plain text, such as a docstring. Code in backquotes is left out.
    """
    plain = re.sub(r"``?[^`\n]+``?", CODE, text)
    plain = _ALLOWED.sub(lambda phrase: "x" * len(phrase[0]), plain)
    found = [
        BannedWord(match[0], plain.count("\n", 0, match.start()) + 1, better)
        for pattern, better in _BANNED
        for match in pattern.finditer(plain)
    ]
    return sorted(found, key=lambda banned: banned.line)


@dataclass(frozen=True)
class Block:
    """One block of prose: its kind, its text, and its lines.

    `kind` of a document, whose text is without code, is "heading", "paragraph", "item" or
    "cell". For source code see `read_python`. `line` counts from 1.
    """

    kind: str
    text: str
    line: int
    lines: int


def read_markdown(text: str) -> list[Block]:
    """Return the prose of a Markdown document, without code and addresses."""
    return list(
        _blocks(MarkdownIt("commonmark").enable("table").parse(_without_front_matter(text)))
    )


def read_python(text: str) -> list[Block]:
    """Return the prose of Python source.

    `kind` is "function" (a docstring of a function), "string" (any other string, also a
    docstring of a class or module) or "comment". Strings without a space, such as names and
    paths, are not prose.
    """
    return sorted([*_strings(ast.parse(text)), *_comments(text)], key=lambda block: block.line)


def begins_with_verb(docstring: str) -> bool:
    """Return whether the first word of a docstring can be an imperative verb."""
    word = re.split(r"\W", docstring.strip().lower(), maxsplit=1)[0]
    if word in NOT_VERBS or word.endswith("ing"):
        return False
    return word in VERBS_WITH_S or not word.endswith("s")


def split_sentences(text: str) -> list[str]:
    """Split a paragraph into its sentences."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if count_words(sentence)]


def count_words(sentence: str) -> int:
    """Count the words of a sentence; code, a number and a path are one word each."""
    return len(_WORD.findall(sentence))


def _strings(tree: ast.Module) -> Iterator[Block]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, functions) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            kind = "function" if id(node) in docstrings else "string"
            yield Block(kind, node.value, node.lineno, node.value.count("\n") + 1)


def _comments(text: str) -> Iterator[Block]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Block("comment", token.string, token.start[0], 1)


def _without_front_matter(text: str) -> str:
    match = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
    return "\n" * match[0].count("\n") + text[match.end() :] if match else text


def _blocks(tokens: list[Token]) -> Iterator[Block]:
    kinds: list[str] = []
    opened = {
        "heading_open": "heading",
        "list_item_open": "item",
        "th_open": "cell",
        "td_open": "cell",
    }
    line = 0
    for token in tokens:
        if token.map:
            line = token.map[0] + 1
        if token.type in opened:
            kinds.append(opened[token.type])
        elif token.type.endswith("_close") and token.type[:-5] + "open" in opened:
            kinds.pop()
        elif token.type == "inline":
            first, last = token.map or (line - 1, line)
            kind = kinds[-1] if kinds else "paragraph"
            yield Block(kind, _plain(token.children or []), first + 1, last - first)


def _plain(tokens: list[Token]) -> str:
    parts: list[str] = []
    for token in tokens:
        if token.type == "code_inline":
            parts.append(CODE)
        elif token.type in ("softbreak", "hardbreak"):
            parts.append("\n")
        elif token.type in ("text", "image"):
            parts.append(token.content)
    return "".join(parts)
