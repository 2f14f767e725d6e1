"""Conditioning of prompts: tokens, weights, chunks, learned words and plans over the steps.

Both encoders are compared with the pipeline of diffusers.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file
from tests.support import tiny_models
from transformers import CLIPTokenizer

from alphalayer.core.cost import EMBEDDING_CHUNKS, max_chunks
from alphalayer.core.errors import Cancelled, InvalidRequest
from alphalayer.core.prompts import MAX_PROMPT_BYTES
from alphalayer.engine.families.clip_files import build_text_model, transformers_names
from alphalayer.engine.families.configs import SHIPPED
from alphalayer.engine.networks.clip import ClipTextModel
from alphalayer.engine.text.encoders import (
    SDXL_OUTPUTS,
    Reading,
    TextEncoders,
    is_cached,
    plan_negative,
    plan_prompt,
)
from alphalayer.engine.text.textual_inversion import TextualInversion, read_embeddings
from alphalayer.engine.text.tokenizer import read_tokenizers

START, END = 49406, 49407
# float32 through three layers, in other batch sizes
SAME = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def tokenizers():
    return read_tokenizers(SHIPPED / "tokenizer", SHIPPED / "tokenizer_2")


@pytest.fixture(scope="module")
def models():
    """Return both models of transformers."""
    return tiny_models.text_encoders()


@pytest.fixture(scope="module")
def own_models(models):
    return _own(models)


def _own(models) -> tuple[ClipTextModel, ClipTextModel]:
    first, second = (
        build_text_model(transformers_names(model.state_dict(), ""), model.config.to_dict())
        for model in models
    )
    return first, second


def _encoders(tokenizers, models, embeddings=None) -> TextEncoders:
    return TextEncoders([*zip(tokenizers, models, strict=True)], SDXL_OUTPUTS, embeddings)


@pytest.fixture(scope="module")
def encoders(tokenizers, own_models) -> TextEncoders:
    return _encoders(tokenizers, own_models)


@pytest.fixture(scope="module")
def pipeline(models) -> StableDiffusionXLPipeline:
    first, second = (
        CLIPTokenizer.from_pretrained(SHIPPED / name, local_files_only=True)
        for name in ("tokenizer", "tokenizer_2")
    )
    return StableDiffusionXLPipeline(
        vae=tiny_models.vae(),
        text_encoder=models[0],
        text_encoder_2=models[1],
        tokenizer=first,
        tokenizer_2=second,
        unet=tiny_models.unet(),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def _raw(models, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode one chunk of token ids with each model.

    Returns:
        The last but one hidden states of both models, (77, width), and the pooled output of the
        second one.
    """
    with torch.no_grad():
        outputs = [
            model(torch.tensor([row]), output_hidden_states=True)
            for model, row in zip(models, ids, strict=True)
        ]
    return outputs[0].hidden_states[-2][0], outputs[1].hidden_states[-2][0], outputs[1][0][0]


def _framed(tokens: list[int]) -> list[list[int]]:
    """Return one chunk for each encoder: 1 pads with the end token, 2 with 0."""
    rest = 75 - len(tokens)
    return [[START, *tokens, END, *[END] * rest], [START, *tokens, END, *[0] * rest]]


# --- tokens


