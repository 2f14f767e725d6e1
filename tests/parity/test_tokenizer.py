"""Token ids, compared with `CLIPTokenizer` of transformers.

`data/clip_tokens.json` holds [text, ids of tokenizer 1, ids of tokenizer 2] of transformers 4.46.1
with ftfy 6.3.1, for the tokenizers of SDXL. Version 5 has no ftfy. So its tokenizer is compared on
texts that ftfy does not change.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ftfy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from alphalayer.catalog import EMBEDDED_MODEL
from alphalayer.core.errors import CorruptFile
from alphalayer.engine.families.configs import SHIPPED
from alphalayer.engine.text.tokenizer import ClipTokenizer, _fix, read_tokenizer, read_tokenizers

FOLDERS = [
    model / name for model in (SHIPPED, EMBEDDED_MODEL) for name in ("tokenizer", "tokenizer_2")
]
RECORDED = Path(__file__).parent / "data" / "clip_tokens.json"
NASTY = [
    "",
    " ",
    " \t\r\n\f\v\xa0\u2003\u3000 ",
    "an  apple ,\n\n( high-quality:1.2 )",
    "it's IT'S don't we'll you're they've I'm he'd o'clock 'tis ''s",
    "苹果 りんご 사과 تفاحة תפוח яблоко กิน 🍎🍏 👍🏽 🇩🇪",
    "½ ² Ⅷ 12345 ١٢٣ 3.14e-5 1/2",
    "a_b-c+d=e @#$%^*~`|\\ «q» !!!! !?! ... </w> a</w>",
    "<|startoftext|> a<|endoftext|>b",
    "<|endoftext|><|endoftext|> ! !<|endoftext|>! < |endoftext|> <|endoftext",
    "[red|blue] (((a))) {x} <lora:a:1> <b> http://a.b/c?d=e",
    "supercalifragilisticexpialidocious" * 30,
    "masterpiece, best quality, " * 200,
    "!" * 500,
    "a" * 3000,
]  # fmt: skip
TEXTS = st.lists(
    st.text(st.characters(max_codepoint=127, exclude_categories=("Cc",)), max_size=12).map(
        lambda text: text.replace("&", "")
    )
    | st.sampled_from(["'s", "'LL", "<|endoftext|>", "!", " ", "</w>", "apple", "\n"])
).map("".join)
Pair = tuple[ClipTokenizer, CLIPTokenizer]


def _ids(reference: CLIPTokenizer, text: str) -> list[int]:
    return reference(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def _pair(folder: Path) -> Pair:
    return read_tokenizer(folder), CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _assert_equal(pair: Pair) -> None:
    own, reference = pair
    assert (own.start, own.end, own.pad, len(own)) == (
        reference.bos_token_id,
        reference.eos_token_id,
        reference.pad_token_id,
        len(reference),
    )
    assert [own.encode(text) for text in NASTY] == [_ids(reference, text) for text in NASTY]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    owns = [*read_tokenizers(*FOLDERS[:2]), *read_tokenizers(*FOLDERS[2:])]
    return [
        (own, CLIPTokenizer.from_pretrained(folder, local_files_only=True))
        for own, folder in zip(owns, FOLDERS, strict=True)
    ]


def test_shipped_tokenizers_equal_transformers(pairs: list[Pair]):
    for pair in pairs:
        _assert_equal(pair)


def test_recorded_token_ids_are_equal(pairs: list[Pair]):
    rows = json.loads(RECORDED.read_text())
    assert len(rows) > 300
    for text, *expected in rows:
        assert [own.encode(text) for own, _ in pairs[:2]] == expected, ascii(text)


def test_lines_are_fixed_as_ftfy_fixes_the_whole_text():
    """Cover entities, which ftfy keeps from the first tag on."""
    texts = [text for text, *_ in json.loads(RECORDED.read_text())]
    entities = ["&amp; <b", "a\n", "&lt;", "\n\n", "\x01", "\r", "x\u2028y", "\ufeff"]
    lines = texts[:150] + entities + texts[150:] + entities
    for size in (1, 2, 40):
        for first in range(0, len(lines), size):
            text = "\n".join(lines[first : first + size])
            # ftfy replaces "\r". Any white space becomes a blank later.
            assert _fix(text).replace("\r\n", "\n").replace("\r", "\n") == (
                ftfy.fix_text(text).lower()
            ), ascii(text)
    assert _fix("&amp;\n<\n&amp;") == "&\n<\n&amp;"


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        ("a woman’s hat, “red” café", 'a woman\'s hat, "red" cafe\u0301'),
        ("rock &amp; roll", "rock & roll"),
        ("ＡＰＰＬＥ，ｒｅｄ", "apple,red"),
        ("ﬁsh", "fish"),
        ("\ufeffan\x00 \x7fapple", "an apple"),
    ],
)
def test_typography_is_read_as_plain_text(pairs: list[Pair], typed: str, plain: str):
    for own, _ in pairs:
        assert own.encode(typed) == own.encode(plain)


def test_exclamation_mark_of_full_width_is_no_padding(pairs: list[Pair]):
    assert [own.encode("！") for own, _ in pairs[:2]] == [[256], [256]]


@given(text=TEXTS)
@example(text="'S<|endoftext|>!")
@settings(max_examples=300, deadline=None)
def test_token_ids_of_any_text_equal_transformers(pairs: list[Pair], text: str):
    for own, reference in pairs:
        assert own.encode(text) == _ids(reference, text)


def test_equal_vocabularies_are_built_once(pairs: list[Pair], tmp_path: Path):
    assert pairs[0][0].model is pairs[1][0].model
    assert pairs[1][0].model is not pairs[2][0].model
    own, other = read_tokenizers(FOLDERS[2], FOLDERS[0])
    assert own.model is not other.model
    # an unknown token of its own needs a vocabulary of its own
    shutil.copytree(FOLDERS[2], tmp_path / "other")
    _change_config(tmp_path / "other", unk_token="!")
    first, second = read_tokenizers(FOLDERS[2], tmp_path / "other")
    assert (first.model.unk_token, second.model.unk_token) == ("<|endoftext|>", "!")


def _change_config(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the embedded model's second tokenizer."""
    return Path(shutil.copytree(FOLDERS[3], tmp_path / "tokenizer"))


