"""Requests of the AUTOMATIC1111 dialect as jobs, without a service."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from alphalayer.api.a1111.schemas import Txt2ImgRequest
from alphalayer.api.a1111.settings import UNIMPLEMENTED, OverrideSettings
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import GenerationOptions, GenerationRequest

SERVICE: Any = SimpleNamespace(noise="nv", decode="official", prompt_comments=True)
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
    ],
)
def test_setting_without_effect_is_refused_by_name(fields: dict[str, Any], field: str, words: str):
    with pytest.raises(InvalidRequest) as caught:
        generation(**fields)
    assert caught.value.field == f"override_settings.{field}"
    assert words in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("name", ["eta", "s_min_uncond"])
def test_field_out_of_range_has_its_own_name(name: str):
    with pytest.raises(InvalidRequest) as caught:
        generation(**{name: 200})
    assert caught.value.field == name


def test_whole_set_of_settings_at_its_defaults_is_accepted():
    defaults = {name: accepted[0] for name, accepted in UNIMPLEMENTED.items()}
    as_text = {name: str(value) for name, value in defaults.items() if type(value) is float}
    others = {"samples_format": "png", "outdir_samples": "", "sd_checkpoint_hash": "", "n_rows": -1}
    for settings in (defaults, as_text, others, dict.fromkeys(defaults)):
        assert generation(override_settings=settings).options == GenerationOptions()


@pytest.mark.parametrize(
    ("args", "mode", "weight"),
    [
        ([{"method": 5}], "conv", 1),
        ([OBJECT], "conv", 0.5),
        ([True, 5], "conv", 1),
        ([True, "4", "0.5"], "attention", 0.5),
        ([{"enabled": False, "method": 5}], "opaque", 1),
        ([{}], "attention", 1),
    ],
)
def test_script_arguments_in_other_forms(args: list[Any], mode: str, weight: float):
    request = generation(alwayson_scripts={"LayerDiffuse": {"args": args}})
    assert (request.mode, request.layerdiffuse_weight) == (mode, weight)


@pytest.mark.parametrize("method", [0, 3, "(SD1.5) Generate Everything Together"])
def test_script_method_of_another_family_is_not_implemented(method: str | int):
    with pytest.raises(InvalidRequest, match="is not implemented"):
        generation(alwayson_scripts={"LayerDiffuse": {"args": [True, method]}})


def test_script_object_with_unknown_key_is_refused():
    with pytest.raises(InvalidRequest, match="strength"):
        generation(alwayson_scripts={"LayerDiffuse": {"args": [{"strength": 1}]}})


def test_unknown_style_is_a_warning():
    request = generation(styles=["cinematic", "None", "", "cinematic"])
    assert request.warnings == ('There is no style "cinematic".',)


def test_disable_extra_networks_removes_tags_unused():
    prompt = "an apple <lora:style:0.8>"
    assert generation(prompt=prompt).loras
    request = generation(prompt=prompt, disable_extra_networks=True)
    assert (request.prompt, request.loras) == ("an apple", ())


def test_alias_of_a_schedule_is_accepted():
    assert generation(scheduler="SGMUniform").scheduler == "SGM Uniform"


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
