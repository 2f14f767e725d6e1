"""The AUTOMATIC1111 contract, `/sdapi/v1`, over real HTTP.

The requests are those of webuiapi, recorded ones of other clients, and direct ones.
"""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import webuiapi
from PIL import Image
from safetensors.numpy import save_file
from tests.support.header_files import write
from tests.support.serving import put_lora, put_model, served, wait_until

from alphalayer.engine.fake import render_disc
from alphalayer.images import codecs
from alphalayer.images.infotext import read_parameters

RECORDED = Path(__file__).parent / "recorded"
ATTENTION = "(SDXL) Only Generate Transparent Image (Attention Injection)"
PIXEL = base64.b64encode(codecs.encode(np.full((2, 2, 4), 9, np.uint8))).decode()
CONV = "(SDXL) Only Generate Transparent Image (Conv Injection)"
FG2BLE = "(SDXL) From Foreground to Blending"
INFO_KEYS = (
    "prompt all_prompts negative_prompt all_negative_prompts seed all_seeds subseed all_subseeds "
    "subseed_strength width height sampler_name cfg_scale steps batch_size restore_faces "
    "face_restoration_model sd_model_name sd_model_hash sd_vae_name sd_vae_hash "
    "seed_resize_from_w seed_resize_from_h denoising_strength extra_generation_params "
    "index_of_first_image infotexts styles job_timestamp clip_skip "
    "is_using_inpainting_conditioning version"
).split()
SMALL = {"prompt": "an apple", "width": 64, "height": 64, "steps": 2}
IDLE = {
    "progress": 0.0,
    "eta_relative": 0.0,
    "current_image": None,
    "textinfo": None,
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with served(put_model(tmp_path_factory.mktemp("service"))) as client:
        yield client


def webui(client, **options):
    return webuiapi.WebUIApi(baseurl=f"{str(client.base_url).rstrip('/')}/sdapi/v1", **options)


def render(client, **fields):
    return client.post("/sdapi/v1/txt2img", json={**SMALL, **fields})


def settings_of(answer):
    """Return the settings of the only image of an answer."""
    assert answer.status_code == 200, answer.text
    return read_parameters(json.loads(answer.json()["info"])["infotexts"][0])


def play(client, name):
    """Send the recorded requests of a client; yield each route and its answer."""
    for request in json.loads((RECORDED / f"{name}.json").read_text())["requests"]:
        body = request.get("json")
        if request["path"].endswith("/options") and body:
            body = client.get("/sdapi/v1/options").json()
            body["sd_model_checkpoint"] = client.get("/sdapi/v1/sd-models").json()[0]["title"]
        answer = client.request(request["method"], request["path"], json=body)
        assert answer.status_code == 200, (request, answer.text)
        yield request["path"].rpartition("/")[2], answer.json()


def test_webuiapi_txt2img_returns_images_and_info(client):
    api = webui(client)
    result = api.txt2img(
        prompt="an apple",
        negative_prompt="ugly",
        seed=7,
        width=128,
        height=64,
        steps=3,
        batch_size=2,
    )
    assert len(result.images) == 2
    np.testing.assert_array_equal(np.asarray(result.image), render_disc("an apple", 7, 128, 64))
    assert list(result.info) == INFO_KEYS
    assert result.info["all_seeds"] == [7, 8]
    assert result.image.info["parameters"] == result.info["infotexts"][0]
    assert result.parameters["steps"] == 3
    assert result.info["extra_generation_params"]["Schedule type"] == "Normal"
    shown = api.png_info(result.image)
    assert shown.info == result.info["infotexts"][0]
    assert shown.parameters["Seed"] == "7"


async def test_webuiapi_async_txt2img_returns_the_image(client):
    pytest.importorskip("aiohttp", reason="webuiapi imports it and does not depend on it")
    result = await webui(client).txt2img(
        prompt="x", seed=3, width=64, height=64, steps=1, use_async=True
    )
    np.testing.assert_array_equal(np.asarray(result.image), render_disc("x", 3, 64, 64))


def test_webuiapi_calls_of_all_routes_succeed(client):
    api = webui(client)
    assert next(sampler["name"] for sampler in api.get_samplers()) == "DPM++ 2M SDE"
    assert {"automatic", "karras", "sgm_uniform"} <= {
        scheduler["name"] for scheduler in api.get_schedulers()
    }
    assert "Latent (bicubic)" in {mode["name"] for mode in api.get_latent_upscale_modes()}
    assert "Lanczos" in {upscaler["name"] for upscaler in api.get_upscalers()}
    for listing in (
        api.get_sd_vae,
        api.get_loras,
        api.get_prompt_styles,
        api.get_hypernetworks,
        api.get_face_restorers,
        api.get_realesrgan_models,
    ):
        assert listing() == []
    assert api.get_upscalers()[0]["name"] == "None"
    assert api.get_scripts() == {"txt2img": ["layerdiffuse"], "img2img": ["layerdiffuse"]}
    assert api.get_memory()["ram"]["total"] > 0
    assert api.get_cmd_flags()["api"] is True
    assert api.refresh_checkpoints() is None
    assert api.interrupt() == api.skip() == {}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    api.util_wait_for_ready(0.05)
    with pytest.raises(RuntimeError, match="no model here describes images"):
        api.interrogate(Image.new("RGB", (8, 8)))


def test_model_is_selected_by_options_or_by_request(tmp_path):
    with served(put_model(tmp_path)) as client:
        api = webui(client)
        [name] = [title for title in api.util_get_model_names() if "alphalayer-mini" not in title]
        assert api.util_get_current_model() == name
        api.util_set_model(name)
        assert api.util_get_current_model() == name
        assert render(client, override_settings={"sd_model_checkpoint": name}).status_code == 200
        answer = client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "nowhere"})
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith('sd_model_checkpoint: no model "nowhere"')
        client.post("/sdapi/v1/options", json={"CLIP_stop_at_last_layers": 2})
        assert settings_of(render(client))["Clip skip"] == "2"
        assert (
            settings_of(render(client, override_settings={"CLIP_stop_at_last_layers": 3}))[
                "Clip skip"
            ]
            == "3"
        )


