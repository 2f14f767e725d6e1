"""Prompts into conditioning: token ids, both encoders against diffusers' own pipeline, weights, chunks, learned words, plans over steps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file
from tests.support import tiny_models
from transformers import CLIPTokenizer

from alphalayer.core.errors import InvalidRequest
from alphalayer.engine.families.configs import SHIPPED
from alphalayer.engine.text.encoders import TextEncoders, plan_negative, plan_prompt
from alphalayer.engine.text.textual_inversion import TextualInversion, read_embeddings

START, END = 49406, 49407
# float32 through three layers, in other batch sizes
SAME = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def tokenizers():
    return [
        CLIPTokenizer.from_pretrained(SHIPPED / name, local_files_only=True)
        for name in ("tokenizer", "tokenizer_2")
    ]


@pytest.fixture(scope="module")
def models():
    return tiny_models.text_encoders()


@pytest.fixture(scope="module")
def encoders(tokenizers, models) -> TextEncoders:
    return TextEncoders(*tokenizers, *models)


@pytest.fixture(scope="module")
def pipeline(tokenizers, models) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=tiny_models.vae(), text_encoder=models[0], text_encoder_2=models[1], tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1], unet=tiny_models.unet(), scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def _raw(models, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last but one hidden states of both models for one chunk of token ids each, and the pooled output of the second."""
    with torch.no_grad():
        outputs = [
            model(torch.tensor([row]), output_hidden_states=True)
            for model, row in zip(models, ids, strict=True)
        ]
    return outputs[0].hidden_states[-2][0], outputs[1].hidden_states[-2][0], outputs[1][0][0]


def _framed(tokens: list[int]) -> list[list[int]]:
    """One chunk for each tokenizer: encoder 1 pads with the end token, encoder 2 with 0."""
    rest = 75 - len(tokens)
    return [[START, *tokens, END, *[END] * rest], [START, *tokens, END, *[0] * rest]]


# --- tokens