def test_tokenizer_that_transformers_saved_is_equal(folder: Path, tmp_path: Path):
    CLIPTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "vocab.json").exists()
    _assert_equal(_pair(tmp_path / "new"))


def test_tokenizer_json_counts_before_the_other_files(folder: Path, tmp_path: Path):
    CLIPTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)
    assert (folder / "vocab.json").exists()
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"][:500]]
    path.write_text(json.dumps(whole))
    _assert_equal(_pair(folder))
    assert read_tokenizer(folder).encode("apple") != read_tokenizer(FOLDERS[3]).encode("apple")


@pytest.mark.parametrize("normalized", [False, True])
def test_listed_tokens_equal_transformers(folder: Path, normalized: bool):
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    listed = {
        number: {"content": content, "normalized": normalized, **flags}
        for number, content in (("9682", "<|endoftext|>"), ("9681", "<|startoftext|>"))
    }
    _change_config(folder, added_tokens_decoder=listed)
    # transformers does not read it beside listed tokens
    (folder / "special_tokens_map.json").write_text('{"pad_token": "apple"}')
    _assert_equal(_pair(folder))


@pytest.mark.parametrize(
    "special",
    [
        {"pad_token": "<|endoftext|>"},
        {"pad_token": {"content": "!", "lstrip": True, "rstrip": True, "normalized": True}},
        {"eos_token": {"content": "<|endoftext|>", "single_word": True, "normalized": True}},
    ],
)
def test_special_tokens_map_equals_transformers(folder: Path, special: dict[str, object]):
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    _assert_equal(_pair(folder))


def test_tokenizer_without_config_equals_transformers(folder: Path):
    (folder / "tokenizer_config.json").unlink()
    _assert_equal(_pair(folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("merges.txt", None),
        ("merges.txt", "#version: 0.2\nqqq zzz\n"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"pad_token": 7}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer.json", "{}x"),
        ("tokenizer.json", '{"model": {}}'),
    ],
)
def test_damaged_tokenizer_is_refused(folder: Path, name: str, content: str | None):
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(CorruptFile, match="tokenizer"):
        read_tokenizers(folder, folder)