def test_missing_model_of_the_options_is_named_and_cleared(tmp_path):
    with served(put_model(tmp_path)) as client:
        client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "apples"})
        (tmp_path / "models" / "Stable-diffusion" / "apples").rename(tmp_path / "elsewhere")
        detail = render(client).json()["detail"]
        assert detail.startswith("options.sd_model_checkpoint: no model"), detail
        options = client.get("/sdapi/v1/options").json()
        assert client.post("/sdapi/v1/options", json=options).status_code == 200
        client.post("/sdapi/v1/options", json={"sd_model_checkpoint": ""})
        assert render(client).status_code == 200


def test_embedded_model_is_listed_with_its_hash(client):
    [mini] = [
        model
        for model in client.get("/sdapi/v1/sd-models").json()
        if model["model_name"] == "alphalayer-mini"
    ]
    assert mini["title"] == f"alphalayer-mini [{mini['hash']}]"
    assert len(mini["hash"]) == 10
    for name in (mini["title"], mini["hash"], "apples [0123456789]"):
        assert render(client, override_settings={"sd_model_checkpoint": name}).status_code == 200
    assert (
        render(client, override_settings={"sd_model_checkpoint": "apples [012]"}).status_code == 422
    )


def test_lora_path_begins_with_the_models_folder(tmp_path, monkeypatch):
    file = tmp_path / "models" / "Lora" / "apples.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with served(tmp_path, models_dir="models", engine=None) as client:
        [listed] = client.get("/sdapi/v1/loras").json()
        assert (listed["name"], listed["path"]) == (
            "apples",
            "models/Lora/apples.safetensors",
        )


