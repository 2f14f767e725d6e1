"""The `parameters` text: the published order, read back unchanged, texts of other programs."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphalayer import __version__
from alphalayer.api.info import webui_info
from alphalayer.core.job import ImageRef, Job, JobResult, JobSpec, JobState
from alphalayer.core.request import (
    GenerationOptions,
    GenerationRequest,
    ModelDefaults,
    parse_request,
)
from alphalayer.images.infotext import complete, read_parameters, write_parameters

REQUEST = GenerationRequest(prompt="an apple, high quality", seed=12345, subseed=7).resolve(
    ModelDefaults()
)


def test_write_parameters_follows_the_published_text():
    assert write_parameters(REQUEST, "juggernaut", "1fe6c7ec54", 12345) == (
        "an apple, high quality\n"
        "Negative prompt: bad, ugly\n"
        "Steps: 20, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 5, Seed: 12345, "
        "Size: 1024x1024, Model hash: 1fe6c7ec54, Model: juggernaut, RNG: NV, "
        "layerdiffusion_enabled: True, layerdiffusion_method: (SDXL) Only Generate Transparent "
        "Image (Attention Injection), layerdiffusion_weight: 1, layerdiffusion_ending_step: 1, "
        "layerdiffusion_fg_image: False, layerdiffusion_bg_image: False, "
        "layerdiffusion_blend_image: False, layerdiffusion_resize_mode: Crop and Resize, "
        "layerdiffusion_fg_additional_prompt: , layerdiffusion_bg_additional_prompt: , "
        f"layerdiffusion_blend_additional_prompt: , Version: alphalayer-{__version__}"
    )


def test_write_parameters_leaves_unused_settings_out():
    request = REQUEST.model_copy(
        update={"negative_prompt": "", "noise": "gpu", "mode": "opaque", "cfg_scale": 7.25}
    )
    text = write_parameters(request, "m", "", 1)
    assert "Negative prompt" not in text
    assert all(
        word not in text
        for word in ("RNG", "layerdiffusion", "Variation", "Clip skip", "Model hash")
    )
    assert "CFG scale: 7.25," in text


def test_write_parameters_includes_used_settings():
    request = REQUEST.model_copy(update={"subseed_strength": 0.25, "clip_skip": 3, "noise": "cpu"})
    parameters = read_parameters(write_parameters(request, "m", "", 5, 99))
    assert parameters["Variation seed"] == "99"
    assert parameters["Variation seed strength"] == "0.25"
    assert parameters["Clip skip"] == "3"
    assert parameters["RNG"] == "CPU"


@pytest.mark.parametrize(
    ("options", "pair"),
    [
        ({"noise_seed_delta": 31337}, ("ENSD", "31337")),
        ({"emphasis": "No norm"}, ("Emphasis", "No norm")),
        ({"eta": 0}, ("Eta", "0")),
        ({"min_uncond": 2}, ("NGMS", "2")),
        ({"crop_top": 8}, ("SDXL crop top", "8")),
        ({"crop_left": 8}, ("SDXL crop left", "8")),
    ],
)
def test_write_parameters_includes_options(options: dict[str, Any], pair: tuple[str, str]):
    plain = read_parameters(write_parameters(REQUEST, "m", "", 5))
    request = REQUEST.model_copy(update={"options": GenerationOptions(**options)})
    parameters = read_parameters(write_parameters(request, "m", "", 5))
    assert [item for item in parameters.items() if item not in plain.items()] == [pair]


def test_complete_adds_what_automatic1111_adds():
    parameters = read_parameters(write_parameters(REQUEST, "m", "", 5))
    completed = complete(parameters)
    assert completed.items() >= parameters.items()
    assert (completed["Size-1"], completed["Size-2"], completed["RNG"]) == ("1024", "1024", "NV")
    assert (completed["Clip skip"], completed["Schedule min sigma"]) == ("1", 0)
    assert "Size-1" not in complete({"Prompt": "x", "Negative prompt": ""})


# text as prompts hold it: "\n" is the only line end, and no space is around it
TEXT = st.text(
    st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"]) | st.sampled_from("\n,:()"),
    max_size=60,
).map(str.strip)


@settings(max_examples=200, deadline=None)
@given(TEXT.filter(bool), TEXT, TEXT.filter(lambda name: '"' not in name))
def test_read_parameters_returns_what_was_written(prompt: str, negative: str, model: str):
    request = REQUEST.model_copy(update={"prompt": prompt, "negative_prompt": negative})
    parameters = read_parameters(write_parameters(request, model, "abc", 3))
    assert parameters["Prompt"] == prompt
    assert parameters["Negative prompt"] == negative
    assert parameters["Model"] == model.strip()
    assert (parameters["Steps"], parameters["Seed"], parameters["Size"]) == ("20", "3", "1024x1024")


def test_read_parameters_negative_prompt_inside_a_line_is_text():
    request = REQUEST.model_copy(
        update={"prompt": "a sign: Negative prompt: none", "negative_prompt": "x"}
    )
    parameters = read_parameters(write_parameters(request, "m", "", 3))
    assert (parameters["Prompt"], parameters["Negative prompt"]) == (
        "a sign: Negative prompt: none",
        "x",
    )


def test_read_parameters_reads_the_published_example():
    parameters = read_parameters(
        "an apple, high quality\nNegative prompt: bad, ugly\n"
        "Steps: 20, Sampler: DPM++ 2M SDE Karras, CFG scale: 5, Seed: 12345, Size: 1024x1024, "
        "Model hash: 1fe6c7ec54, Model: juggernautXL_version6Rundiffusion, "
        "layerdiffusion_enabled: True, layerdiffusion_method: Only Generate Transparent Image "
        "(Attention Injection), layerdiffusion_weight: 1, layerdiffusion_fg_additional_prompt: , "
        'Lora hashes: "a: 1, b: 2", Version: f0.0.17v1.8.0rc-latest-269-gef35383b'
    )
    assert parameters["Prompt"] == "an apple, high quality"
    assert parameters["Negative prompt"] == "bad, ugly"
    assert parameters["Sampler"] == "DPM++ 2M SDE Karras"
    assert parameters["Model"] == "juggernautXL_version6Rundiffusion"
    assert parameters["layerdiffusion_fg_additional_prompt"] == ""
    assert parameters["Lora hashes"] == "a: 1, b: 2"
    assert parameters["Version"] == "f0.0.17v1.8.0rc-latest-269-gef35383b"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"strength": 0.3}, {"Denoising strength": "0.3"}),
        (
            {"masked": True, "mask_blur": 8, "mask_fill": "latent nothing"},
            {
                "Denoising strength": "0.75",
                "Mask blur": "8",
                "Masked content": "latent nothing",
            },
        ),
        (
            {"masked": True, "masked_only": True, "mask_padding": 0},
            {
                "Denoising strength": "0.75",
                "Mask blur": "4",
                "Inpaint area": "Only masked",
                "Masked area padding": "0",
            },
        ),
    ],
)
def test_infotext_of_a_changed_image_has_strength_and_mask(
    fields: dict[str, Any], expected: dict[str, str]
):
    roles = ["init", *(["mask"] if fields.pop("masked", False) else [])]
    inputs = [{"role": role, "file_name": f"input_{'0' * 64}.png"} for role in roles]
    request = parse_request({"prompt": "an apple", "inputs": inputs, **fields})
    text = write_parameters(request.resolve(ModelDefaults()), "m", "", 1)
    names = ("Denoising", "Mask", "Inpaint")
    pairs = {key: value for key, value in read_parameters(text).items() if key.startswith(names)}
    assert pairs == expected
    assert not any(name in write_parameters(REQUEST, "m", "", 1) for name in names)


@pytest.mark.parametrize("text", ["just a prompt", "one\ntwo: three", "", "a\nNegative prompt: b"])
def test_read_parameters_text_without_pairs_is_the_prompt(text: str):
    parameters = read_parameters(text)
    assert set(parameters) == {"Prompt", "Negative prompt"}
    assert parameters["Prompt"] + parameters["Negative prompt"] == text.replace(
        "\nNegative prompt: ", ""
    )


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=120))
def test_read_parameters_reads_any_text(text: str):
    assert "Prompt" in read_parameters(text)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(
                st.characters(
                    blacklist_characters="<>:#\n\r", blacklist_categories=["Cs", "Cc", "Zl", "Zp"]
                ),
                min_size=1,
                max_size=40,
            )
            .map(str.strip)
            .filter(bool),
            st.floats(-4, 4).map(lambda weight: round(weight, 3)),
        ),
        max_size=4,
    ),
    st.sampled_from(["official", "forge2"]),
)
def test_read_parameters_returns_loras_and_decoding(loras: list[tuple[str, float]], decode: str):
    fields = [{"name": name, "weight": weight} for name, weight in loras]
    request = parse_request({"prompt": "a cat", "loras": fields, "decode": decode}).resolve(
        ModelDefaults()
    )
    parameters = read_parameters(write_parameters(request, "m", "", 1))
    again = parse_request({"prompt": parameters["Prompt"]})
    assert (again.prompt, again.loras) == (request.prompt, request.loras)
    assert parameters.get("layerdiffusion_decode", "official") == decode


# the same grammar with a pattern that takes the square of a line's length
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_LINE = st.lists(
    st.sampled_from(["a", "Seed", " ", "-", "/", ":", ": ", ",", ", ", '"', "\\", "1", "(", "é"]),
    max_size=40,
)


@settings(max_examples=500, deadline=None)
@given(_LINE.map("".join))
def test_read_parameters_pairs_equal_those_of_a_pattern(line: str):
    parameters = read_parameters("x\n" + line)
    expected = [match[1] for match in _PAIR.finditer(("x\n" + line).strip().split("\n")[-1])]
    assert [key for key in parameters if key not in ("Prompt", "Negative prompt")] == (
        list(dict.fromkeys(expected)) if len(set(expected)) >= 3 else []
    )


@pytest.mark.parametrize(
    "line", ["a" * 40_000, "a " * 20_000, " " * 40_000 + "x", 'aa:"' * 10_000, "a" * 16_000_000]
)
def test_read_parameters_time_is_linear_in_the_length(line: str):
    """Read 40,000 characters, which would take most of a minute in quadratic time."""
    start = time.process_time()
    read_parameters("x\n" + line + ";")
    assert time.process_time() - start < 2


def test_webui_info_has_the_published_keys_in_order():
    generation = GenerationRequest(prompt=REQUEST.prompt, seed=12345, subseed=7, batch_size=2)
    refs = [
        ImageRef(
            key=f"{i}.png", seed=12345 + i, subseed=7 + i, width=1024, height=1024, size_bytes=1
        )
        for i in range(2)
    ]
    result = JobResult(
        images=tuple(refs), settings=REQUEST.settings, model_name="m", model_hash="abc"
    )
    job = Job.new(JobSpec(generation=generation)).model_copy(
        update={"state": JobState.DONE, "result": result}
    )
    info = webui_info(job)
    assert (
        list(info)
        == (
            "prompt all_prompts negative_prompt all_negative_prompts seed all_seeds subseed "
            "all_subseeds subseed_strength width height sampler_name cfg_scale steps batch_size "
            "restore_faces face_restoration_model sd_model_name sd_model_hash sd_vae_name "
            "sd_vae_hash seed_resize_from_w seed_resize_from_h denoising_strength "
            "extra_generation_params index_of_first_image infotexts styles job_timestamp clip_skip "
            "is_using_inpainting_conditioning version"
        ).split()
    )
    assert info["all_seeds"] == [12345, 12346]
    assert info["all_prompts"] == ["an apple, high quality"] * 2
    assert info["infotexts"] == [
        write_parameters(REQUEST, "m", "abc", 12345 + i, 7 + i) for i in range(2)
    ]
    assert info["extra_generation_params"]["layerdiffusion_weight"] == 1.0
    assert "warnings" not in info
    warned = result.model_copy(update={"warnings": ("x is ignored.",)})
    info = webui_info(job.model_copy(update={"result": warned}))
    assert (list(info)[-1], info["warnings"]) == ("warnings", ["x is ignored."])
    assert list(info["extra_generation_params"])[-1] == "Schedule type"


@pytest.mark.parametrize(("sampler", "name"), [("Euler a", "Eta"), ("DDIM", "Eta DDIM")])
def test_write_parameters_has_eta_only_where_it_is_used(sampler: str, name: str):
    options = {"options": GenerationOptions(eta=0.5), "sampler": sampler}
    assert read_parameters(text_of(**options))[name] == "0.5"
    assert "Eta" not in text_of(**options | {"sampler": "Euler"})


def test_write_parameters_has_all_digits_of_numbers():
    parameters = read_parameters(text_of(cfg_scale=7.1234567, layerdiffuse_weight=0.30000004))
    assert parameters["CFG scale"] == "7.1234567"
    assert parameters["layerdiffusion_weight"] == "0.30000004"


def text_of(**values: Any) -> str:
    return write_parameters(REQUEST.model_copy(update=values), "m", "", 1)
