"""CLIP's tokenizer: byte-pair encoding of normalised, lower-case text.

Source: `CLIPTokenizer` of transformers 4, with ftfy installed. The token ids of any text are equal.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from alphalayer import catalog
from alphalayer.core.errors import CorruptFile

_WHOLE = "tokenizer.json"
_VOCABULARY = ("vocab.json", "merges.txt")
_END = "<|endoftext|>"
# in the order in which transformers adds them: the last entry of a text decides on its flags
_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": _END,
    "unk_token": _END,
    "pad_token": _END,
}
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")
_PLAIN = re.compile(r"[\t\n\r -%'-~]*")
"""Texts that `ftfy` does not change: printable ASCII without entities."""
FIXED_LINES, FIXED_LENGTH = 8192, 256
"""Cache of `ftfy`: lines, and the most characters of a line. It fixes each line in about 70 us."""
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
    """Tokenizer of a text encoder.

    Args:
        model: Vocabulary and merges.
        special: Text of each special token by its name in tokenizer_config.json.
        added: Tokens that are found in a text before it is split into words.

    Attributes:
        model: Vocabulary and merges.
        start: Token id before a text.
        end: Token id after a text.
        pad: Token id that fills a row.
    """

    def __init__(self, model: BPE, special: Mapping[str, str], added: Sequence[AddedToken]):
        self.model = model
        self._tokenizer = _tokenizer(model, added)
        self._words = _tokenizer(
            model,
            [AddedToken(_SPECIAL[name], normalized=True) for name in ("bos_token", "eos_token")],
        )
        self._added = {self._id(token.content) for token in added}
        self.start, self.end, self.pad = (
            self._id(special[name]) for name in ("bos_token", "eos_token", "pad_token")
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text of any length, without start and end.

        Special tokens are found first. The text between them is fixed apart. So a full-width
        exclamation mark is no padding token.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = []
        at = 0
        for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if number in self._added:
                ids += [*self._encode_words(text[at:start]), number]
                at = end
        return ids + self._encode_words(text[at:])

    def _encode_words(self, text: str) -> list[int]:
        return self._words.encode(_fix(text), add_special_tokens=False).ids

    def __len__(self) -> int:
        """Return the number of token ids."""
        return self._tokenizer.get_vocab_size()

    def _id(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise LookupError(f"no token {token!r}")
        return number


def _tokenizer(model: BPE, added: Sequence[AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


def _fix(text: str) -> str:
    """Return a text in small letters and with plain typography.

    Curly quotes, HTML entities, full-width letters, ligatures and control characters are replaced.
    """
    if not _PLAIN.fullmatch(text):
        lines: list[str] = []
        has_entities = True
        for line in re.findall(r"[^\n]*\n|[^\n]+", text):
            # as in ftfy, a tag ends the entities of its line and of all that follow
            has_entities = has_entities and "<" not in line
            if not _PLAIN.fullmatch(line):
                fix = _fix_line if len(line) <= FIXED_LENGTH else _fix_line.__wrapped__
                line = fix(line, has_entities=has_entities)
            lines.append(line)
        text = "".join(lines)
    return text.lower()


@lru_cache(FIXED_LINES)
def _fix_line(line: str, *, has_entities: bool) -> str:
    # its import takes a while, and most prompts do not need it
    import ftfy

    return ftfy.fix_text(line, unescape_html=has_entities)


def read_tokenizers(first: Path, *others: Path) -> list[ClipTokenizer]:
    """Read the tokenizers of all text encoders.

    Building a vocabulary takes most of the time, so they share it if their files are equal.

    Args:
        first: Folder of tokenizer 1.
        others: Folders of the others.

    Raises:
        CorruptFile: A file is missing or damaged.
    """
    one = read_tokenizer(first)
    return [
        one,
        *(
            read_tokenizer(folder, one.model if _is_same_vocabulary(first, folder) else None)
            for folder in others
        ),
    ]


def read_tokenizer(folder: Path, model: BPE | None = None) -> ClipTokenizer:
    """Read a tokenizer.

    Args:
        folder: Folder with tokenizer.json, or vocab.json and merges.txt. tokenizer_config.json and
            special_tokens_map.json are optional.
        model: Vocabulary and merges, if they are read already.

    Raises:
        CorruptFile: A file is missing or damaged.
    """
    whole = _read_optional(folder / _WHOLE)
    try:
        special, added = _special_tokens(folder, whole)
        if model is None or model.unk_token != special["unk_token"]:
            model = _read_vocabulary(folder, whole, special["unk_token"])
        return ClipTokenizer(model, special, added)
    # the library raises nothing narrower
    except Exception as error:
        raise CorruptFile(
            f"{folder} holds no readable tokenizer ({catalog.printable(str(error))[:300]}).",
            hint="Download the model again.",
        ) from error


def _is_same_vocabulary(first: Path, second: Path) -> bool:
    return not any((folder / _WHOLE).is_file() for folder in (first, second)) and all(
        (second / name).is_file() and filecmp.cmp(first / name, second / name, shallow=False)
        for name in _VOCABULARY
    )


def _read_vocabulary(folder: Path, whole: Mapping[str, Any], unknown: str) -> BPE:
    options: dict[str, Any] = {"end_of_word_suffix": "</w>", "unk_token": unknown}
    if whole:
        pairs = whole["model"]["merges"]
        merges = [
            (left, right)
            for left, right in (
                pair.split(" ") if isinstance(pair, str) else pair for pair in pairs
            )
        ]
        return BPE(whole["model"]["vocab"], merges, **options)
    if not all((folder / name).is_file() for name in _VOCABULARY):
        raise ValueError(f"{' or '.join(_VOCABULARY)} is missing")
    # twice as fast as dictionaries of Python
    return BPE.from_file(*(str(folder / name) for name in _VOCABULARY), **options)


def _special_tokens(
    folder: Path, whole: Mapping[str, Any]
) -> tuple[dict[str, str], list[AddedToken]]:
    """Return the text of each special token by name, and all added tokens."""
    config = _read_optional(folder / "tokenizer_config.json")
    listed: Mapping[Any, Any] | None = config.get("added_tokens_decoder")
    if listed is None:
        config |= _read_optional(folder / "special_tokens_map.json")
        listed = {token["id"]: token for token in whole.get("added_tokens", ())}
    ordered = sorted(listed.items(), key=lambda item: int(item[0]))
    added = {token["content"]: _added_token(token) for _, token in ordered}
    contents, special = set(added), dict[str, str]()
    for name, default in _SPECIAL.items():
        token = config.get(name) or default
        special[name] = token if isinstance(token, str) else token["content"]
        if special[name] not in contents:
            added[special[name]] = _added_token(token)
    return special, list(added.values())


def _added_token(token: str | Mapping[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    return AddedToken(
        token["content"], special=True, **{flag: token[flag] for flag in _FLAGS if flag in token}
    )


def _read_optional(path: Path) -> dict[str, Any]:
    return catalog.read_json(path) if path.is_file() else {}