def test_lora_alias_is_listed_and_names_it_in_prompts(tmp_path):
    metadata = {"ss_output_name": "trained", "ss_network_dim": "8"}
    write(tmp_path / "models" / "Lora" / "apples.safetensors", {}, metadata=metadata)
    with served(put_model(tmp_path)) as client:
        [listed] = client.get("/sdapi/v1/loras").json()
        assert (listed["name"], listed["alias"]) == ("apples", "trained")
        assert listed["metadata"] == {"format": "pt", **metadata}
        assert render(client, prompt="x <lora:trained:0.5>").status_code == 200
        assert render(client, prompt="x <lora:other:0.5>").status_code == 422


def test_unknown_upscaler_is_refused_at_once(client):
    unknown = {"hr_upscaler": "4x-Sharp", "width": 64, "height": 64, "steps": 1}
    refused = render(client, enable_hr=True, **unknown)
    assert refused.status_code == 422
    detail = refused.json()["detail"]
    assert detail.startswith('hr_upscaler: unknown upscaler "4x-Sharp"')
    assert detail.endswith("Put its file into models/ESRGAN.")
    assert render(client, **unknown).status_code == 200
    assert render(client, enable_hr=True, **unknown | {"hr_upscaler": "Lanczos"}).is_success


def test_txt2img_defaults_are_those_of_automatic1111(client):
    settings = settings_of(client.post("/sdapi/v1/txt2img", json={"prompt": "x"}))
    expected = {
        "Steps": "50",
        "Sampler": "Euler",
        "Schedule type": "Normal",
        "CFG scale": "7",
        "Size": "512x512",
    }
    assert expected.items() <= settings.items()
    assert settings["Negative prompt"] == ""
    assert settings["layerdiffusion_enabled"] == "True"
    first, second = (
        json.loads(render(client, n_iter=2).json()["info"])["all_seeds"] for _ in range(2)
    )
    assert first[1] == first[0] + 1
    assert first != second


@pytest.mark.parametrize(
    ("fields", "sampler", "scheduler"),
    [
        ({"sampler_name": "DPM++ 2M SDE Karras"}, "DPM++ 2M SDE", "Karras"),
        (
            {"sampler_name": "DPM++ 2M SDE Karras", "scheduler": "Automatic"},
            "DPM++ 2M SDE",
            "Exponential",
        ),
        (
            {"sampler_name": "DPM++ 2M SDE Karras", "scheduler": "exponential"},
            "DPM++ 2M SDE",
            "Exponential",
        ),
        ({"sampler_name": "DPM++ 2M SDE Automatic"}, "DPM++ 2M SDE", "Exponential"),
        (
            {"sampler_name": "dpm++ 2m sde", "scheduler": "sgm_uniform"},
            "DPM++ 2M SDE",
            "SGM Uniform",
        ),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Automatic"}, "DPM++ 2M", "Karras"),
        ({"sampler_name": "DPM++ 2M SDE"}, "DPM++ 2M SDE", "Exponential"),
        ({"sampler_index": "Euler a", "sampler_name": None}, "Euler a", "Normal"),
        ({"sampler_index": "Heun", "sampler_name": "DDIM"}, "DDIM", "Normal"),
        ({"sampler_name": "k_euler_a"}, "Euler a", "Normal"),
        ({"sampler_name": "K_DPMPP_2M"}, "DPM++ 2M", "Karras"),
        ({"sampler_name": "ddim"}, "DDIM", "Normal"),
    ],
)
def test_txt2img_sampler_names_give_sampler_and_schedule(client, fields, sampler, scheduler):
    settings = settings_of(render(client, **fields))
    assert (settings["Sampler"], settings["Schedule type"]) == (sampler, scheduler)


