"""The second pass in requests: sizes, cost, prompts, settings text and AUTOMATIC1111."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from alphalayer.api.a1111.schemas import Txt2ImgRequest
from alphalayer.api.a1111.settings import OverrideSettings
from alphalayer.api.native.fields import SpecContext
from alphalayer.api.native.txt2img import Txt2ImgRequest as NativeRequest
from alphalayer.core.cost import (
    DECODE_STEPS,
    ENCODE_STEPS,
    UPSCALER_RUNS,
    UPSCALER_STEPS,
    image_cost,
)
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.job import JobSpec
from alphalayer.core.request import GenerationRequest, ModelDefaults, parse_request
from alphalayer.engine.text.grammar import schedule_prompt
from alphalayer.images.infotext import complete, read_parameters, write_parameters

SERVICE: Any = SimpleNamespace(noise="nv", decode="official", prompt_comments=True)


def request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(prompt="an apple", **fields)


def translate(**fields: Any) -> GenerationRequest:
    """Return the request of an AUTOMATIC1111 body."""
    body = Txt2ImgRequest.model_validate({"prompt": "an apple", "enable_hr": True, **fields})
    return body.to_spec(SERVICE, OverrideSettings()).generation


# --- sizes


@pytest.mark.parametrize(
    ("fields", "enlarged", "final"),
    [
        ({}, (832, 1216), (832, 1216)),
        ({"hires_scale": 1.5}, (1248, 1824), (1248, 1824)),
        ({"hires_scale": 1.33}, (1106, 1617), (1106, 1617)),
        ({"hires_width": 1000}, (1000, 1461), (1000, 1461)),
        ({"hires_height": 1000}, (684, 1000), (684, 1000)),
        ({"hires_width": 1024, "hires_height": 1024}, (1024, 1496), (1024, 1024)),
        ({"hires_width": 832, "hires_height": 1824}, (1248, 1824), (832, 1824)),
        ({"hires_width": 832, "hires_height": 1216}, (832, 1216), (832, 1216)),
    ],
)
def test_sizes_follow_from_the_scale_or_the_sides(
    fields: dict[str, Any], enlarged: tuple[int, int], final: tuple[int, int]
):
    one = request(width=832, height=1216, **fields)
    assert (one.enlarged_size, one.final_size) == (enlarged, final)
    assert one.uses_hires == bool(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 2048, "hires_scale": 2.1},
        {"width": 2048, "height": 2048, "hires_scale": 2},
        {"width": 64, "height": 2048, "hires_width": 4096},
        {"hires_width": 10},
    ],
)
def test_too_large_or_small_second_pass_is_refused(fields: dict[str, Any]):
    with pytest.raises(InvalidRequest, match="the second pass has"):
        parse_request({"prompt": "an apple", **fields})
    body = {name: value for name, value in fields.items() if name in NativeRequest.model_fields}
    if "hires_scale" in body:
        with pytest.raises(InvalidRequest) as caught:
            NativeRequest(prompt="an apple", **body).to_spec(SpecContext("nv", "official"))
        assert caught.value.field == "hires_scale"


def test_pixels_and_cost_count_the_second_pass():
    one, both = (
        JobSpec(generation=request(width=512, height=512, steps=20, hires_scale=scale))
        for scale in (1, 2)
    )
    assert (one.pixels, both.pixels) == (512 * 512, 1024 * 1024)
    with pytest.raises(InvalidRequest, match="1,048,576 pixels in all") as caught:
        both.check_pixels(10**6)
    assert caught.value.field == "hires_scale"
    second = JobSpec(generation=request(width=1024, height=1024, steps=20))
    assert both.cost == pytest.approx(one.cost + second.cost)
    few = request(width=512, height=512, steps=20, hires_scale=2, hires_steps=5)
    heun = few.model_copy(update={"hires_sampler": "Heun"})
    assert image_cost(few).pixels == pytest.approx(one.cost - 0.02 + 5 + DECODE_STEPS, abs=0.05)
    assert image_cost(heun).pixels - image_cost(few).pixels == pytest.approx(5)


def test_pixels_are_those_of_the_larger_pass():
    sides = {"width": 2048, "height": 2048, "hires_width": 64, "hires_height": 64}
    spec = JobSpec(generation=request(batch_size=8, **sides))
    assert spec.pixels == 8 * 2048 * 2048
    with pytest.raises(InvalidRequest) as caught:
        JobSpec(generation=request(**sides)).check_pixels(10**6)
    assert caught.value.field == "width"
    with pytest.raises(InvalidRequest) as caught:
        JobSpec(generation=request(hires_width=2048)).check_pixels(10**6)
    assert caught.value.field == "hires_width"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"steps": 10, "hires_steps": 100}, "hires_steps"),
        ({"hires_steps": 100}, "hires_steps"),
        ({"steps": 100, "hires_steps": 10}, "steps"),
        ({"hires_prompt": "[a|b]" * 1600}, "hires_prompt"),
        ({"hires_negative_prompt": "[a|b]" * 1600}, "hires_negative_prompt"),
    ],
)
def test_refused_cost_names_the_field_of_the_second_pass(fields: dict[str, Any], field: str):
    with pytest.raises(InvalidRequest) as caught:
        JobSpec(generation=request(width=256, height=256, hires_scale=2, **fields)).check_cost(1)
    assert caught.value.field == field


def test_enlargement_of_images_costs():
    latent, resampled, network = (
        image_cost(request(hires_scale=1.5, hires_upscaler=name)).pixels
        for name in ("Latent", "Lanczos", "4x-Sharp")
    )
    megapixels = 1.5**2
    assert resampled - latent == pytest.approx(megapixels * ENCODE_STEPS)
    assert network - resampled == pytest.approx(megapixels * UPSCALER_STEPS * UPSCALER_RUNS)
    assert image_cost(request(hires_upscaler="4x-Sharp")) == image_cost(request())


def test_previews_of_both_passes_cost():
    plain, previewed = (
        JobSpec(generation=request(steps=20, hires_scale=2, hires_steps=10), previews=previews).cost
        for previews in (False, True)
    )
    assert previewed - plain == pytest.approx(30 * DECODE_STEPS / 16)


def test_requests_of_different_second_passes_are_no_batch():
    keys = {
        request(**fields).batch_key
        for fields in ({}, {"hires_scale": 2}, {"hires_scale": 2, "hires_steps": 3})
    }
    assert len(keys) == 3
    assert request(hires_steps=3, hires_upscaler="None").batch_key == request().batch_key
    free = {"hires_prompt": "a pear", "hires_negative_prompt": "blue", "hires_cfg_scale": 2}
    assert request(hires_scale=2, **free).batch_key == request(hires_scale=2).batch_key


# --- prompts


def test_tags_and_comments_of_the_second_prompt_are_read():
    read = parse_request(
        {
            "prompt": "an apple <lora:shiny:0.5>",
            "hires_prompt": "a pear <lora:shiny:0.5> <lora:other:1> # note",
            "hires_negative_prompt": "blue # note",
        }
    )
    assert (read.hires_prompt, read.hires_negative_prompt) == ("a pear", "blue")
    assert [lora.name for lora in read.loras] == ["shiny"]
    assert len(read.warnings) == 1
    assert "<lora:other:1>" in read.warnings[0]
    with pytest.raises(InvalidRequest) as caught:
        parse_request({"prompt": "an apple", "hires_prompt": " AND ".join("abcdefghi")})
    assert caught.value.field == "hires_prompt"


def test_wrong_tags_of_the_second_prompt_are_named():
    tags = "a pear <hypernet:soft:1> <lora:shiny:1:1:3>"
    read = parse_request({"prompt": "x <lora:shiny:1>", "hires_prompt": tags})
    assert read.warnings == ("hires_prompt: ignored <hypernet:soft:1>, 3.",)
    with pytest.raises(InvalidRequest) as caught:
        parse_request({"prompt": "an apple", "hires_prompt": "a pear <lora:shiny:strong>"})
    assert caught.value.field == "hires_prompt"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("[a:b:0.5]", [(10, "b")]),
        ("[a:b:1.5]", [(5, "a"), (10, "b")]),
        ("[a:b:23]", [(3, "a"), (10, "b")]),
        ("[a:b:7]", [(10, "b")]),
        ("[a:b:40]", [(10, "a"), (10, "a")][:1]),
    ],
)
def test_schedules_count_on_in_the_second_pass(prompt: str, texts: list[tuple[int, str]]):
    assert schedule_prompt(prompt, 10, 20) == texts


def test_second_pass_knows_the_calls_of_the_first():
    resolved = request(steps=20, sampler="Heun", hires_scale=2).resolve(ModelDefaults())
    assert [one.calls_before for one in resolved.passes] == [0, 40]


# --- settings text


def test_settings_text_has_the_keys_of_automatic1111():
    one = request(
        width=512,
        height=512,
        hires_scale=1.5,
        hires_upscaler="4x-Sharp",
        hires_steps=10,
        hires_strength=0.4,
        hires_prompt="a pear, ripe",
    ).resolve(ModelDefaults())
    pairs = read_parameters(write_parameters(one, "model", "0" * 10, 1, 1))
    assert pairs["Size"] == "512x512"
    assert {key: value for key, value in pairs.items() if "ires" in key or "Denoising" in key} == {
        "Denoising strength": "0.4",
        "Hires upscale": "1.5",
        "Hires steps": "10",
        "Hires upscaler": "4x-Sharp",
        "Hires prompt": "a pear, ripe",
    }
    sides = one.model_copy(update={"hires_width": 1024, "hires_steps": 0})
    pairs = read_parameters(write_parameters(sides, "model", "0" * 10, 1, 1))
    assert pairs["Hires resize"] == "1024x0"
    assert {"Hires resize-1": "1024", "Hires resize-2": "0"}.items() <= complete(pairs).items()
    assert not pairs.keys() & {"Hires upscale", "Hires steps"}
    off = read_parameters(write_parameters(request().resolve(ModelDefaults()), "model", "", 1, 1))
    assert not any("ires" in key or "Denoising" in key for key in off)


# --- AUTOMATIC1111


def test_fields_of_automatic1111_become_those_of_the_second_pass():
    one = translate(
        hr_scale=1.5,
        hr_upscaler="Latent (nearest)",
        hr_second_pass_steps=7,
        denoising_strength=0.55,
        hr_prompt="a pear",
        hr_negative_prompt="blue",
        hr_sampler_name="k_euler_a",
        hr_scheduler="karras",
        hr_cfg=3,
        hr_checkpoint_name="Use same checkpoint",
        hr_additional_modules=["Use same choices"],
    )
    values = one.model_dump()
    assert {name: value for name, value in values.items() if name.startswith("hires")} == {
        "hires_scale": 1.5,
        "hires_upscaler": "Latent (nearest)",
        "hires_steps": 7,
        "hires_strength": 0.55,
        "hires_width": 0,
        "hires_height": 0,
        "hires_sampler": "Euler a",
        "hires_scheduler": "Karras",
        "hires_cfg_scale": 3,
        "hires_prompt": "a pear",
        "hires_negative_prompt": "blue",
    }


def test_defaults_are_those_of_automatic1111():
    one = translate(hr_upscaler=None, hr_sampler_name=None, hr_cfg=None, hr_prompt="")
    assert (one.hires_scale, one.hires_upscaler) == (2, "Latent")
    assert (one.hires_steps, one.hires_strength) == (0, 0.75)
    assert one.final_size == (1024, 1024)
    _, second = one.resolve(ModelDefaults()).passes
    assert (second.steps, second.cfg_scale, second.prompt) == (50, 7, "an apple")
    assert (second.sampler, second.scheduler) == (one.sampler, one.scheduler)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hr_resize_x": 768}, (768, 768)),
        ({"hr_resize_x": 768, "hr_resize_y": 640}, (768, 640)),
        ({"hr_scale": 1}, (512, 512)),
    ],
)
def test_sides_replace_the_scale(fields: dict[str, Any], expected: tuple[int, int]):
    one = translate(**fields)
    assert one.uses_hires
    assert one.final_size == expected


@pytest.mark.parametrize(
    ("fields", "etas"),
    [
        ({"sampler_name": "Euler", "hr_sampler_name": "Euler a", "eta": 0}, [None, 0]),
        ({"sampler_name": "Euler a", "hr_sampler_name": "Euler", "eta": 0}, [0, 0]),
        ({"sampler_name": "Euler a", "eta": 0.5}, [0.5, 0.5]),
        ({"sampler_name": "Euler a", "hr_sampler_name": "DDIM"}, [None, None]),
        (
            {
                "sampler_name": "Euler a",
                "hr_sampler_name": "DDIM",
                "override_settings": {"eta_ancestral": 0.3},
            },
            [0.3, 0],
        ),
        (
            {
                "sampler_name": "DDIM",
                "hr_sampler_name": "Euler a",
                "override_settings": {"eta_ancestral": 0.3, "eta_ddim": 0.2},
            },
            [0.2, 0.3],
        ),
    ],
)
def test_each_pass_has_the_eta_of_its_sampler(fields: dict[str, Any], etas: list[float | None]):
    one = translate(**fields).resolve(ModelDefaults())
    assert [run.options.eta for run in one.passes] == etas
    pairs = read_parameters(write_parameters(one, "model", "", 1))
    written = {
        "Eta DDIM" if run.sampler == "DDIM" else "Eta": f"{run.options.eta:g}"
        for run in one.passes
        if run.options.eta is not None and run.sampler != "Euler"
    }
    assert {key: value for key, value in pairs.items() if "Eta" in key} == written


def test_second_eta_of_the_same_key_is_written_apart():
    one = request(sampler="Euler a", hires_scale=2, options={"eta": 0.3, "hires_eta": 0.7})
    text = write_parameters(one.resolve(ModelDefaults()), "model", "", 1)
    assert ", Eta: 0.3, Hires Eta: 0.7," in text


def test_automatic_schedule_is_that_of_the_second_sampler():
    one = translate(sampler_name="DPM++ 2M", hr_sampler_name="Euler")
    assert (one.scheduler, one.hires_sampler, one.hires_scheduler) == ("Karras", "Euler", "Normal")
    one = translate(sampler_name="DPM++ 2M", hr_scheduler="Automatic")
    assert (one.hires_sampler, one.hires_scheduler) == ("DPM++ 2M", "Karras")
    one = translate(sampler_name="DPM++ 2M SDE", hr_sampler_name="DPM++ 2M SDE Karras")
    assert (one.scheduler, one.hires_scheduler) == ("Exponential", "Karras")
    one = translate(sampler_name="DPM++ 2M SDE Karras", hr_sampler_name="Euler")
    assert (one.hires_sampler, one.hires_scheduler) == ("Euler", "Karras")
    one = translate(scheduler="sgm_uniform", hr_sampler_name="DPM++ 2M SDE")
    assert (one.hires_sampler, one.hires_scheduler) == ("DPM++ 2M SDE", "SGM Uniform")
    one = translate(sampler_name="DPM++ 2M SDE Karras", hr_scheduler="Exponential")
    assert (one.hires_sampler, one.hires_scheduler) == ("DPM++ 2M SDE", "Exponential")
    one = translate(hr_sampler_name="Use same sampler", hr_scheduler="Use same scheduler")
    assert (one.hires_sampler, one.hires_scheduler) == (None, None)


@pytest.mark.parametrize("value", [None, 0, "0", "0.0", ""])
def test_unused_guidance_is_that_of_the_first_pass(value: Any):
    assert translate(hr_cfg=value).hires_cfg_scale is None


@pytest.mark.parametrize("scale", [0, 9, "big"])
def test_scale_is_ignored_beside_a_side(scale: Any):
    assert translate(hr_scale=scale, hr_resize_x=768, hr_resize_y="0").final_size == (768, 768)


def test_echo_has_no_guidance_that_was_not_sent():
    body = Txt2ImgRequest.model_validate({"prompt": "an apple", "enable_hr": True})
    assert body.echo["hr_cfg"] is None


def test_name_of_the_second_sampler_is_short_text():
    for value in ("x" * 101, ["Euler"]):
        for name in ("hr_sampler_name", "hr_scheduler"):
            with pytest.raises(ValidationError):
                Txt2ImgRequest.model_validate({"prompt": "an apple", name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hr_scale", 9),
        ("hr_scale", "big"),
        ("hr_second_pass_steps", 1000),
        ("denoising_strength", 1.5),
        ("denoising_strength", 0),
        ("hr_resize_x", 9999),
        ("hr_cfg", -1),
        ("hr_prompt", ["a"]),
        ("hr_sampler_name", "Magic"),
        ("hr_scheduler", "Magic"),
        ("hr_checkpoint_name", "other"),
        ("hr_additional_modules", ["vae"]),
    ],
)
def test_wrong_field_is_named_only_with_a_second_pass(name: str, value: Any):
    with pytest.raises(InvalidRequest) as caught:
        translate(**{name: value})
    assert caught.value.field == name
    assert not translate(**{name: value}, enable_hr="false").uses_hires