def test_shipped_vocabulary_gives_the_published_tokens(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer.encode("an apple, high quality") == [550, 3055, 267, 1400, 3027]
        assert (tokenizer.start, tokenizer.end) == (START, END)
        assert len(tokenizer) == 49_408
    assert [tokenizer.pad for tokenizer in tokenizers] == [END, 0]


def test_exclamation_mark_is_padding_for_tokenizer_2_only(tokenizers):
    assert [tokenizer.encode("!!") for tokenizer in tokenizers] == [[748], [0, 0]]


# --- against diffusers


@pytest.mark.parametrize(
    "prompt", ["an apple, high quality", "a glass, with water!", "x " * 60, "ÄÖ 苹果 🍎"]
)
def test_plain_prompt_equals_diffusers(encoders: TextEncoders, pipeline, prompt: str):
    context, _, pooled, _ = pipeline.encode_prompt(
        prompt, device="cpu", do_classifier_free_guidance=False
    )
    result = encoders.encode(prompt)
    assert result.context.shape == (1, 77, tiny_models.WIDTH_L + tiny_models.WIDTH_G)
    torch.testing.assert_close(result.context, context, **SAME)
    torch.testing.assert_close(result.pooled, pooled, **SAME)


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_clip_skip_counts_layers_like_automatic1111(
    encoders: TextEncoders, pipeline, clip_skip: int
):
    """Compare with diffusers, which counts from the layer of SDXL. So 1 equals 2 here."""
    skipped = max(clip_skip, 2) - 2
    context, *_ = pipeline.encode_prompt(
        "an apple", device="cpu", do_classifier_free_guidance=False, clip_skip=skipped or None
    )
    torch.testing.assert_close(encoders.encode("an apple", clip_skip).context, context, **SAME)


# --- weights


def test_weights_scale_tokens_and_keep_the_mean(encoders: TextEncoders, models):
    """Compare with the rule "Original", for each encoder.

    Each token's vector is multiplied by its weight. Then the mean of the chunk is restored.
    """
    hidden_l, hidden_g, pooled = _raw(models, _framed([550, 3055, 267, 1400, 3027]))
    weights = torch.ones(77, 1)
    weights[2], weights[4:6] = 1.5, 1 / 1.1
    expected = []
    for hidden in (hidden_l, hidden_g):
        weighted = hidden * weights
        expected.append(weighted * hidden.mean() / weighted.mean())
    result = encoders.encode("an (apple:1.5), [high quality]")
    # the mean of random vectors is small, so its ratio has a larger rounding error
    torch.testing.assert_close(result.context[0], torch.cat(expected, dim=-1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result.pooled[0], pooled, **SAME)
    assert (result.context - encoders.encode("an apple, high quality").context).abs().max() > 0.1


# --- chunks


def test_break_encodes_both_sides_separately(encoders: TextEncoders):
    both, left, right = (
        encoders.encode(text) for text in ("red apple BREAK blue cup", "red apple", "blue cup")
    )
    assert both.context.shape[1] == 2 * 77
    torch.testing.assert_close(
        both.context, torch.cat([left.context, right.context], dim=1), **SAME
    )
    torch.testing.assert_close(both.pooled, left.pooled, **SAME)


def test_long_prompt_is_split_after_75_tokens(encoders: TextEncoders):
    words = ["apple"] * 75 + ["cup"] * 10
    whole = encoders.encode(" ".join(words))
    parts = [encoders.encode(" ".join(words[:75])), encoders.encode(" ".join(words[75:]))]
    torch.testing.assert_close(
        whole.context, torch.cat([part.context for part in parts], dim=1), **SAME
    )


@pytest.mark.parametrize("prompt", ["a cat" + "!" * 80, "apple " * 73 + "!! cup"])
def test_encoders_with_different_chunk_counts_are_padded(encoders: TextEncoders, prompt: str):
    """Give encoder 1 empty chunks if encoder 2 has more.

    Every exclamation mark is a token of its own for encoder 2 only.
    """
    result, empty = encoders.encode(prompt), encoders.encode("")
    assert result.context.shape[1] == 2 * 77
    width = tiny_models.WIDTH_L
    torch.testing.assert_close(result.context[:, 77:, :width], empty.context[..., :width], **SAME)
    assert (result.context[:, 77:, width:] - empty.context[..., width:]).abs().max() > 0.1


def test_long_text_is_encoded_in_several_calls(
    encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
):
    whole = encoders.encode("red apple BREAK blue cup BREAK a cat")
    monkeypatch.setattr("alphalayer.engine.text.encoders.CHUNKS_AT_ONCE", 2)
    encoders.forget()
    parts = encoders.encode("red apple BREAK blue cup BREAK a cat")
    torch.testing.assert_close(parts.context, whole.context, **SAME)
    torch.testing.assert_close(parts.pooled, whole.pooled, **SAME)


def test_empty_prompt_is_one_chunk_of_padding(encoders: TextEncoders, models):
    hidden_l, hidden_g, _ = _raw(models, _framed([]))
    torch.testing.assert_close(
        encoders.encode("").context[0], torch.cat([hidden_l, hidden_g], dim=-1), **SAME
    )


def test_text_after_an_end_token_is_padding_for_encoder_2(encoders: TextEncoders, models):
    row_l = [START, 550, END, 3055, END, *[END] * 72]
    row_g = [START, 550, END, *[0] * 74]
    hidden_l, hidden_g, _ = _raw(models, [row_l, row_g])
    result = encoders.encode("an <|endoftext|> apple").context[0]
    torch.testing.assert_close(result, torch.cat([hidden_l, hidden_g], dim=-1), **SAME)


# --- learned words


@pytest.fixture(scope="module")
def learned() -> TextualInversion:
    generator = torch.Generator().manual_seed(2)
    return TextualInversion(
        "glowstyle",
        (
            torch.randn(2, tiny_models.WIDTH_L, generator=generator),
            torch.randn(2, tiny_models.WIDTH_G, generator=generator),
        ),
    )


def test_learned_word_is_replaced_by_its_vectors(
    tokenizers, models, own_models, learned: TextualInversion
):
    """Compare with models whose embedding tables are overwritten at two unused tokens."""
    spare = [40_000, 40_001]
    changed = [copy.deepcopy(model) for model in models]
    for model, vectors in zip(changed, learned.vectors, strict=True):
        model.get_input_embeddings().weight.data[spare] = vectors
    hidden_l, hidden_g, pooled = _raw(changed, _framed([550, *spare, 3055]))
    result = _encoders(tokenizers, own_models, {"glowstyle": learned}).encode("an glowstyle apple")
    torch.testing.assert_close(result.context[0], torch.cat([hidden_l, hidden_g], dim=-1), **SAME)
    torch.testing.assert_close(result.pooled[0], pooled, **SAME)


def test_learned_words_do_not_change_other_prompts(
    tokenizers, own_models, encoders, learned: TextualInversion
):
    with_words = _encoders(tokenizers, own_models, {"glowstyle": learned})
    with_words.encode("an glowstyle apple")
    torch.testing.assert_close(
        with_words.encode("an apple").context, encoders.encode("an apple").context, **SAME
    )


def test_learned_word_of_another_width_is_ignored(tokenizers, own_models, encoders):
    other = TextualInversion("glowstyle", (torch.zeros(1, 7), torch.zeros(1, 9)))
    with_words = _encoders(tokenizers, own_models, {"glowstyle": other})
    torch.testing.assert_close(
        with_words.encode("glowstyle").context, encoders.encode("glowstyle").context, **SAME
    )


def test_learned_word_without_a_name_is_ignored(
    tokenizers, own_models, encoders, learned: TextualInversion
):
    with_words = _encoders(tokenizers, own_models, {"\u200b": learned})
    torch.testing.assert_close(
        with_words.encode("an apple").context, encoders.encode("an apple").context, **SAME
    )


def test_conditioning_cache_stays_within_its_size(
    tokenizers, own_models, monkeypatch: pytest.MonkeyPatch
):
    with_words = _encoders(tokenizers, own_models)
    calls: list[int] = []
    own_models[0].register_forward_pre_hook(lambda *_: calls.append(1))
    one = with_words.encode("an apple").nbytes
    assert one == (77 * (tiny_models.WIDTH_L + tiny_models.WIDTH_G) + tiny_models.WIDTH_G) * 4
    monkeypatch.setattr("alphalayer.engine.text.encoders.CACHE_BYTES", 2 * one)
    texts = ["an apple", "a pear", "an apple", "a plum", "an apple", "a pear"]
    for text in texts:
        with_words.encode(text)
    # the plum evicts the pear
    assert len(calls) == 4
    # a text larger than the cache is encoded each time, with the same result
    long = " BREAK ".join(["a cat"] * 3)
    assert torch.equal(with_words.encode(long).context, with_words.encode(long).context)
    assert len(calls) == 6
    with_words.forget()
    with_words.encode(long)
    assert len(calls) == 7


def test_read_embeddings_skips_other_files(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "deep").mkdir()
    save_file(
        {"clip_l": torch.ones(2, 3).half(), "clip_g": torch.ones(2, 5).half()},
        tmp_path / "deep" / "good.safetensors",
    )
    save_file({"emb_params": torch.ones(2, 3)}, tmp_path / "sd15.safetensors")
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, tmp_path / "pair.safetensors")
    save_file({"emb_params": torch.ones(2, 3, 1)}, tmp_path / "cube.safetensors")
    save_file(
        {"clip_l": torch.ones(2, 3), "clip_g": torch.ones(1, 5)}, tmp_path / "uneven.safetensors"
    )
    save_file({"clip_l": torch.ones(3), "clip_g": torch.ones(5)}, tmp_path / "single.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    embeddings = read_embeddings(tmp_path)
    assert list(embeddings) == ["good", "sd15", "single"]
    assert [matrix.shape for matrix in embeddings["single"].vectors] == [(1, 3), (1, 5)]
    assert [matrix.shape for matrix in embeddings["sd15"].vectors] == [(2, 3)]
    assert embeddings["good"].vectors[1].dtype == torch.float32
    assert all(name in caplog.text for name in ("pair", "cube", "uneven", "broken"))
    assert read_embeddings(tmp_path / "absent") == {}


# --- plans over the steps


def _text_at(plan, step: int, encoders: TextEncoders, texts: list[str]) -> str:
    """Return which of these texts a plan of one part has at a step."""
    ((conditioning, weight),) = plan.at(step)
    assert weight == 1.0
    (text,) = [
        text for text in texts if torch.equal(encoders.encode(text).context, conditioning.context)
    ]
    return text


def test_empty_negative_prompt_is_zeros_but_a_space_is_not(encoders: TextEncoders):
    empty, space = (plan_negative(encoders, text, Reading(20)).at(0)[0][0] for text in ("", " "))
    assert empty.context.shape == (1, 77, tiny_models.WIDTH_L + tiny_models.WIDTH_G)
    assert not empty.context.any()
    assert not empty.pooled.any()
    assert space.context.any()
    torch.testing.assert_close(space.context, encoders.encode("").context, **SAME)


def test_plan_changes_its_text_at_the_scheduled_step(encoders: TextEncoders):
    plan = plan_prompt(encoders, "a [red:blue:0.5] cup", Reading(8))
    texts = ["a red cup", "a blue cup"]
    # a schedule's entry holds while the step counter, from 0 on, is not above its end
    assert [_text_at(plan, step, encoders, texts) for step in range(8)] == [texts[0]] * 5 + [
        texts[1]
    ] * 3


def test_plan_alternates_its_texts(encoders: TextEncoders):
    plan = plan_prompt(encoders, "[red|blue] cup", Reading(5))
    texts = ["red cup", "blue cup"]
    # entries end at steps 1, 2, 3 ... of a counter that starts at 0, so the first one holds twice
    assert [texts.index(_text_at(plan, step, encoders, texts)) for step in range(5)] == [
        0,
        0,
        1,
        0,
        1,
    ]


def test_plan_with_and_has_several_weighted_conditionings(encoders: TextEncoders):
    plan = plan_prompt(encoders, "a cup AND a plate:0.5", Reading(4))
    (first, one), (second, half) = plan.at(3)
    assert (one, half) == (1.0, 0.5)
    torch.testing.assert_close(first.context, encoders.encode("a cup").context, **SAME)
    torch.testing.assert_close(second.context, encoders.encode("a plate").context, **SAME)


def test_plan_encodes_each_text_once(
    encoders: TextEncoders, own_models, monkeypatch: pytest.MonkeyPatch
):
    """Cover texts that are too long for the cache."""
    monkeypatch.setattr("alphalayer.engine.text.encoders.CACHE_BYTES", 0)
    calls: list[int] = []
    handle = own_models[0].register_forward_pre_hook(lambda *_: calls.append(1))
    checks: list[int] = []
    plan = plan_prompt(
        encoders,
        "[red|blue] cup AND [red|blue] plate",
        Reading(20),
        check=lambda: checks.append(len(calls)),
    )
    handle.remove()
    assert (
        len({id(conditioning) for step in range(20) for conditioning, _ in plan.at(step)})
        == len(calls)
        == 4
    )
    # the texts are split first
    assert checks == [0] * 4 + [0, 1, 2, 3], "a job can be cancelled between any two"


@pytest.mark.parametrize(
    "prompt", ["BREAK " * 600 + "a", "[" + "|".join(map(str, range(61))) + "]" + " BREAK a" * 10]
)
def test_plan_with_too_many_chunks_is_refused(encoders: TextEncoders, prompt: str):
    for plan, field in ((plan_prompt, "prompt"), (plan_negative, "negative_prompt")):
        with pytest.raises(InvalidRequest, match="600 chunks") as error:
            plan(encoders, prompt, Reading(60))
        assert error.value.field == field


def test_plan_with_too_many_embedding_vectors_is_refused(tokenizers, own_models):
    vectors = torch.zeros(75, tiny_models.WIDTH_L), torch.zeros(75, tiny_models.WIDTH_G)
    large = TextualInversion("cup", vectors)
    with_words = _encoders(tokenizers, own_models, {"cup": large})
    most = max_chunks("cup")
    plan_prompt(with_words, "cup " * most, Reading(1))
    for plan, field in ((plan_prompt, "prompt"), (plan_negative, "negative_prompt")):
        with pytest.raises(InvalidRequest, match=f"{most + 1} chunks .* at most {most}") as error:
            plan(with_words, "cup " * (most + 1), Reading(1))
        assert error.value.field == field


@pytest.mark.parametrize(
    "text", ["\U0001f34e", "7 ", ",", "x" * 55 + ",y", "\u00e9\u4e2d", "BREAK,"]
)
def test_text_without_embeddings_has_no_more_than_max_chunks(encoders: TextEncoders, text: str):
    for count in (1, 30, 200, MAX_PROMPT_BYTES // len(text.encode())):
        assert len(encoders.split(text * count)[0]) <= max_chunks(text * count) - EMBEDDING_CHUNKS


def test_plan_negative_treats_and_as_text(encoders: TextEncoders):
    ((conditioning, weight),) = plan_negative(encoders, "a cup AND a plate:0.5", Reading(4)).at(0)
    assert weight == 1.0
    torch.testing.assert_close(
        conditioning.context, encoders.encode("a cup AND a plate:0.5").context, **SAME
    )


def test_plan_combines_nested_schedules_and_weights(encoders: TextEncoders):
    plan = plan_prompt(encoders, "([red:(blue:1.4):2]:1.2) cup", Reading(4))
    texts = ["(red:1.2) cup", "((blue:1.4):1.2) cup"]
    together = encoders.encode_schedule(texts)
    for step, text in ((0, texts[0]), (3, texts[1])):
        ((conditioning, _),) = plan.at(step)
        assert torch.equal(conditioning.context, together[text].context)


# --- texts that are encoded together

LONG = ", ".join(["apple"] * 60)


def test_texts_of_a_schedule_are_padded_with_empty_chunks(encoders: TextEncoders):
    plan = plan_prompt(encoders, f"[cat:{LONG}:2]", Reading(4))
    short, long = (plan.at(step)[0][0] for step in (0, 3))
    assert short.context.shape == long.context.shape == encoders.encode(LONG).context.shape
    expected = [encoders.encode(text).context for text in ("cat", "")]
    torch.testing.assert_close(short.context, torch.cat(expected, dim=1), **SAME)
    torch.testing.assert_close(short.pooled, encoders.encode("cat").pooled, **SAME)


def test_shorter_parts_of_and_repeat_their_last_vector(encoders: TextEncoders):
    (short, _), (long, _) = plan_prompt(encoders, f"a cat AND {LONG}", Reading(4)).at(0)
    alone = encoders.encode("a cat ").context
    padded = short.padded_context()
    assert short.tokens == long.tokens == 154
    assert padded.shape == long.padded_context().shape == (1, 154, alone.shape[2])
    assert torch.equal(padded[:, :77], alone)
    assert torch.equal(padded[:, 77:], alone[:, -1:].expand(1, 77, -1))


def test_plan_of_unlike_parts_holds_each_chunk_once(encoders: TextEncoders):
    prompt = "a " + "BREAK a " * 20 + "AND [" + "|".join(map(str, range(10))) + "]"
    plan = plan_prompt(encoders, prompt, Reading(10))
    held = {id(entry): entry for _, schedule in plan.parts for _, entry in schedule}.values()
    assert {entry.tokens for entry in held} == {77 * 21}
    assert sum(entry.context.shape[1] for entry in held) == 77 * (21 + 10)


def test_plan_splits_each_text_once_and_can_be_cancelled(
    encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
):
    texts: list[str] = []
    whole = TextEncoders.split
    monkeypatch.setattr(
        TextEncoders,
        "split",
        lambda self, text, *rest: texts.append(text) or whole(self, text, *rest),
    )

    def cancel() -> None:
        raise Cancelled("cancelled.")

    with pytest.raises(Cancelled):
        plan_prompt(encoders, "[one|two] mug", Reading(4), cancel)
    assert texts == []
    plan_prompt(encoders, "[one|two] mug", Reading(4))
    assert texts == ["one mug", "two mug"]


@pytest.mark.parametrize("line", ["\n\x01", "\n\ufeff"])
def test_lines_of_deleted_characters_are_fixed_once(
    encoders: TextEncoders, line: str, monkeypatch: pytest.MonkeyPatch
):
    import ftfy

    lines: list[str] = []
    whole = ftfy.fix_text
    monkeypatch.setattr(
        ftfy, "fix_text", lambda line, **options: lines.append(line) or whole(line, **options)
    )
    plan_prompt(encoders, line * 500 + "[0|1|2|3|4]", Reading(5))
    assert len(lines) < 8


def _weighted(encoders: TextEncoders, text: str, weights: dict[int, float]) -> torch.Tensor:
    """Return the hidden states of a plain text, with weights at some positions."""
    factors = torch.ones(77, 1)
    for position, weight in weights.items():
        factors[position] = weight
    return encoders.encode(text).context[0] * factors


def _split_widths(context: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return context.split([tiny_models.WIDTH_L, tiny_models.WIDTH_G], dim=-1)


@pytest.mark.parametrize(("steps", "entries"), [(2, "ab"), (3, "aba"), (5, "ababa")])
def test_weights_keep_the_mean_over_all_entries(encoders: TextEncoders, steps: int, entries: str):
    """Scale the text without weights, too. Each entry of the schedule counts."""
    plan = plan_prompt(encoders, "[cat|(dog:1.6)]", Reading(steps))
    plain = {"a": encoders.encode("cat").context[0], "b": encoders.encode("dog").context[0]}
    weighted = {"a": plain["a"], "b": _weighted(encoders, "dog", {1: 1.6})}
    expected = {"a": list[torch.Tensor](), "b": list[torch.Tensor]()}
    for part in range(2):
        before, after = (
            torch.stack([_split_widths(texts[name])[part] for name in entries]).mean()
            for texts in (plain, weighted)
        )
        for name, rows in expected.items():
            rows.append(_split_widths(weighted[name])[part] * before / after)
    ((_, schedule),) = plan.parts
    for name, (_, conditioning) in zip(entries, schedule, strict=True):
        torch.testing.assert_close(
            conditioning.context[0], torch.cat(expected[name], dim=-1), rtol=1e-3, atol=1e-4
        )
    assert (torch.cat(expected["a"], dim=-1) - plain["a"]).abs().max() > 1e-3


def test_emphasis_of_each_kind(encoders: TextEncoders):
    kinds = {
        "No norm": _weighted(encoders, "a cat", {2: 1.5}),
        "Ignore": encoders.encode("a cat").context[0],
        "None": encoders.encode(r"a \(cat:1.5\)").context[0],
    }
    for kind, expected in kinds.items():
        plan = plan_prompt(encoders, "a (cat:1.5)", Reading(4, emphasis=kind))
        torch.testing.assert_close(plan.at(0)[0][0].context[0], expected, **SAME)
    ignored = plan_prompt(encoders, "a BREAK cat", Reading(4, emphasis="Ignore"))
    assert ignored.at(0)[0][0].context.shape[1] == 154
    as_text = plan_prompt(encoders, "a BREAK cat", Reading(4, emphasis="None"))
    assert as_text.at(0)[0][0].context.shape[1] == 77


@pytest.mark.parametrize(
    ("negative", "is_zeroed"),
    [("[bad::0]", True), ("[:bad:1.0]", True), ("[bad::0.5]", False), ("()", False)],
)
def test_negative_whose_texts_are_all_empty_is_zeros(
    encoders: TextEncoders, negative: str, is_zeroed: bool
):
    conditioning = plan_negative(encoders, negative, Reading(4)).at(0)[0][0]
    assert bool(conditioning.context.any()) != is_zeroed


def test_schedule_above_the_cache_keeps_the_other_entries(
    tokenizers, own_models, monkeypatch: pytest.MonkeyPatch
):
    own = _encoders(tokenizers, own_models)
    monkeypatch.setattr("alphalayer.engine.text.encoders.CACHE_BYTES", own.encode("cup").nbytes * 3)
    own.encode_schedule([str(i) for i in range(4)])
    assert own.is_cached(["cup"], 1, "Original")
    assert not own.is_cached([str(i) for i in range(4)], 1, "Original")


def test_clip_skip_of_the_same_layer_shares_the_cache(tokenizers, own_models):
    own = _encoders(tokenizers, own_models)
    own.encode("cup", clip_skip=1)
    assert own.is_cached(["cup"], 2, "Original")
    assert not own.is_cached(["cup"], 3, "Original")


def test_cache_holds_what_a_plan_needs(tokenizers, own_models):
    own = _encoders(tokenizers, own_models)
    prompts = "[cat|(dog:1.6)] AND a cup", "[bad::0]"
    reading = Reading(4)
    assert not is_cached(own, *prompts, reading)
    plan_prompt(own, prompts[0], reading)
    assert not is_cached(own, *prompts, reading), "zeros have the shape of an encoded text"
    plan_negative(own, prompts[1], reading)
    assert is_cached(own, *prompts, reading)
    for other in (Reading(5), Reading(4, 3), Reading(4, emphasis="Ignore")):
        assert not is_cached(own, *prompts, other)
    # the order of the entries changes nothing
    assert is_cached(own, "[(dog:1.6)|cat] AND a cup", "", reading)