def test_txt2img_lora_of_the_prompt_is_used(client, tmp_path):
    with served(put_lora(tmp_path)) as other:
        settings = settings_of(render(other, prompt="an apple <lora:style:0.8>, red"))
    assert settings["Prompt"] == "an apple , red <lora:style:0.8>"
    refused = render(client, prompt="an apple <lora:style:strong>")
    assert refused.status_code == 422
    assert "<lora:style:strong>" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], {"method": ATTENTION, "weight": "1", "ending_step": "1"}),
        ([True, CONV], {"method": CONV}),
        ([True, "Only Generate Transparent Image (Conv Injection)"], {"method": CONV}),
        (
            [True, ATTENTION, 0.5, 0.8, None, None, None, "Just Resize", False, "", "", ""],
            {"weight": "0.5", "ending_step": "0.8"},
        ),
        ([False], None),
        ([True, CONV, 1, 1, None, None, None, "Just Resize", False], {"method": CONV}),
    ],
)
@pytest.mark.parametrize("title", ["LayerDiffuse", "layerdiffuse"])
def test_txt2img_layerdiffuse_script_sets_the_mode(client, title, args, expected):
    settings = settings_of(render(client, alwayson_scripts={title: {"args": args}}))
    if expected is None:
        assert "layerdiffusion_enabled" not in settings
    else:
        assert {
            f"layerdiffusion_{key}": value for key, value in expected.items()
        }.items() <= settings.items()


def test_options_title_of_the_default_model_has_its_hash(tmp_path):
    with served(tmp_path, engine=None) as client:
        options = client.get("/sdapi/v1/options").json()
    assert (
        options["sd_model_checkpoint"] == f"alphalayer-mini [{options['sd_checkpoint_hash'][:10]}]"
    )


def test_embeddings_are_listed_as_loaded_or_skipped(tmp_path):
    (tmp_path / "embeddings").mkdir()
    sides = {"clip_l": np.zeros((3, 768), np.float32), "clip_g": np.zeros((3, 1280), np.float32)}
    files = {
        "soft": sides,
        "old": {"emb_params": sides["clip_l"]},
        "other": {"emb_params": np.zeros((3, 1024), np.float32)},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / "embeddings" / f"{name}.safetensors")
    with served(tmp_path, engine=None) as client:
        listed = client.get("/sdapi/v1/embeddings").json()
    assert (listed["loaded"]["soft"]["vectors"], listed["loaded"]["soft"]["shape"]) == (3, 2048)
    assert (listed["loaded"]["old"]["vectors"], listed["loaded"]["old"]["shape"]) == (3, 768)
    assert (list(listed["loaded"]), list(listed["skipped"])) == (["old", "soft"], ["other"])


def test_missing_lora_is_an_error_of_the_prompt(client, tmp_path):
    for path in ("/sdapi/v1/txt2img", "/v1/images/generations"):
        answer = client.post(path, json={"prompt": "an apple <lora:nowhere>"})
        assert answer.status_code in (400, 422)
        assert 'prompt: no LoRA "nowhere" in' in answer.text.replace("\\", "")


