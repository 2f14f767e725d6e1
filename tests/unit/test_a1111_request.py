"""Requests of the AUTOMATIC1111 dialect as jobs, without a service."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.header_files import write

from alphalayer.api.a1111.lists import loras, samplers, script_info
from alphalayer.api.a1111.schemas import Txt2ImgRequest
from alphalayer.api.a1111.script import METHODS, ROWS
from alphalayer.api.a1111.settings import UNIMPLEMENTED, OverrideSettings
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import GenerationOptions, GenerationRequest

SERVICE: Any = SimpleNamespace(noise="nv", decode="official", prompt_comments=True)
FORGE: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "contract" / "recorded" / "forge_options.json").read_text()
)
"""Default options of AUTOMATIC1111 and Forge: the implemented, the refused and the ignored."""
HUGE = 10**400
OBJECT = {"enabled": True, "method": 5, "weight": "0.5"}


def generation(stored: Any = None, **fields: Any) -> GenerationRequest:
    body = Txt2ImgRequest.model_validate(
        {"prompt": "an apple", "sampler_name": "DPM++ 2M SDE", **fields}
    )
    return body.to_spec(SERVICE, OverrideSettings(**(stored or {}))).generation


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"eta": 0, "sampler_name": "Euler a"}, {"eta": 0}),
        ({"eta": 0, "sampler_name": "Euler"}, {}),
        ({"eta": 1, "sampler_name": "Euler a"}, {}),
        ({"eta": 1, "sampler_name": "DDIM"}, {"eta": 1}),
        ({"eta": 0, "sampler_name": "DDIM"}, {}),
        ({"override_settings": {"eta_ancestral": 0.5}}, {"eta": 0.5}),
        ({"override_settings": {"eta_ancestral": 0.5}, "sampler_name": "DDIM"}, {}),
        ({"override_settings": {"eta_ddim": "0.5"}, "sampler_name": "DDIM"}, {"eta": 0.5}),
        ({"override_settings": {"eta_ancestral": 0.5}, "eta": 0.25}, {"eta": 0.25}),
        ({"override_settings": {"eta_noise_seed_delta": 31337}}, {"noise_seed_delta": 31337}),
        ({"override_settings": {"emphasis": "No norm"}}, {"emphasis": "No norm"}),
        ({"override_settings": {"sdxl_crop_top": 8}}, {"crop_top": 8}),
        ({"override_settings": {"sdxl_crop_left": 8}}, {"crop_left": 8}),
        ({"override_settings": {"s_min_uncond": 2}}, {"min_uncond": 2}),
        ({"override_settings": {"s_min_uncond": 2}, "s_min_uncond": 3}, {"min_uncond": 3}),
    ],
)
def test_settings_and_fields_become_options(fields: dict[str, Any], options: dict[str, Any]):
    assert generation(**fields).options == GenerationOptions(**options)


def test_settings_of_the_request_precede_stored_ones():
    stored = {"randn_source": "CPU", "emphasis": "Ignore", "CLIP_stop_at_last_layers": 2}
    request = generation(stored, override_settings={"randn_source": "GPU"})
    assert (request.noise, request.options.emphasis, request.clip_skip) == ("gpu", "Ignore", 2)
    assert generation().noise == "nv"


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"override_settings": {"sgm_noise_multiplier": True}}, "sgm_noise_multiplier", "false"),
        ({"override_settings": {"uni_pc_order": 2}}, "uni_pc_order", "only 3"),
        ({"override_settings": {"token_merging_ratio": 0.5}}, "token_merging_ratio", "only 0.0"),
        ({"override_settings": {"s_churn": "0.5"}}, "s_churn", "only 0.0"),
        ({"override_settings": {"emphasys": "None"}}, "emphasys", '"emphasis"'),
        ({"override_settings": {"clip_skip": 2}}, "clip_skip", "CLIP_stop_at_last_layers"),
        ({"override_settings": {"ENSD": 1}}, "ENSD", "eta_noise_seed_delta"),
        ({"override_settings": {"radn_source": "CPU"}}, "radn_source", "randn_source"),
        ({"override_settings": {"eta_noise_sede_delta": 1}}, "eta_noise_sede_delta", "seed_delta"),
        ({"override_settings": {"eta_ancestral": 2}}, "eta_ancestral", "at most 1"),
        ({"override_settings": {"sdxl_crop_top": -1}}, "sdxl_crop_top", "at least 0"),
        ({"override_settings": {"sd_checkpoint": "x"}}, "sd_checkpoint", "sd_model_checkpoint"),
        ({"override_settings": {"sd_model": "x"}}, "sd_model", "sd_model_checkpoint"),
        ({"override_settings": {"checkpoint": "x"}}, "checkpoint", "sd_model_checkpoint"),
        ({"override_settings": {"rho": HUGE}}, "rho", "only 0.0"),
        ({"override_settings": {"sd_vae": HUGE}}, "sd_vae", "Automatic"),
        ({"override_settings": {"forge_additional_modules": HUGE}}, "forge_additional_modules", ""),
        ({"override_settings": {"s_noise": ""}}, "s_noise", "only 1.0"),
        ({"override_settings": {"tiling": "true"}}, "tiling", "only false"),
    ],
)
def test_setting_without_effect_is_refused_by_name(fields: dict[str, Any], field: str, words: str):
    with pytest.raises(InvalidRequest) as caught:
        generation(**fields)
    assert caught.value.field == f"override_settings.{field}"
    assert words in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("name", ["eta", "s_min_uncond"])
def test_field_out_of_range_has_its_own_name(name: str):
    for sampler in ("DPM++ 2M SDE", "Euler"):
        with pytest.raises(InvalidRequest) as caught:
            generation(**{name: 200}, sampler_name=sampler)
        assert caught.value.field == name


def test_default_options_of_forge_are_accepted():
    defaults = {**FORGE["implemented"], **FORGE["refused"], **FORGE["ignored"]}
    as_text = {name: str(value) for name, value in defaults.items() if not isinstance(value, list)}
    upper, lower = (
        {name: value.upper() for name, value in as_text.items()},
        {name: value.lower() for name, value in as_text.items()},
    )
    for settings in (defaults, upper, lower, dict.fromkeys(defaults)):
        assert generation(override_settings=settings).options == GenerationOptions()
    empty = {name: "" for name, value in FORGE["refused"].items() if not value}
    assert generation(override_settings=empty).options == GenerationOptions()


@pytest.mark.parametrize("name", UNIMPLEMENTED)
def test_changed_option_of_forge_is_refused_by_name(name: str):
    # an older name of an option that the recorded set does not have
    default = {**FORGE["refused"], "enable_emphasis": True}[name]
    changed = {bool: not default, float: 0.25, str: "Other", list: ["other"]}[type(default)]
    with pytest.raises(InvalidRequest) as caught:
        generation(override_settings={name: changed})
    assert caught.value.field == f"override_settings.{name}"


def test_empty_model_is_that_of_the_options():
    empty = {"sd_model_checkpoint": ""}
    assert generation(override_settings=empty).model is None
    assert generation({"sd_model_checkpoint": "a"}, override_settings=empty).model == "a"
    assert generation(empty).model is None


@pytest.mark.parametrize(
    ("args", "mode", "weight"),
    [
        ([{"method": 5}], "conv", 1),
        ([OBJECT], "conv", 0.5),
        ([True, 5], "conv", 1),
        ([True, "4", "0.5"], "attention", 0.5),
        ([{"enabled": False, "method": 5}], "opaque", 1),
        ([{}], "attention", 1),
        ([1], "attention", 1),
        (["true", 5], "conv", 1),
        (["False"], "opaque", 1),
        ([True, 5.0], "conv", 1),
        ([{"enabled": "true", "method": 5.0}], "conv", 1),
        ([True, 5, 1, 1, None, None, None, "Just Resize", "false", " ", "", " "], "conv", 1),
        ({"1": 5, "0": True}, "conv", 1),
        ({"method": 5}, "conv", 1),
        ({}, "attention", 1),
        (None, "attention", 1),
    ],
)
def test_script_arguments_in_other_forms(args: Any, mode: str, weight: float):
    request = generation(alwayson_scripts={"LayerDiffuse": {"args": args}})
    assert (request.mode, request.layerdiffuse_weight) == (mode, weight)


def script_of(*args: Any, **fields: Any) -> Any:
    return generation(alwayson_scripts={"LayerDiffuse": {"args": [True, *args]}}, **fields)


@pytest.mark.parametrize(
    ("methods", "mode"),
    [
        ((0, "(SD1.5) Only Generate Transparent Image (Attention Injection)"), "sd15_attention"),
        ((4, "Only Generate Transparent Image (Attention Injection)"), "attention"),
        (
            (
                3,
                "(SD1.5) Generate Everything Together (need batch size 3)",
                "(SD1.5) Generate Everything Together",
                "Generate Everything Together",
            ),
            "sd15_joint",
        ),
    ],
)
def test_script_method_by_row_or_label(methods: tuple[str | int, ...], mode: str):
    for method in methods:
        assert script_of(method, batch_size=3).mode == mode


def test_script_rows_are_those_of_forge():
    rows, same = (script["args"][1]["choices"] for script in script_info())
    assert rows == same
    modes = [METHODS[label] for label in rows]
    assert modes == [
        *("sd15_attention", "sd15_fg2bg", "sd15_bg2fg", "sd15_joint", "attention", "conv"),
        *("fg2ble", "fgble2bg", "bg2ble", "bgble2fg"),
    ]


def test_script_batch_of_no_whole_set_is_refused():
    with pytest.raises(InvalidRequest, match="got a batch_size of 4; use one of 3, 6") as error:
        script_of(3, batch_size=4)
    assert error.value.field == "batch_size"


def test_script_additional_prompts_are_those_of_layers():
    tail = (1, 1, None, None, None, "Just Resize", False, "glass", None, "both")
    request = script_of(3, *tail, batch_size=3)
    texts = (request.foreground_prompt, request.background_prompt, request.blended_prompt)
    assert texts == ("glass", "", "both")
    assert request.warnings == ()
    assert request.layer_prompts == ("glass, an apple", "an apple", "both, an apple")
    assert script_of(5, *tail).warnings == (
        "fg_additional_prompt: ignored by this method.",
        "blend_additional_prompt: ignored by this method.",
    )


@pytest.mark.parametrize("args", [[{"strength": 1}], {"strength": 1}, {"0": True, "strength": 1}])
def test_script_object_with_unknown_key_is_refused(args: Any):
    with pytest.raises(InvalidRequest, match="there is no such field"):
        generation(alwayson_scripts={"LayerDiffuse": {"args": args}})


@pytest.mark.parametrize(
    "scripts",
    [
        {"Sampler": {"args": [20, "DPM++ 2M", "Karras"]}},
        {"seed": {"args": [-1, False, -1, 0, 0, 0]}},
        {"ControlNet": None},
        {"LayerDiffuse": None},
        {"ControlNet": {"args": None}},
        {"ControlNet": {"args": {"0": {"enabled": False}}}},
        {"ControlNet": {"args": [None, {"enabled": "false"}]}},
        {"ADetailer": {"args": [{"ad_model": "None"}]}},
        {"ADetailer": {"args": [True, False, {"ad_model": "None"}, {"ad_model": "None"}]}},
        {"ADetailer": {"args": [False, False, {"ad_model": "face_yolov8n.pt"}]}},
        {"ADetailer": {"args": [True, {"ad_model": "face_yolov8n.pt", "ad_tab_enable": False}]}},
    ],
)
def test_script_that_requests_nothing_is_ignored(scripts: dict[str, Any]):
    assert generation(alwayson_scripts=scripts) == generation()


@pytest.mark.parametrize(
    "args",
    [
        [None, {"enabled": True}],
        {"0": {"enabled": "true"}},
        {"model": "canny"},
        [True, False, {"ad_model": "face_yolov8n.pt"}],
        [{"ad_model": "None"}, {"ad_model": "face_yolov8n.pt"}],
        [True],
    ],
)
def test_script_that_is_on_is_refused(args: Any):
    with pytest.raises(InvalidRequest, match="there is no script"):
        generation(alwayson_scripts={"Other": {"args": args}})


def test_script_resize_mode_is_by_default_that_of_forge():
    assert generation(alwayson_scripts={"LayerDiffuse": {"args": [True]}}) == generation()
    script, _ = script_info()
    assert script["args"][7]["value"] == "Crop and Resize"


def test_script_method_is_the_row_of_its_choice():
    script, _ = script_info()
    choices = script["args"][1]["choices"]
    assert (len(choices), tuple(choices)) == (10, ROWS)
    for row in (4, 5):
        by_row, by_label = (
            generation(alwayson_scripts={"LayerDiffuse": {"args": [True, method]}}).mode
            for method in (row, choices[row])
        )
        assert by_row == by_label


def test_samplers_list_the_schedule_that_they_have_of_their_own():
    schedules = {row["name"]: row["options"].get("scheduler") for row in samplers()}
    assert (schedules["DPM++ 2M"], schedules["DPM++ 3M SDE"]) == ("karras", "exponential")
    assert schedules["Euler a"] is schedules["DDIM"] is None


def test_unknown_style_is_a_warning():
    request = generation(styles=["cinematic", "None", "", "cinematic"])
    assert request.warnings == ('There is no style "cinematic".',)


def test_disable_extra_networks_removes_tags_unused():
    prompt = "an apple <lora:style:0.8>"
    assert generation(prompt=prompt).loras
    request = generation(prompt=prompt, disable_extra_networks=True)
    assert (request.prompt, request.loras) == ("an apple", ())
    malformed = "an apple <lora:style:strong> <lora:>"
    assert generation(prompt=malformed, disable_extra_networks=True).prompt == "an apple  <lora:>"


@pytest.mark.parametrize(
    ("name", "scheduler", "sampler", "schedule"),
    [
        ("Euler", "SGMUniform", "Euler", "SGM Uniform"),
        ("Euler SGMUniform", None, "Euler", "SGM Uniform"),
        ("Euler a SGMUniform", None, "Euler a", "SGM Uniform"),
        ("k_dpmpp_2m Karras", None, "DPM++ 2M", "Karras"),
        ("k_dpmpp_2m_sde Automatic", None, "DPM++ 2M SDE", "Exponential"),
        ("k_euler_a SGMUniform", None, "Euler a", "SGM Uniform"),
        ("k_euler SGM Uniform", "Karras", "Euler", "Karras"),
    ],
)
def test_aliases_are_read_also_with_a_schedule(
    name: str, scheduler: str | None, sampler: str, schedule: str
):
    request = generation(sampler_name=name, scheduler=scheduler)
    assert (request.sampler, request.scheduler) == (sampler, schedule)


def test_echo_has_the_fields_of_forge_and_what_was_sent():
    sent = {
        "prompt": "x",
        "steps": 2.0,
        "hr_scale": 1.5,
        "override_settings": {"randn_source": "CPU", "samples_format": "png"},
        "future": 1,
    }
    echo = Txt2ImgRequest.model_validate(sent).echo
    assert (
        echo.items()
        >= {
            "prompt": "x",
            "steps": 2,
            "hr_scale": 1.5,
            "override_settings": sent["override_settings"],
            "styles": None,
            "s_noise": None,
            "script_args": [],
            "distilled_cfg_scale": 3.5,
        }.items()
    )
    assert "future" not in echo


def test_echoed_field_that_is_not_unicode_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        Txt2ImgRequest.model_validate({"prompt": "x", "comments": json.loads('"\\ud800"')})
    assert caught.value.field == "comments"


def test_objects_in_the_metadata_of_loras_are_parsed(tmp_path: Path):
    texts = {
        "ss_tag_frequency": '{"10_apple": {"apple": 3}}',
        "ss_bucket_info": "{broken",
        "ss_deep": '{"a":' * 500 + "1" + "}" * 500,
        "ss_deeper": '{"a":' * 5000 + "1" + "}" * 5000,
        "ss_number": '{"a": NaN}',
        "ss_large": '{"a": 1e999}',
        "ss_surrogate": '{"a": "\\ud800"}',
        "ss_network_dim": "8",
    }
    write(tmp_path / "Lora" / "apples.safetensors", {}, metadata=texts)
    service: Any = SimpleNamespace(models_dir=tmp_path)
    [row] = loras(service)
    parsed = {"ss_tag_frequency": {"10_apple": {"apple": 3}}}
    assert row["metadata"] == {"format": "pt", **texts, **parsed}


def test_second_pass_reads_aliases_and_leaves_tags_out():
    request = generation(
        enable_hr=True,
        hr_sampler_name="k_dpmpp_2m Karras",
        hr_prompt="a pear <lora:x:strong>",
        disable_extra_networks=True,
    )
    assert (request.hires_sampler, request.hires_scheduler) == ("DPM++ 2M", "Karras")
    assert request.hires_prompt == "a pear"
