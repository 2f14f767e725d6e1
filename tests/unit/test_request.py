"""Requests: values that are accepted, and errors in one line that name the field."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphalayer.catalog import EMBEDDED_MODEL, model_defaults
from alphalayer.core.cost import DECODE_STEPS, LORA_UNITS, PASTE_STEPS, UNIT_PIXELS, image_cost
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import JobSpec
from alphalayer.core.modes import InputRole
from alphalayer.core.prompts import Lora
from alphalayer.core.request import (
    MAX_SEED,
    GenerationRequest,
    ImageInput,
    ModelDefaults,
    RequestFields,
    parse_request,
)
from alphalayer.core.samplers import SAMPLERS, SCHEDULERS, split_sampler_name
from alphalayer.core.values import parse_as

BAD: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("prompt", " \n\t"),
    ("prompt", "x" * 100_000),
    ("prompt", "a cat AND " * 8 + "a dog"),
    ("prompt", None),
    ("prompt", 5),
    ("negative_prompt", "x" * 100_000),
    ("width", -64),
    ("width", 0),
    ("width", 63),
    ("width", 2049),
    ("height", 10**12),
    ("height", 64.5),
    ("height", math.nan),
    ("width", "wide"),
    ("steps", 0),
    ("steps", -5),
    ("steps", 151),
    ("steps", math.inf),
    ("cfg_scale", math.nan),
    ("cfg_scale", math.inf),
    ("cfg_scale", -math.inf),
    ("cfg_scale", -0.01),
    ("cfg_scale", 31),
    ("seed", -2),
    ("seed", 2**63),
    ("seed", math.nan),
    ("subseed", -2),
    ("subseed_strength", math.nan),
    ("subseed_strength", 1.01),
    ("batch_size", 0),
    ("batch_size", 9),
    ("clip_skip", 0),
    ("sampler", "Bogus"),
    ("scheduler", "Bogus"),
    ("noise", "dice"),
    ("decode", "forge3"),
    ("model", "x" * 501),
    ("layerdiffuse_weight", 2.1),
    ("layerdiffuse_weight", math.nan),
    ("layerdiffuse_stop_at", -0.1),
    ("mode", "magic"),
    ("loras.0.weight", math.nan),
    ("loras.0.name", ""),
    ("unknown_field", 1),
]


def _fields(name: str, value: Any) -> dict[str, Any]:
    first, *rest = name.split(".")
    if first == "loras":
        value = [{"name": "x", rest[1]: value}]
    return {"prompt": "an apple", first: value}


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:20])
def test_request_bad_value_is_refused_in_a_line_with_its_field(name: str, value: Any):
    with pytest.raises(InvalidRequest) as error:
        parse_request(_fields(name, value))
    assert error.value.field == name
    line = str(error.value)
    assert line.startswith(f"{name}: ")
    assert "\n" not in line
    assert len(line) < 400


def test_request_unknown_sampler_lists_the_samplers():
    with pytest.raises(InvalidRequest, match=r"DPM\+\+ 2M SDE.*Euler a"):
        parse_request({"prompt": "x", "sampler": "Bogus"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 64), ("width", 2048), ("height", 1000), ("steps", 1), ("steps", 150),
        ("cfg_scale", 0), ("cfg_scale", 30), ("seed", 0), ("seed", MAX_SEED), ("batch_size", 8),
        ("subseed_strength", 1), ("prompt", "x" * 10_000), ("prompt", "a cat AND " * 7 + "SAND"),
        ("negative_prompt", "AND " * 99), ("negative_prompt", ""),
        ("layerdiffuse_weight", 0), ("layerdiffuse_stop_at", 0), ("loras.0.weight", -100),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_request_values_at_the_limits_are_accepted(name: str, value: Any):
    parse_request(_fields(name, value))


@pytest.mark.parametrize(("name", "known"), [("sampler", SAMPLERS), ("scheduler", SCHEDULERS)])
def test_request_names_are_accepted_in_any_case(name: str, known: tuple[str, ...]):
    for value in known:
        assert getattr(parse_request({"prompt": "x", name: value.upper()}), name) == value


def test_resolve_fills_missing_fields_from_the_model_only():
    defaults = ModelDefaults(
        width=256, height=512, steps=8, sampler="Euler", scheduler="Simple", cfg_scale=3
    )
    resolved = GenerationRequest(prompt="x", steps=30).resolve(defaults)
    assert (resolved.width, resolved.height, resolved.steps) == (256, 512, 30)
    assert (resolved.sampler, resolved.scheduler, resolved.cfg_scale) == ("Euler", "Simple", 3)
    assert resolved.seed == 12345
    assert resolved.resolve(ModelDefaults()) == resolved


def test_automatic_decode_is_that_of_the_model():
    request = GenerationRequest(prompt="x", decode="auto")
    assert request.resolve(ModelDefaults()).decode == "forge2"
    assert request.resolve(model_defaults(EMBEDDED_MODEL)).decode == "official"
    official = GenerationRequest(prompt="x", decode="official")
    assert official.resolve(ModelDefaults()).decode == "official"


def test_resolve_random_seeds_are_in_the_published_range():
    resolved = [
        GenerationRequest(prompt="x", seed=-1, subseed=-1).resolve(ModelDefaults())
        for _ in range(50)
    ]
    seeds = [seed for request in resolved for seed in (request.seed, request.subseed)]
    assert all(0 <= seed < 4294967294 for seed in seeds)
    assert len(set(seeds)) == 100


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DPM++ 2M SDE Karras", ("DPM++ 2M SDE", "Karras")),
        ("Euler a sgm uniform", ("Euler a", "SGM Uniform")),
        ("Euler a", ("Euler a", None)),
        ("Euler sgm_uniform", ("Euler", "SGM Uniform")),
        ("Euler Align Your Steps 32", ("Euler", "Align Your Steps 32")),
        ("DDIM", ("DDIM", None)),
        ("Euler DDIM", ("Euler", "DDIM")),
        ("DPM++ 2M SDE Automatic", ("DPM++ 2M SDE", "Exponential")),
        ("Euler Automatic", ("Euler", "Normal")),
        ("Karras", ("Karras", None)),
        ("Magic", ("Magic", None)),
        (None, (None, None)),
    ],
)
def test_split_sampler_name_returns_sampler_and_schedule(
    name: str | None, expected: tuple[str | None, str | None]
):
    assert split_sampler_name(name) == expected


@pytest.mark.parametrize(
    ("name", "scheduler", "expected"),
    [
        ("DPM++ 2M SDE Karras", "Automatic", ("DPM++ 2M SDE", "Exponential")),
        ("DPM++ 2M SDE Karras", "Exponential", ("DPM++ 2M SDE", "Exponential")),
        ("DPM++ 2M SDE Karras", "", ("DPM++ 2M SDE", "Karras")),
        ("Euler", "align_your_steps_GITS", ("Euler", "Align Your Steps GITS")),
        ("dpm++ 2m sde", "automatic", ("dpm++ 2m sde", "Exponential")),
        ("Euler", "sgm_uniform", ("Euler", "SGM Uniform")),
        ("Euler", "Magic", ("Euler", "Magic")),
        (None, "Automatic", (None, None)),
        (None, "beta", (None, "Beta")),
    ],
)
def test_split_sampler_name_prefers_the_scheduler(
    name: str | None, scheduler: str, expected: tuple[str | None, str | None]
):
    assert split_sampler_name(name, scheduler) == expected


def test_request_loras_of_the_prompt_join_the_field():
    request = parse_request(
        {
            "prompt": "<lora:first one> a red <lora:sub/x:0.8>apple (ripe:1.2) <lyco:y:-1>",
            "negative_prompt": "<lora:z:1>",
            "loras": [{"name": "w", "weight": 0.5}],
        }
    )
    assert request.prompt == "a red apple (ripe:1.2)"
    assert request.negative_prompt == "<lora:z:1>"
    assert request.loras == (
        Lora(name="w", weight=0.5),
        Lora(name="first one"),
        Lora(name="sub/x", weight=0.8),
        Lora(name="y", weight=-1),
    )
    # a journal keeps it as JSON, unchanged
    assert GenerationRequest.model_validate_json(request.model_dump_json()) == request


def test_batch_key_is_equal_for_other_input_images():
    inputs = [[{"role": "foreground", "file_name": f"input_{digit * 64}.png"}] for digit in "ab"]
    fields = {"prompt": "a table", "mode": "fg2ble"}
    first = parse_request({**fields, "inputs": inputs[0]})
    second = parse_request({**fields, "inputs": inputs[1], "resize_mode": "Resize and Fill"})
    assert first.batch_key == second.batch_key
    opaque = parse_request({"prompt": "a table", "mode": "opaque"})
    assert opaque.batch_key != first.batch_key


def test_batch_key_differs_for_other_loras():
    keys = {
        parse_request({"prompt": f"a cat {tag}"}).batch_key
        for tag in ("", "<lora:x>", "<lora:x:0.5>", "<lora:x:1>")
    }
    assert len(keys) == 3


@pytest.mark.parametrize(
    "tag", [":", ":1", " :1", "x:much", "x:nan", "x:inf", "x:101", "x:1:much", "x:te=much"]
)
def test_request_invalid_lora_tag_is_refused_and_named(tag: str):
    with pytest.raises(InvalidRequest) as error:
        parse_request({"prompt": f"a cat <lora:{tag}>"})
    assert error.value.field == "prompt"
    assert f"<lora:{tag}>" in error.value.message


def test_request_too_many_loras_or_loras_alone_are_refused():
    with pytest.raises(InvalidRequest, match=r"prompt: .*16"):
        parse_request({"prompt": "a cat" + "<lora:x>" * 17})
    with pytest.raises(InvalidRequest, match="prompt: empty"):
        parse_request({"prompt": "<lora:x>"})


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<lora:x>", "<lo", "<lora:", "ra:y:1>", ">", "<", "A", "ND", " AND ", " ", "\x1c", "é"]
        ),
        max_size=40,
    )
)
def test_request_accepted_prompt_is_valid_again(parts: list[str]):
    """A journal and an engine process validate a job once more."""
    for accept in (
        lambda: GenerationRequest.of(parse_as(RequestFields, {"prompt": "".join(parts)})),
        lambda: parse_request({"prompt": "".join(parts)}),
    ):
        with contextlib.suppress(InvalidRequest):
            request = accept()
            assert GenerationRequest.model_validate_json(request.model_dump_json()) == request


def test_request_and_that_a_tag_hid_is_counted():
    with pytest.raises(InvalidRequest, match="prompt: got 10 parts"):
        parse_request({"prompt": "a A<lora:x>ND b " * 9})


LORA_TAGS = {
    "x": Lora(name="x"),
    "x:": Lora(name="x"),
    "x:8.5": Lora(name="x", weight=8.5),
    "x:0.5:0.25": Lora(name="x", weight=0.25, text_weight=0.5),
    "x:0.5:0.5": Lora(name="x", weight=0.5),
    "x:te=0": Lora(name="x", weight=0),
    "x:1:unet=0.25": Lora(name="x", weight=0.25, text_weight=1),
    "x:te=0:unet=-100": Lora(name="x", weight=-100, text_weight=0),
    "epoch=5:0.5": Lora(name="epoch=5", weight=0.5),
}


@pytest.mark.parametrize("tag", LORA_TAGS)
def test_request_lora_tag_of_any_form_is_read(tag: str):
    request = parse_request({"prompt": f"a cat <lora:{tag}>"})
    assert request.loras == (LORA_TAGS[tag],)
    assert request.warnings == ()
    assert parse_request({"prompt": request.tagged_prompt}).loras == request.loras


def test_request_other_tags_are_left_out_with_a_warning():
    prompt = "a <hypernet:x:1>cat <LORA:y:1> <lora:z:1:1:64:lbw=OUT> < b:c> <d> <:e> <lora:>"
    request = parse_request({"prompt": prompt, "warnings": ["first."]})
    assert request.prompt == "a cat   < b:c> <d> <:e> <lora:>"
    assert request.loras == (Lora(name="z"),)
    assert request.warnings == (
        "first.",
        "prompt: ignored <hypernet:x:1>, <LORA:y:1>, 64, lbw=OUT.",
    )


def test_request_layer_prompts_are_read_without_tags():
    request = parse_request(
        {
            "prompt": "a cat",
            "foreground_prompt": " glass # comment",
            "background_prompt": "a <lora:x:1>sea AND <d:1>sand",
        }
    )
    assert request.foreground_prompt == "glass"
    assert request.background_prompt == "a sea and sand"
    assert request.loras == ()
    assert request.warnings == ("background_prompt: ignored <lora:x:1>, <d:1>.",)


def test_batch_key_is_equal_for_other_layer_prompts():
    first, second = (
        parse_request({"prompt": "a", "blended_prompt": text}).batch_key for text in ("b", "c")
    )
    assert first == second


def test_request_batch_of_no_whole_set_is_refused():
    body = parse_as(RequestFields, {"prompt": "a", "batch_size": 4})
    with pytest.raises(InvalidRequest, match="got a batch_size of 4; use one of 3, 6") as error:
        GenerationRequest.of(body, mode="sd15_joint")
    assert error.value.field == "batch_size"
    with pytest.raises(InvalidRequest, match="use one of 3, 6"):
        parse_request({"prompt": "a", "batch_size": 4, "mode": "sd15_joint"})
    assert parse_request({"prompt": "a", "batch_size": 6, "mode": "sd15_joint"}).batch_size == 6


def test_layer_prompts_precede_the_prompt_of_their_layer():
    fields = {"prompt": "a cat", "background_prompt": "sea", "batch_size": 6}
    joint = parse_request({**fields, "mode": "sd15_joint"})
    assert joint.layer_prompts == ("a cat", "sea, a cat", "a cat")
    alone = parse_request({**fields, "mode": "sd15_attention"})
    assert alone.layer_prompts == ("a cat",)


def test_batch_key_differs_for_input_images_of_shared_attention():
    def key(mode: str, digit: str) -> str:
        image = {"role": "foreground", "file_name": f"input_{digit * 64}.png"}
        fields = {"prompt": "a", "mode": mode, "inputs": [image], "batch_size": 2}
        return parse_request(fields).batch_key

    assert key("sd15_fg2bg", "1") != key("sd15_fg2bg", "2")
    assert key("fg2ble", "1") == key("fg2ble", "2")


def test_cost_counts_the_longest_prompt_of_a_set():
    fields = {"prompt": "a", "batch_size": 3, "blended_prompt": "word " * 500}
    joint, other = (
        image_cost(parse_request({**fields, "mode": mode})) for mode in ("sd15_joint", "opaque")
    )
    assert joint.pixels == other.pixels
    assert joint.prompt > other.prompt


COMMENTS = {
    "a red apple # not this": "a red apple",
    "a #1 apple": "a",
    "a # one\nb # two\n# three\nc": "a \nb \nc",
    "a <lora:x:1># <lora:y:broken>": "a",
    "  a  ": "a",
    "a &#39; b": "a &",
}


@pytest.mark.parametrize("prompt", COMMENTS)
def test_request_comments_are_removed(prompt: str):
    accepted = [
        parse_request({"prompt": prompt, "negative_prompt": prompt}),
        GenerationRequest.of(
            parse_as(RequestFields, {"prompt": prompt, "negative_prompt": prompt})
        ),
    ]
    for request in accepted:
        assert request.prompt == COMMENTS[prompt]
        assert request.negative_prompt.replace("<lora:x:1>", "").strip() == COMMENTS[prompt]
        assert all(lora.name == "x" for lora in request.loras)
        # a stored request is not read again
        stored = request.model_copy(update={"prompt": prompt}).model_dump_json()
        assert GenerationRequest.model_validate_json(stored).prompt == prompt


def test_request_comments_may_be_text():
    fields = {"prompt": " a #1 apple ", "negative_prompt": " "}
    for request in (
        parse_request(fields, comments=False),
        GenerationRequest.of(parse_as(RequestFields, fields), comments=False),
    ):
        assert (request.prompt, request.negative_prompt) == ("a #1 apple", "")


def test_request_of_a_comment_alone_is_empty():
    for accept in (
        lambda: GenerationRequest.of(parse_as(RequestFields, {"prompt": "# a"})),
        lambda: parse_request({"prompt": "# a"}),
        lambda: parse_request({"prompt": " "}),
    ):
        with pytest.raises(InvalidRequest) as error:
            accept()
        assert str(error.value) == (
            'prompt: empty. Describe the image, for instance "an apple, high quality".'
        )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*GenerationRequest.model_fields]) | st.text(max_size=8), JSON, max_size=6
    )
)
def test_request_any_json_is_valid_or_names_a_field(fields: dict[str, Any]):
    refused: InvalidRequest | None = None
    try:
        assert parse_request(fields).prompt.strip()
    except InvalidRequest as error:
        refused = error
    assert refused is None or refused.field is not None


@pytest.mark.parametrize(
    ("sampler", "calls"), [("Heun", 10), ("DPM++ SDE", 10), ("DPM++ 2M SDE", 5), ("Euler", 5)]
)
def test_resolve_counts_the_calls_of_a_sampler(sampler: str, calls: int):
    request = parse_request({"prompt": "x", "sampler": sampler, "steps": 5})
    assert request.resolve(ModelDefaults()).calls == calls


def cost_of(iterations: int = 1, **fields: Any) -> float:
    request = parse_request({"prompt": "an apple", **fields})
    return JobSpec(generation=request, iterations=iterations).cost


def test_cost_grows_with_each_of_its_causes():
    one = cost_of()
    assert one == pytest.approx(30, abs=0.1)
    assert cost_of(batch_size=8, iterations=16) == pytest.approx(128 * one)
    assert cost_of(width=2048, height=2048) == pytest.approx(4 * one, rel=0.01)
    assert cost_of(sampler="Heun") - one == pytest.approx(20)
    assert cost_of(sampler="HeunPP2") - one == pytest.approx(40)
    assert cost_of(prompt="an apple AND a pear") - one == pytest.approx(10)
    long = "ein Äpfelchen, " * 100
    for field in ("prompt", "negative_prompt"):
        assert cost_of(**{field: long}) > 1.1 * one
    assert cost_of(prompt="[a|b]" + long) > cost_of(prompt="[a:b:9]" + long) > cost_of(prompt=long)


def input_image(role: InputRole, side: int = 0) -> ImageInput:
    return ImageInput(role=role, file_name=f"input_{'0' * 64}.png", width=side, height=side)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"strength": 0.01, "exact_steps": True, "inputs": ("init",)}, "strength"),
        ({"hires_scale": 2.0, "hires_strength": 0.01}, "hires_strength"),
        ({"strength": 0.01, "inputs": ("init",)}, None),
        ({"strength": 0.0, "exact_steps": True, "inputs": ("init",)}, None),
        ({"strength": 0.01, "exact_steps": True}, None),
        ({"strength": 0.01, "exact_steps": True, "inputs": ("init",), "steps": None}, None),
    ],
)
def test_strength_that_no_schedule_has_is_refused(fields: dict[str, Any], field: str | None):
    roles = fields.get("inputs", ())
    inputs = tuple(input_image(role) for role in roles)
    values = {"prompt": "x", "steps": 20, **fields, "inputs": inputs}
    body = GenerationRequest.model_construct(**values)
    if field is None:
        assert GenerationRequest.of(body).inputs == inputs
        return
    with pytest.raises(InvalidRequest, match="end of a schedule of 2,000; at most 1,000") as error:
        GenerationRequest.of(body)
    assert error.value.field == field
    with pytest.raises(ValueError, match="at most 1,000"):
        GenerationRequest.model_validate(values)


def test_cost_counts_the_input_images():
    def added(*inputs: ImageInput, mode: str = "attention", **fields: Any) -> float:
        plain = GenerationRequest(prompt="an apple", batch_size=2, **fields)
        whole = plain.model_copy(update={"inputs": inputs, "mode": mode, "strength": 1.0})
        one, other = (JobSpec(generation=request).cost for request in (plain, whole))
        return other - one

    init, latent = input_image("init"), {"init_resize_mode": "Latent"}
    assert added(init) == pytest.approx(10)
    assert added(init, **latent) == pytest.approx(40)
    assert added(input_image("init", 1024), width=64, height=64, **latent) == pytest.approx(15)
    assert added(input_image("init", 4096), width=64, height=64) == pytest.approx(80, abs=0.1)
    both = (input_image("foreground"), input_image("blended"))
    assert added(*both, mode="fgble2bg") == pytest.approx(10)
    assert added(*both, mode="fgble2bg", hires_scale=2) == pytest.approx(10 + 40)


def test_whole_image_around_a_region_counts():
    inputs = (input_image("init", 4096), input_image("mask"))
    request = GenerationRequest(prompt="x", width=64, height=64, batch_size=8, inputs=inputs)
    small, large = (
        JobSpec(generation=request.model_copy(update={"masked_only": region}), iterations=16)
        for region in (False, True)
    )
    assert (small.pixels, large.pixels) == (8 * 64 * 64, 8 * 4096 * 4096)
    assert large.cost - small.cost == pytest.approx(128 * 16 * PASTE_STEPS, rel=0.01)
    assert large.generation.largest_size == (64, 64)
    one = large.model_copy(
        update={
            "iterations": 1,
            "generation": large.generation.model_copy(update={"batch_size": 1}),
        }
    )
    with pytest.raises(InvalidRequest, match="16,777,216 pixels in all") as error:
        one.check_pixels(2**20)
    assert error.value.field == "inputs"


def test_cost_counts_loras_and_previews_once():
    one = cost_of(batch_size=8)
    assert cost_of(batch_size=8, loras=[{"name": "a"}] * 16) - one == pytest.approx(16 * LORA_UNITS)
    spec = JobSpec(generation=parse_request({"prompt": "an apple", "steps": 150}), iterations=16)
    previewed = spec.model_copy(update={"previews": True})
    preview = 256 * 256 / UNIT_PIXELS * DECODE_STEPS
    assert previewed.cost - spec.cost == pytest.approx(16 * 150 * preview)


@pytest.mark.parametrize(
    ("iterations", "fields", "field"),
    [
        (2, {"batch_size": 2}, "iterations"),
        (1, {"batch_size": 2}, "batch_size"),
        (1, {"steps": 40}, "steps"),
        (1, {"width": 1536}, "width"),
        (1, {"width": 64, "prompt": "BREAK " * 1600}, "prompt"),
        (1, {"width": 64, "negative_prompt": "BREAK " * 1600}, "negative_prompt"),
    ],
)
def test_check_cost_names_the_field_to_reduce(iterations: int, fields: dict[str, Any], field: str):
    spec = JobSpec(
        generation=parse_request({"prompt": "an apple", **fields}), iterations=iterations
    )
    spec.check_cost(0)
    spec.check_cost(spec.cost)
    with pytest.raises(InvalidRequest, match="megapixel-steps; at most 31") as error:
        spec.check_cost(31)
    assert error.value.field == field


def test_check_cost_of_the_longest_prompt_takes_no_time():
    start = time.process_time()
    for text in ("[" * 10_000, "BREAK " * 1600, "a|" * 5000, "\u00e9" * 5000):
        cost_of(prompt="a" + text[:-1], negative_prompt=text)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "foreground_prompt"])
def test_request_prompt_of_too_many_bytes_is_refused(field: str):
    parse_request({"prompt": "x", field: "\U0001f600" * 2500})
    with pytest.raises(InvalidRequest, match="got 40,000 bytes of UTF-8; at most 10,000") as error:
        parse_request({"prompt": "x", field: "\U0001f600" * 10_000})
    assert error.value.field == field