def test_txt2img_layerdiffuse_enabled_false_is_opaque(client):
    assert "layerdiffusion_enabled" not in settings_of(render(client, layerdiffuse_enabled=False))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"width": 63}, "width"),
        ({"steps": "many"}, "steps"),
        ({"cfg_scale": -1}, "cfg_scale"),
        ({"sampler_name": "Magic"}, "sampler_name"),
        ({"scheduler": "Magic"}, "scheduler"),
        ({"batch_size": 100}, "batch_size"),
        ({"n_iter": 100}, "n_iter"),
        ({"enable_hr": True, "hr_scale": 9}, "hr_scale"),
        ({"restore_faces": True}, "restore_faces"),
        ({"tiling": True}, "tiling"),
        ({"script_name": "X/Y/Z plot"}, "script_name"),
        ({"refiner_checkpoint": "refiner"}, "refiner_checkpoint"),
        ({"seed_resize_from_w": 64}, "seed_resize_from_w"),
        ({"s_noise": 0.5}, "s_noise"),
        ({"override_settings": {"sd_vae": "other"}}, "override_settings.sd_vae"),
        (
            {"override_settings": {"sd_model_checkpoint": "nowhere"}},
            "override_settings.sd_model_checkpoint: ",
        ),
        (
            {"override_settings": {"forge_additional_modules": ["vae.safetensors"]}},
            "forge_additional_modules",
        ),
        ({"alwayson_scripts": {"ADetailer": {"args": [True]}}}, "ADetailer"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"model": "x"}]}}}, "ControlNet"),
        ({"alwayson_scripts": {"LayerDiffuse": {"args": ["maybe"]}}}, "enabled"),
        (
            {
                "alwayson_scripts": {
                    "LayerDiffuse": {"args": [True, "(SDXL) From Foreground to Blending"]}
                }
            },
            "foreground",
        ),
        (
            {"alwayson_scripts": {"LayerDiffuse": {"args": [True, "From Foreground to Blending"]}}},
            f'mode "{FG2BLE}" takes one image each of: foreground',
        ),
        (
            {"alwayson_scripts": {"LayerDiffuse": {"args": [True, f"(SD1.5) {CONV[7:]}"]}}},
            'there is no "(SD1.5) Only',
        ),
        (
            {"alwayson_scripts": {"LayerDiffuse": {"args": [True, 3]}}, "batch_size": 2},
            "use one of 3, 6",
        ),
        (
            {"alwayson_scripts": {"LayerDiffuse": {"args": [True, CONV, *[None] * 6, True]}}},
            "output_origin",
        ),
        (
            {"alwayson_scripts": {"LayerDiffuse": {"args": [True]}}, "layerdiffuse_enabled": False},
            "layerdiffuse_enabled",
        ),
        (
            {"alwayson_scripts": {"LayerDiffuse": {"args": [False]}}, "layerdiffuse_enabled": True},
            "layerdiffuse_enabled",
        ),
        ({"alwayson_scripts": {"LayerDiffuse": {"args": [True, "Magic"]}}}, "Magic"),
        ({"alwayson_scripts": {"LayerDiffuse": {"args": [True, CONV, 3]}}}, "weight"),
        ({"alwayson_scripts": {"LayerDiffuse": {"args": [True, CONV, 1, 2]}}}, "ending_step"),
        ({"alwayson_scripts": {"LayerDiffuse": {"args": [True, CONV, 1, 1, 5]}}}, "fg_image"),
        ({"alwayson_scripts": {"LayerDiffuse": {"args": [True, FG2BLE, 1, 1, "a"]}}}, "not base64"),
        (
            {"alwayson_scripts": {"LayerDiffuse": {"args": [True, FG2BLE, 1, 1, "aGk="]}}},
            "not an image",
        ),
        (
            {"alwayson_scripts": {"LayerDiffuse": {"args": [True, CONV, 1, 1, PIXEL]}}},
            f'mode "{CONV}" takes no input images',
        ),
    ],
)
def test_txt2img_unsupported_value_is_named(client, fields, field):
    answer = render(client, **fields)
    assert answer.status_code == 422
    assert list(answer.json()) == ["detail"]
    assert field in answer.json()["detail"]


def test_txt2img_fields_without_effect_are_ignored(client):
    same = {"seed": 5}
    other = {
        "save_images": True,
        "hr_scale": 2,
        "denoising_strength": 0.7,
        "eta": 1.0,
        "s_noise": 1,
        "future_field": {},
        "override_settings": {"forge_additional_modules": [], "sd_vae": "Automatic"},
        "enable_hr": "false",
        "refiner_checkpoint": "None",
        "script_name": "None",
        "styles": ["", "None"],
        "alwayson_scripts": {
            "ControlNet": {"args": []},
            "ADetailer": {"args": [False]},
            "Other": {"args": [{"enabled": False}]},
        },
    }
    assert (
        render(client, **same).json()["images"] == render(client, **same, **other).json()["images"]
    )
    answer = render(client, **same, send_images=False).json()
    assert answer["images"] == []
    assert json.loads(answer["info"])["seed"] == 5


def test_txt2img_same_task_id_returns_the_same_job(client):
    first, again, other = (
        render(client, force_task_id="t", steps=steps).json()["info"] for steps in (2, 2, 3)
    )
    assert first == again != other