def test_the_shipped_vocabulary_gives_the_published_tokens(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer("an apple, high quality")["input_ids"] == [
            START,
            550,
            3055,
            267,
            1400,
            3027,
            END,
        ]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (START, END)
        assert len(tokenizer) == 49_408
    assert [tokenizer.pad_token_id for tokenizer in tokenizers] == [END, 0]


def test_an_exclamation_mark_is_padding_to_the_second_tokenizer_only(tokenizers):
    ids = [tokenizer("!!", add_special_tokens=False)["input_ids"] for tokenizer in tokenizers]
    assert ids == [[748], [0, 0]]


# --- against diffusers


@pytest.mark.parametrize(
    "prompt", ["an apple, high quality", "a glass, with water!", "x " * 60, "ÄÖ 苹果 🍎"]
)
def test_a_plain_prompt_equals_diffusers(encoders: TextEncoders, pipeline, prompt: str):
    context, _, pooled, _ = pipeline.encode_prompt(
        prompt, device="cpu", do_classifier_free_guidance=False
    )
    ours = encoders.encode(prompt)
    assert ours.context.shape == (1, 77, tiny_models.WIDTH_L + tiny_models.WIDTH_G)
    torch.testing.assert_close(ours.context, context, **SAME)
    torch.testing.assert_close(ours.pooled, pooled, **SAME)


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_clip_skip_counts_as_webui_does(encoders: TextEncoders, pipeline, clip_skip: int):
    """1 and 2 are the same for SDXL; diffusers counts from the layer that SDXL uses."""
    theirs = max(clip_skip, 2) - 2
    context, *_ = pipeline.encode_prompt(
        "an apple", device="cpu", do_classifier_free_guidance=False, clip_skip=theirs or None
    )
    torch.testing.assert_close(encoders.encode("an apple", clip_skip).context, context, **SAME)


# --- weights


def test_weights_scale_tokens_and_keep_the_mean(encoders: TextEncoders, models):
    """The "Original" rule: each token's vector times its weight, then the whole chunk brought back to its mean, for each encoder."""
    hidden_l, hidden_g, pooled = _raw(models, _framed([550, 3055, 267, 1400, 3027]))
    weights = torch.ones(77, 1)
    weights[2], weights[4:6] = 1.5, 1 / 1.1
    expected = []
    for hidden in (hidden_l, hidden_g):
        weighted = hidden * weights
        expected.append(weighted * hidden.mean() / weighted.mean())
    ours = encoders.encode("an (apple:1.5), [high quality]")
    # the mean of random vectors is small, so its ratio has a larger rounding error
    torch.testing.assert_close(ours.context[0], torch.cat(expected, dim=-1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.pooled[0], pooled, **SAME)
    assert (ours.context - encoders.encode("an apple, high quality").context).abs().max() > 0.1


# --- chunks


def test_break_encodes_its_sides_apart(encoders: TextEncoders):
    both, left, right = (
        encoders.encode(text) for text in ("red apple BREAK blue cup", "red apple", "blue cup")
    )
    assert both.context.shape[1] == 2 * 77
    torch.testing.assert_close(
        both.context, torch.cat([left.context, right.context], dim=1), **SAME
    )
    torch.testing.assert_close(both.pooled, left.pooled, **SAME)


def test_a_long_prompt_is_cut_after_75_tokens(encoders: TextEncoders):
    words = ["apple"] * 75 + ["cup"] * 10
    whole = encoders.encode(" ".join(words))
    parts = [encoders.encode(" ".join(words[:75])), encoders.encode(" ".join(words[75:]))]
    torch.testing.assert_close(
        whole.context, torch.cat([each.context for each in parts], dim=1), **SAME
    )


@pytest.mark.parametrize("prompt", ["a cat" + "!" * 80, "apple " * 73 + "!! cup"])
def test_the_encoders_may_part_a_text_into_unlike_numbers_of_chunks(
    encoders: TextEncoders, prompt: str
):
    """Exclamation marks are tokens of their own to encoder 2; encoder 1 reads empty chunks in place of those that it lacks."""
    ours, empty = encoders.encode(prompt), encoders.encode("")
    assert ours.context.shape[1] == 2 * 77
    width = tiny_models.WIDTH_L
    torch.testing.assert_close(ours.context[:, 77:, :width], empty.context[..., :width], **SAME)
    assert (ours.context[:, 77:, width:] - empty.context[..., width:]).abs().max() > 0.1


def test_a_text_of_many_chunks_is_encoded_by_parts(
    encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
):
    whole = encoders.encode("red apple BREAK blue cup BREAK a cat")
    monkeypatch.setattr("alphalayer.engine.text.encoders.CHUNKS_AT_ONCE", 2)
    encoders.forget()
    parts = encoders.encode("red apple BREAK blue cup BREAK a cat")
    torch.testing.assert_close(parts.context, whole.context, **SAME)
    torch.testing.assert_close(parts.pooled, whole.pooled, **SAME)


def test_an_empty_prompt_is_one_chunk_of_padding(encoders: TextEncoders, models):
    hidden_l, hidden_g, _ = _raw(models, _framed([]))
    torch.testing.assert_close(
        encoders.encode("").context[0], torch.cat([hidden_l, hidden_g], dim=-1), **SAME
    )


def test_everything_after_an_end_token_in_the_prompt_is_padding_to_encoder_2(
    encoders: TextEncoders, models
):
    row_l = [START, 550, END, 3055, END, *[END] * 72]
    row_g = [START, 550, END, *[0] * 74]
    hidden_l, hidden_g, _ = _raw(models, [row_l, row_g])
    ours = encoders.encode("an <|endoftext|> apple").context[0]
    torch.testing.assert_close(ours, torch.cat([hidden_l, hidden_g], dim=-1), **SAME)


# --- learned words


@pytest.fixture(scope="module")
def learned() -> TextualInversion:
    generator = torch.Generator().manual_seed(2)
    return TextualInversion(
        "glowstyle",
        torch.randn(2, tiny_models.WIDTH_L, generator=generator),
        torch.randn(2, tiny_models.WIDTH_G, generator=generator),
    )


def test_a_learned_word_takes_the_place_of_its_vectors(
    tokenizers, models, learned: TextualInversion
):
    """Against models whose embedding tables were overwritten at two unused tokens."""
    spare = [40_000, 40_001]
    changed = [copy.deepcopy(model) for model in models]
    for model, vectors in zip(changed, (learned.clip_l, learned.clip_g), strict=True):
        model.get_input_embeddings().weight.data[spare] = vectors
    hidden_l, hidden_g, pooled = _raw(changed, _framed([550, *spare, 3055]))
    ours = TextEncoders(*tokenizers, *models, {"glowstyle": learned}).encode("an glowstyle apple")
    torch.testing.assert_close(ours.context[0], torch.cat([hidden_l, hidden_g], dim=-1), **SAME)
    torch.testing.assert_close(ours.pooled[0], pooled, **SAME)


def test_learned_words_leave_other_prompts_and_the_model_alone(
    tokenizers, models, encoders, learned: TextualInversion
):
    taught = TextEncoders(*tokenizers, *models, {"glowstyle": learned})
    taught.encode("an glowstyle apple")
    torch.testing.assert_close(
        taught.encode("an apple").context, encoders.encode("an apple").context, **SAME
    )


def test_a_learned_word_of_another_width_is_left_out(tokenizers, models, encoders):
    other = TextualInversion("glowstyle", torch.zeros(1, 7), torch.zeros(1, 9))
    taught = TextEncoders(*tokenizers, *models, {"glowstyle": other})
    torch.testing.assert_close(
        taught.encode("glowstyle").context, encoders.encode("glowstyle").context, **SAME
    )


def test_a_learned_word_without_a_name_is_in_no_prompt(
    tokenizers, models, encoders, learned: TextualInversion
):
    taught = TextEncoders(*tokenizers, *models, {"\u200b": learned})
    torch.testing.assert_close(
        taught.encode("an apple").context, encoders.encode("an apple").context, **SAME
    )


def test_what_is_remembered_fits_into_its_room(tokenizers, models, monkeypatch: pytest.MonkeyPatch):
    taught = TextEncoders(*tokenizers, *models)
    calls: list[int] = []
    models[0].register_forward_pre_hook(lambda *_: calls.append(1))
    one = taught.encode("an apple").nbytes
    assert one == (77 * (tiny_models.WIDTH_L + tiny_models.WIDTH_G) + tiny_models.WIDTH_G) * 4
    monkeypatch.setattr("alphalayer.engine.text.encoders.CACHE_BYTES", 2 * one)
    texts = ["an apple", "a pear", "an apple", "a plum", "an apple", "a pear"]
    for text in texts:
        taught.encode(text)
    # the pear was the one to go when the plum came
    assert len(calls) == 4
    # what is larger than the room is encoded each time, and as it should be
    long = " BREAK ".join(["a cat"] * 3)
    assert torch.equal(taught.encode(long).context, taught.encode(long).context)
    assert len(calls) == 6
    taught.forget()
    taught.encode(long)
    assert len(calls) == 7


def test_embedding_files_are_read_and_others_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "deep").mkdir()
    save_file(
        {"clip_l": torch.ones(2, 3).half(), "clip_g": torch.ones(2, 5).half()},
        tmp_path / "deep" / "good.safetensors",
    )
    save_file({"emb_params": torch.ones(2, 3)}, tmp_path / "sd15.safetensors")
    save_file(
        {"clip_l": torch.ones(2, 3), "clip_g": torch.ones(1, 5)}, tmp_path / "uneven.safetensors"
    )
    save_file({"clip_l": torch.ones(3), "clip_g": torch.ones(5)}, tmp_path / "single.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    found = read_embeddings(tmp_path)
    assert list(found) == ["good", "single"]
    assert found["single"].clip_l.shape == (1, 3)
    assert found["good"].clip_g.dtype == torch.float32
    assert all(name in caplog.text for name in ("sd15", "uneven", "broken"))
    assert read_embeddings(tmp_path / "absent") == {}


# --- plans over the steps


def _said(plan, step: int, encoders: TextEncoders, texts: list[str]) -> str:
    """Which of these texts a plan of one part shows at a step."""
    ((conditioning, weight),) = plan.at(step)
    assert weight == 1.0
    (text,) = [
        text for text in texts if torch.equal(encoders.encode(text).context, conditioning.context)
    ]
    return text


def test_an_empty_negative_prompt_is_zeros_and_a_space_is_not(encoders: TextEncoders):
    empty, space = (plan_negative(encoders, text, 20).at(0)[0][0] for text in ("", " "))
    assert empty.context.shape == (1, 77, tiny_models.WIDTH_L + tiny_models.WIDTH_G)
    assert not empty.context.any()
    assert not empty.pooled.any()
    assert space.context.any()
    torch.testing.assert_close(space.context, encoders.encode("").context, **SAME)


def test_a_plan_changes_its_text_where_the_schedule_says(encoders: TextEncoders):
    plan = plan_prompt(encoders, "a [red:blue:0.5] cup", 8)
    texts = ["a red cup", "a blue cup"]
    # a schedule's entry holds while the step counter, from 0 on, is not above its end
    assert [_said(plan, step, encoders, texts) for step in range(8)] == [texts[0]] * 5 + [
        texts[1]
    ] * 3


def test_alternation_takes_turns(encoders: TextEncoders):
    plan = plan_prompt(encoders, "[red|blue] cup", 5)
    texts = ["red cup", "blue cup"]
    # entries end at steps 1, 2, 3 ... of a counter that starts at 0, so the first one holds twice
    assert [texts.index(_said(plan, step, encoders, texts)) for step in range(5)] == [0, 0, 1, 0, 1]


def test_and_gives_several_conditionings_with_weights(encoders: TextEncoders):
    plan = plan_prompt(encoders, "a cup AND a plate:0.5", 4)
    (first, one), (second, half) = plan.at(3)
    assert (one, half) == (1.0, 0.5)
    torch.testing.assert_close(first.context, encoders.encode("a cup").context, **SAME)
    torch.testing.assert_close(second.context, encoders.encode("a plate").context, **SAME)


def test_each_text_of_a_plan_is_encoded_once(
    encoders: TextEncoders, models, monkeypatch: pytest.MonkeyPatch
):
    """Also where it is too long to be remembered."""
    monkeypatch.setattr("alphalayer.engine.text.encoders.CACHE_BYTES", 0)
    calls: list[int] = []
    handle = models[0].register_forward_pre_hook(lambda *_: calls.append(1))
    asked: list[int] = []
    plan = plan_prompt(
        encoders, "[red|blue] cup AND [red|blue] plate", 20, check=lambda: asked.append(len(calls))
    )
    handle.remove()
    assert len({id(each) for step in range(20) for each, _ in plan.at(step)}) == len(calls) == 4
    assert asked == [0, 1, 2, 3], "the job may be given up between any two"


@pytest.mark.parametrize(
    "prompt", ["BREAK " * 600 + "a", "[" + "|".join(map(str, range(61))) + "]" + " BREAK a" * 10]
)
def test_what_a_prompt_comes_to_over_the_steps_has_a_bound(encoders: TextEncoders, prompt: str):
    for plan, field in ((plan_prompt, "prompt"), (plan_negative, "negative_prompt")):
        with pytest.raises(InvalidRequest, match="600 chunks") as error:
            plan(encoders, prompt, 60)
        assert error.value.field == field


def test_and_is_text_in_a_negative_prompt(encoders: TextEncoders):
    ((conditioning, weight),) = plan_negative(encoders, "a cup AND a plate:0.5", 4).at(0)
    assert weight == 1.0
    torch.testing.assert_close(
        conditioning.context, encoders.encode("a cup AND a plate:0.5").context, **SAME
    )


def test_schedules_inside_weights_and_weights_inside_schedules(encoders: TextEncoders):
    plan = plan_prompt(encoders, "([red:(blue:1.4):2]:1.2) cup", 4)
    texts = ["(red:1.2) cup", "((blue:1.4):1.2) cup"]
    assert [_said(plan, step, encoders, texts) for step in (0, 3)] == texts