def test_errors_have_the_shape_of_automatic1111(client):
    assert client.get("/sdapi/v1/nothing").json() == {
        "detail": "there is no such path. All paths are described at /docs."
    }
    assert client.get("/sdapi/v1/txt2img").json() == {
        "detail": "this path does not take that method. Use POST; see /docs."
    }
    answer = client.post("/sdapi/v1/interrogate", json={})
    assert answer.status_code == 501
    assert answer.json()["detail"].endswith(
        "/sdapi/v1/png-info returns the prompt of a generated image."
    )
    large = client.post("/sdapi/v1/txt2img", content=b" " * 64_100_000)
    assert (large.status_code, list(large.json())) == (413, ["detail"])
    broken = client.post("/sdapi/v1/png-info", json={"image": "data:image/png;base64,aGk="})
    assert broken.status_code == 422
    assert "not an image" in broken.json()["detail"]
    assert (
        client.post("/sdapi/v1/png-info", json={"image": "?"})
        .json()["detail"]
        .startswith("image: not base64")
    )


def test_progress_shows_preview_until_interrupt(tmp_path):
    with (
        served(tmp_path, engine_options={"step_s": 0.05}) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        idle = client.get("/sdapi/v1/progress").json()
        assert IDLE.items() <= idle.items()
        assert (idle["state"]["job_count"], idle["state"]["job_timestamp"]) == (0, "0")
        slow = pool.submit(
            render, client, steps=150, override_settings={"live_previews_enable": True}
        )

        def running():
            return client.get("/sdapi/v1/progress").json()

        wait_until(lambda: running()["current_image"])
        now = running()
        assert 0 < now["progress"] < 1
        assert now["state"]["job_count"] == 1
        assert now["state"]["sampling_steps"] == 150
        assert Image.open(io.BytesIO(base64.b64decode(now["current_image"]))).size == (32, 32)
        skipped = client.get("/sdapi/v1/progress", params={"skip_current_image": True}).json()
        assert skipped["current_image"] is None
        assert client.post("/sdapi/v1/interrupt").json() == {}
        answer = slow.result(10)
        assert answer.status_code == 409
        assert "cancelled" in answer.json()["detail"]
        wait_until(lambda: running()["state"]["job_count"] == 0)


def test_progress_counts_over_all_iterations(tmp_path):
    # an iteration takes a second, so that a busy machine misses none
    with (
        served(tmp_path, engine_options={"step_s": 0.1}) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        slow = pool.submit(render, client, steps=10, n_iter=3)
        seen = []
        while not slow.done():
            now = client.get("/sdapi/v1/progress").json()
            if now["state"]["sampling_steps"]:
                seen.append(
                    (now["progress"], now["state"]["job_no"], now["state"]["sampling_step"])
                )
                assert (now["state"]["job_count"], now["state"]["sampling_steps"]) == (3, 10)
                assert now["progress"] == pytest.approx(
                    (10 * seen[-1][1] + seen[-1][2]) / 30, abs=1e-3
                )
            time.sleep(0.01)
        assert slow.result().status_code == 200
        assert [progress for progress, _, _ in seen] == sorted(progress for progress, _, _ in seen)
        assert {number for _, number, _ in seen} == {0, 1, 2}
        assert all(0 <= step <= 10 for _, _, step in seen)


def test_basic_auth_hides_jobs_of_other_users(tmp_path):
    slow = {"engine_options": {"step_s": 0.05}}
    with (
        served(tmp_path, api_auth="ann:secret,bob:other", **slow) as client,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        refused = client.get("/sdapi/v1/options")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        assert list(refused.json()) == ["detail"]
        ann, bob = (
            webui(client, username=name, password=word)
            for name, word in (("ann", "secret"), ("bob", "other"))
        )
        rendering = pool.submit(ann.txt2img, prompt="x", steps=20, width=64, height=64)
        wait_until(lambda: ann.get_progress()["state"]["job_count"])
        assert bob.get_progress()["state"]["job_count"] == 0
        bob.interrupt()
        assert rendering.result(20).image.size == (64, 64)


@pytest.mark.parametrize("name", ["open_webui_a1111", "sillytavern_a1111", "librechat_a1111"])
def test_recorded_client_requests_succeed(client, name):
    answers = dict(play(client, name))
    generated = answers["txt2img"]
    info = json.loads(generated["info"])
    assert len(generated["images"]) == 1
    image = Image.open(io.BytesIO(base64.b64decode(generated["images"][0], validate=True)))
    assert (image.mode, image.size) == ("RGBA", (info["width"], info["height"]))
    assert f"Seed: {info['seed']}" in info["infotexts"][0]


def test_txt2img_script_images_are_stored_once_and_used(tmp_path: Path):
    """Send the foreground as base64 and as a data URL, which is one stored file."""
    label = "(SDXL) From Foreground and Blending to Background"
    with served(put_model(tmp_path)) as client:
        for seed, foreground in ((1, PIXEL), (2, f"data:image/png;base64,{PIXEL}")):
            args = [True, label, 1, 0.5, foreground, None, PIXEL, "Resize and Fill"]
            answer = render(client, seed=seed, alwayson_scripts={"LayerDiffuse": {"args": args}})
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["images"]) == 1
        jobs = client.get("/alpha/v1/jobs").json()["jobs"]
        assert [job["state"] for job in jobs] == ["done", "done"]
    files = list((tmp_path / "outputs").glob("input_*.png"))
    assert len(files) == 1
    assert np.array_equal(codecs.decode(files[0].read_bytes())[0], np.full((2, 2, 4), 9))


def test_png_info_takes_base64_with_line_breaks(client):
    file = base64.b64decode(render(client, seed=7).json()["images"][0])
    shown = client.post("/sdapi/v1/png-info", json={"image": base64.encodebytes(file).decode()})
    assert shown.json()["items"] == {}
    assert (shown.json()["parameters"]["Seed"], shown.json()["parameters"]["Size-1"]) == ("7", "64")


def test_messages_name_no_absolute_path(tmp_path):
    put_model(tmp_path)
    (tmp_path / "models").rename(tmp_path / "weights")
    with served(tmp_path, models_dir=tmp_path / "weights", engine=None) as client:
        for fields in (
            {"prompt": "an apple <lora:nowhere:1>"},
            {"override_settings": {"sd_model_checkpoint": "nowhere"}},
        ):
            detail = render(client, **fields).json()["detail"]
            assert " in weights/" in detail
            assert str(tmp_path) not in detail


def test_options_of_all_settings_come_back_unchanged(client):
    options = client.get("/sdapi/v1/options").json()
    assert len(options) > 50
    assert client.post("/sdapi/v1/options", json=options).json() is None
    assert client.get("/sdapi/v1/options").json() == options


def test_options_that_are_set_are_used_and_returned(tmp_path):
    with served(put_model(tmp_path)) as client:
        sent = {"randn_source": "CPU", "eta_noise_seed_delta": 31337, "samples_format": "jpg"}
        client.post("/sdapi/v1/options", json=sent)
        options = client.get("/sdapi/v1/options").json()
        assert (options["randn_source"], options["eta_noise_seed_delta"]) == ("CPU", 31337)
        settings = settings_of(render(client))
        assert (settings["RNG"], settings["ENSD"]) == ("CPU", "31337")
        refused = client.post("/sdapi/v1/options", json={"eta_ddim": 2})
        assert refused.json()["detail"] == "eta_ddim: got 2.0; at most 1."


def test_script_info_has_all_arguments(client):
    script, _ = client.get("/sdapi/v1/script-info").json()
    values = [argument["value"] for argument in script["args"]]
    assert len(values) == 12
    answer = render(client, alwayson_scripts={script["name"]: {"args": values}})
    assert answer.status_code == 200, answer.text


def test_txt2img_script_images_without_layerdiffuse_are_ignored(client):
    args = [False, "(SDXL) From Foreground to Blending", 1, 1, PIXEL]
    answer = render(client, alwayson_scripts={"LayerDiffuse": {"args": args}})
    assert answer.status_code == 200, answer.text
