"""Checkpoint layouts of public sources, their settings, and how folders are read.

`python -m tests.unit.test_model_files` prints the table of docs/reference/file-layouts.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.header_files import (
    CLIP_L,
    CONTEXT,
    FIRST_CONV,
    SD15,
    SDXL,
    UNET,
    VAE,
    Shapes,
    write,
)

from alphalayer import catalog
from alphalayer.api.a1111.schemas import SdModel
from alphalayer.catalog import entries, files
from alphalayer.catalog.completeness import missing_tensor
from alphalayer.catalog.headers import read_header, summarize
from alphalayer.core.errors import CorruptFile, InvalidRequest
from alphalayer.core.request import ModelDefaults
from alphalayer.engine.families.configs import SHIPPED

TABLES = Path(__file__).parents[2] / "docs" / "reference" / "file-layouts.md"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
V_YAML = "model:\n  params:\n    parameterization: 'v'\n"
SGM_YAML = """
model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    denoiser_config:
      params:
        scaling_config:
          target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling
"""
LORA: Shapes = {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (8, 640)}


@dataclass(frozen=True)
class Layout:
    """A layout: writes files for the model "cup", what becomes of it, and part of the error."""

    name: str
    make: Callable[[Path], object]
    result: str = "read"
    error: str = ""


def checkpoint(
    *without: str, dtype: str = "F16", header: dict[str, str] | None = None, **texts: str
) -> Callable[[Path], object]:
    """Return a writer of a single file, without some tensors, and of texts beside it."""

    def make(folder: Path) -> None:
        shapes = {name: shape for name, shape in SDXL.items() if name not in without}
        write(folder / "cup.safetensors", shapes, dtype=dtype, metadata=header)
        for suffix, text in texts.items():
            (folder / f"cup.{suffix}").write_text(text)

    return make


def tensors(shapes: Shapes, base: Shapes | None = None) -> Callable[[Path], object]:
    """Return a writer of a single file with these tensors, and those of `base`."""
    return lambda folder: write(folder / "cup.safetensors", {**(base or {}), **shapes})


def named(*names: str, sides: tuple[int, ...] = (4, 4)) -> Callable[[Path], object]:
    """Return a writer of a file with tensors of these names."""
    return tensors(dict.fromkeys(names, sides))


def folder(
    *weights: str, part: str = "unet", without: str = "", shapes: Shapes | None = None
) -> Callable[[Path], object]:
    """Return a writer of a diffusers folder, one part of which has these weight files."""

    def make(models: Path) -> Path:
        path = models / "cup"
        shutil.copytree(SHIPPED, path)
        for each in PARTS:
            names = weights if weights and each == part else ("diffusion_pytorch_model",)
            for name in names:
                write(path / each / f"{name}.safetensors", shapes or {})
        if without:
            shutil.rmtree(path / without)
        return path

    return make


def _beside(vae: Shapes, base: Shapes) -> Callable[[Path], object]:
    def make(models: Path) -> None:
        write(models / "cup.safetensors", base)
        write(models / "cup.vae.safetensors", vae)

    return make


def _sd15_folder(models: Path) -> None:
    """Write a folder of SD 1.5 with the safety checker of the original."""
    path = folder(without="text_encoder_2")(models)
    assert isinstance(path, Path)
    shutil.rmtree(path / "tokenizer_2")
    write(path / "safety_checker" / "model.safetensors", {})
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    config = path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_linear_projection": False}))


def _linked(models: Path) -> None:
    """Write a snapshot of Hugging Face's cache: a linked folder of linked files."""
    snapshot = models.parent / "hub" / "snapshots" / "0123"
    made = folder()(snapshot.parent)
    assert isinstance(made, Path)
    made.rename(snapshot)
    blobs = models.parent / "hub" / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.rglob("*.*"))):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))
    (models / "cup").symlink_to(snapshot)


def _pickle(models: Path) -> None:
    models.mkdir(parents=True, exist_ok=True)
    (models / "cup.ckpt").write_bytes(b"pickle")


NO_VAE = {name: shape for name, shape in SDXL.items() if name not in VAE}
OWN_VAE = {name.removeprefix("first_stage_model."): shape for name, shape in VAE.items()}
TOKENIZERS = "holds neither tokenizer.json, nor vocab.json"
LAYOUTS = [
    Layout("LDM single file, float16", checkpoint()),
    Layout("LDM single file, bfloat16", checkpoint(dtype="BF16")),
    Layout("LDM single file, float32", checkpoint(dtype="F32")),
    Layout("LDM single file, fp8 (e4m3)", checkpoint(dtype="F8_E4M3")),
    Layout("LDM single file, fp8 (e5m2)", checkpoint(dtype="F8_E5M2")),
    Layout(
        "LDM single file, scaled fp8 (scale_weight)",
        tensors({"scaled_fp8": (0,), f"{UNET}a.scale_weight": ()}, SDXL),
    ),
    Layout(
        "LDM single file, scaled fp8 (weight_scale, comfy_quant)",
        tensors({f"{UNET}a.weight_scale": (), f"{UNET}a.comfy_quant": (20,)}, SDXL),
    ),
    Layout("LDM single file with EMA", tensors({"model_ema.decay": ()}, SDXL)),
    Layout(
        "LDM single file, CLIP-L without text_model.",
        lambda f: write(
            f / "cup.safetensors",
            {name.replace("text_model.", ""): shape for name, shape in SDXL.items()},
        ),
    ),
    Layout("LDM single file, inpainting", tensors({FIRST_CONV: (320, 9, 3, 3)}, SDXL)),
    Layout("LDM single file, suffix in capitals", lambda f: write(f / "cup.SAFETENSORS", SDXL)),
    Layout(
        "v-prediction by a tensor (v_pred)", tensors({"v_pred": ()}, SDXL), "read, v-prediction"
    ),
    Layout(
        "v-prediction and zero SNR by tensors (v_pred, ztsnr)",
        tensors({"v_pred": (), "ztsnr": ()}, SDXL),
        "read, v-prediction, zero SNR",
    ),
    Layout("zero SNR by a tensor (ztsnr)", tensors({"ztsnr": ()}, SDXL), "read, zero SNR"),
    Layout(
        "v-prediction by the header (v)",
        checkpoint(header={"modelspec.prediction_type": "v"}),
        "read, v-prediction",
    ),
    Layout(
        "v-prediction by the header (v_prediction)",
        checkpoint(header={"modelspec.prediction_type": "v_prediction"}),
        "read, v-prediction",
    ),
    Layout(
        "epsilon by the header, v in the YAML file",
        checkpoint(header={"modelspec.prediction_type": "epsilon"}, yaml=V_YAML),
    ),
    Layout("v-prediction by a .yaml file", checkpoint(yaml=V_YAML), "read, v-prediction"),
    Layout("v-prediction by a .yml file", checkpoint(yml=V_YAML), "read, v-prediction"),
    Layout(
        "v-prediction by VScaling in a .yaml file", checkpoint(yaml=SGM_YAML), "read, v-prediction"
    ),
    Layout(
        "epsilon in a .yaml file with v in a comment",
        checkpoint(yaml='# parameterization: "v"\nmodel:\n  params:\n    parameterization: eps\n'),
    ),
    Layout(
        "v-prediction by a .toml file",
        checkpoint(toml='prediction_type = "v_prediction"\nzero_snr = true\n'),
        "read, v-prediction, zero SNR",
    ),
    Layout(
        "epsilon by a .toml file, against a tensor v_pred",
        lambda f: (
            tensors({"v_pred": ()}, SDXL)(f),
            (f / "cup.toml").write_text('prediction_type = "epsilon"'),
        ),
    ),
    Layout("VAE beside a whole checkpoint", _beside(VAE, SDXL)),
    Layout("VAE beside a checkpoint without one", _beside(VAE, NO_VAE)),
    Layout("VAE beside a checkpoint, without first_stage_model.", _beside(OWN_VAE, NO_VAE)),
    Layout(
        "VAE beside a checkpoint, names of diffusers",
        _beside({"encoder.down_blocks.0.a": (1,), "encoder.conv_in.weight": (1,)}, SDXL),
        "refused: the VAE has the names of diffusers",
        "has the tensor names of diffusers",
    ),
    Layout(
        "LDM single file without VAE",
        tensors(NO_VAE),
        "refused: without VAE",
        "without its whole VAE",
    ),
    Layout(
        "LDM single file that lacks a tensor",
        checkpoint(FIRST_CONV.replace("weight", "bias")),
        "refused: incomplete",
        "input_blocks.0.0.bias is missing",
    ),
    Layout(
        "LDM single file that lacks a layer of a text encoder",
        tensors(
            {f"conditioner.embedders.1.model.transformer.resblocks.{i}.x": (1,) for i in (0, 2)},
            SDXL,
        ),
        "refused: incomplete",
        "resblocks.1.x is missing",
    ),
    Layout(
        "LDM single file that is cut off",
        lambda f: write(f / "cup.safetensors", SDXL, missing=9),
        "refused: cut off",
        "is cut off: 9 of",
    ),
    Layout("diffusers folder", folder()),
    Layout("diffusers folder, fp16 file names", folder("diffusion_pytorch_model.fp16")),
    Layout(
        "diffusers folder, plain and fp16 file names",
        folder("diffusion_pytorch_model", "diffusion_pytorch_model.fp16"),
    ),
    Layout(
        "diffusers folder with non_ema weights",
        folder("diffusion_pytorch_model", "diffusion_pytorch_model.non_ema"),
    ),
    Layout(
        "diffusers folder, sharded weights",
        folder(*(f"diffusion_pytorch_model-0000{i}-of-00002" for i in (1, 2))),
    ),
    Layout(
        "diffusers folder, sharded fp16 weights",
        folder(*(f"diffusion_pytorch_model.fp16-0000{i}-of-00002" for i in (1, 2))),
    ),
    Layout(
        "diffusers folder that lacks a shard",
        folder("diffusion_pytorch_model-00001-of-00002"),
        "refused: incomplete",
        "1 of 2 weight files are there",
    ),
    Layout(
        "diffusers folder that lacks a tensor",
        folder("diffusion_pytorch_model", shapes={"conv_in.weight": (4,)}),
        "refused: incomplete",
        "conv_in.bias is missing",
    ),
    Layout(
        "diffusers folder without tokenizer_2",
        folder(without="tokenizer_2"),
        "refused: incomplete",
        TOKENIZERS,
    ),
    Layout("diffusers folder without VAE", folder(without="vae"), "refused: incomplete", "vae"),
    Layout("linked snapshot of Hugging Face's cache", _linked),
    Layout(
        "SDXL UNet, LDM names",
        tensors({CONTEXT.removeprefix(UNET): (640, 2048)}),
        "refused: UNet alone",
        "Stable Diffusion XL UNet",
    ),
    Layout(
        "SDXL UNet, LDM names with prefix",
        tensors({CONTEXT: (640, 2048)}),
        "refused: UNet alone",
        "Stable Diffusion XL UNet",
    ),
    Layout(
        "SDXL UNet, diffusers names",
        named(
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", sides=(640, 2048)
        ),
        "refused: UNet alone",
        "Stable Diffusion XL UNet",
    ),
    Layout(
        "SD 1.5 UNet, diffusers names",
        named(
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", sides=(320, 768)
        ),
        "refused: UNet alone",
        "Stable Diffusion 1.5 UNet",
    ),
    Layout("SD 1.5, LDM single file", tensors(SD15)),
    Layout("SD 1.5, LDM single file with EMA", tensors({"model_ema.decay": ()}, SD15)),
    Layout(
        "SD 1.5, LDM single file, CLIP-L without text_model.",
        tensors({name.replace("text_model.", ""): shape for name, shape in SD15.items()}),
    ),
    Layout(
        "SD 1.5, v-prediction by a tensor (v_pred)",
        tensors({"v_pred": ()}, SD15),
        "read, v-prediction",
    ),
    Layout("SD 1.5, diffusers folder", _sd15_folder),
    Layout(
        "SD 1.5 without VAE",
        tensors({name: shape for name, shape in SD15.items() if name not in VAE}),
        "refused: without VAE",
        "without its whole VAE",
    ),
    Layout(
        "SD 1.5 that lacks a layer of the text encoder",
        tensors(
            {f"cond_stage_model.transformer.text_model.layers.{i}.x": (1,) for i in (0, 2)}, SD15
        ),
        "refused: incomplete",
        "layers.1.x is missing",
    ),
    Layout(
        "SD 1.5 UNet, LDM names",
        tensors({CONTEXT: (640, 768)}),
        "refused: UNet alone",
        "Stable Diffusion 1.5 UNet",
    ),
    Layout("SD 1.5 inpainting", tensors({FIRST_CONV: (320, 9, 3, 3)}, SD15)),
    Layout("SD 2", tensors({CONTEXT: (640, 1024)}), "refused: SD 2", "Stable Diffusion 2"),
    Layout("SDXL refiner", tensors({CONTEXT: (768, 1280)}), "refused: refiner", "refiner"),
    Layout(
        "SD 3 and 3.5",
        named(f"{UNET}joint_blocks.0.context_block.attn.qkv.weight"),
        "refused: SD 3",
        "Stable Diffusion 3",
    ),
    Layout(
        "Flux, with prefix",
        named(f"{UNET}double_blocks.0.img_attn.qkv.weight"),
        "refused: Flux",
        "Flux",
    ),
    Layout("Flux, without prefix", named("double_blocks.0.x.weight"), "refused: Flux", "Flux"),
    Layout("ControlNet, LDM names", named("control_model.x"), "refused: ControlNet", "ControlNet"),
    Layout(
        "ControlNet, diffusers names",
        named("controlnet_cond_embedding.conv_in.weight"),
        "refused: ControlNet",
        "ControlNet",
    ),
    Layout(
        "ControlNet-LoRA", named("input_hint_block.0.weight"), "refused: ControlNet", "ControlNet"
    ),
    Layout("IP-Adapter", named("ip_adapter.1.to_k_ip.weight"), "refused: IP-Adapter", "IP-Adapter"),
    Layout("VAE alone", tensors(OWN_VAE), "refused: VAE", "is a VAE"),
    Layout(
        "CLIP text encoder", named("text_model.encoder.x"), "refused: text encoder", "text encoder"
    ),
    Layout("T5 text encoder", named("encoder.block.0.x"), "refused: text encoder", "text encoder"),
    Layout(
        "SDXL embedding", named("clip_l", "clip_g"), "refused: embedding", "Move it to embeddings/"
    ),
    Layout(
        "SD 1.5 embedding",
        tensors({"emb_params": (2, 768)}),
        "refused: embedding",
        "Move it to embeddings/",
    ),
    Layout(
        "SD 2 embedding",
        tensors({"emb_params": (2, 1024)}),
        "refused: embedding",
        "of another family",
    ),
    Layout("ESRGAN upscaler", named("model.1.sub.0.RDB1.x"), "refused: upscaler", "is an upscaler"),
    Layout("LoRA", tensors(LORA), "refused: LoRA", "Move it to Lora/"),
    Layout(
        "LayerDiffuse patch",
        named("diffusion_model.x::lora::0"),
        "refused: LayerDiffuse",
        "Move it to layer_model/",
    ),
    Layout("pickle file (.ckpt)", _pickle, "refused: pickle", "is a pickle file"),
]


def _find(models_dir: Path, name: str = "cup") -> catalog.ModelEntry:
    return next(entry for entry in catalog.find_models(models_dir) if entry.name == name)


def _result(entry: catalog.ModelEntry) -> str:
    """Return what becomes of a model that can be used."""
    config = (
        catalog.read_json(entry.path / "scheduler" / "scheduler_config.json")
        if entry.kind == "diffusers"
        else catalog.scheduler_of(entry.path, read_header(entry.path))
    )
    is_v = config["prediction_type"] == "v_prediction"
    zero_snr = config.get("rescale_betas_zero_snr")
    return "read" + ", v-prediction" * is_v + ", zero SNR" * bool(zero_snr)


def test_page_lists_every_checkpoint_layout_with_its_result():
    section = TABLES.read_text(encoding="utf-8").partition("## Checkpoint layouts\n")[2]
    rows = re.findall(
        r"^\| (?!layout|---)(.+?) \| (.+?) \|$", section.partition("\n## ")[0], re.MULTILINE
    )
    assert dict(rows) == {layout.name: layout.result for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_checkpoint_layout_is_read_or_refused_by_name(tmp_path: Path, layout: Layout):
    folder = tmp_path / "Stable-diffusion"
    folder.mkdir()
    layout.make(folder)
    entry = _find(tmp_path)
    if layout.error:
        assert layout.error in f"{entry.problem}"
    else:
        assert entry.problem is None
        assert _result(entry) == layout.result


# --- settings beside a file


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        ("toml", "prediction_type = 5", "prediction_type: expected"),
        ("toml", 'prediction_type = "x"', "prediction_type: expected"),
        ("toml", 'prediction_type = ["v"]', "prediction_type: expected"),
        ("toml", "prediction_type = {a = 1}", "prediction_type: expected"),
        ("toml", "a = 1" + "0" * 5000, "is not TOML"),
        ("toml", "zero_snr = 1", "zero_snr: expected true or false"),
        ("toml", "defaults = 1", "defaults: expected a table"),
        ("toml", "[defaults", "is not TOML"),
        ("toml", "a = " + "[" * 60_000, "is not TOML"),
        ("toml", "#" * 70_000, "more than 64,000 bytes"),
    ],
)
def test_wrong_toml_file_is_the_problem_of_its_model(
    tmp_path: Path, suffix: str, text: str, message: str
):
    checkpoint(**{suffix: text})(tmp_path / "Stable-diffusion")
    entry = _find(tmp_path)
    assert isinstance(entry.problem, CorruptFile)
    assert message in entry.problem.message
    assert "cup.toml" in entry.problem.message


@pytest.mark.parametrize(
    "text",
    ["a: [", "[" * 450, "a: \x01", "- &a [*a, *a]"],
    ids=["open", "deep", "control", "recursive"],
)
def test_damaged_yaml_file_is_named(tmp_path: Path, text: str):
    checkpoint(yaml=text)(tmp_path)
    file = tmp_path / "cup.safetensors"
    with pytest.raises(CorruptFile, match=r"cup\.yaml: it is not YAML"):
        catalog.scheduler_of(file, read_header(file))


def test_defaults_come_from_the_toml_file_the_name_and_sdxl(tmp_path: Path):
    file = tmp_path / "sdxl_lightning_4step.safetensors"
    write(file, SDXL)
    named = catalog.model_defaults(file)
    assert (named.steps, named.sampler, named.scheduler) == (4, "Euler", "SGM Uniform")
    assert (named.cfg_scale, named.width) == (1, 1024)
    file.with_suffix(".toml").write_text("[defaults]\nsteps = 6\nwidth = 768")
    assert catalog.model_defaults(file) == named.model_copy(update={"steps": 6, "width": 768})
    file.with_suffix(".toml").write_text("[defaults]\nsteps = 600")
    with pytest.raises(CorruptFile, match=r"sdxl_lightning_4step\.toml: defaults\.steps"):
        catalog.model_defaults(file)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd_xl_turbo_1.0_fp16", (4, "Euler a", 1, 512)),
        ("dreamshaperXL_lightningDPMSDE", (8, "DPM++ SDE", 2, 1024)),
        ("Hyper-SDXL-8step", (8, "Euler", 1, 1024)),
        ("realvis_hyper", (8, "Euler", 1, 1024)),
        ("model_dmd2", (4, "LCM", 1, 1024)),
        ("some-LCM-v2", (8, "LCM", 1.5, 1024)),
        ("hyperrealistic", (20, "DPM++ 2M SDE", 5, 1024)),
        ("welcome", (20, "DPM++ 2M SDE", 5, 1024)),
        ("xl_lightning_1000steps", (8, "Euler", 1, 1024)),
        ("epoch10_step2000_lightning", (8, "Euler", 1, 1024)),
        ("lightning_4stepV2", (4, "Euler", 1, 1024)),
        ("cupXL_v21TurboDPMSDE", (8, "DPM++ SDE", 2, 1024)),
        ("cupxlturbo", (8, "DPM++ SDE", 2, 1024)),
        ("SDXLTurbo", (4, "Euler a", 1, 512)),
        ("cup_nonturbo", (20, "DPM++ 2M SDE", 5, 1024)),
        ("cupNonTurbo", (20, "DPM++ 2M SDE", 5, 1024)),
        ("non-lightning", (20, "DPM++ 2M SDE", 5, 1024)),
        ("canon_turbo", (8, "DPM++ SDE", 2, 1024)),
    ],
)
def test_few_step_models_have_the_defaults_of_their_name(tmp_path: Path, name: str, expected):
    defaults = catalog.model_defaults(tmp_path / f"{name}.safetensors")
    actual = defaults.steps, defaults.sampler, defaults.cfg_scale, defaults.width
    assert actual == expected
    assert isinstance(defaults, ModelDefaults)


def test_few_step_models_have_the_defaults_of_their_title(tmp_path: Path):
    path = write(
        tmp_path / "cup.safetensors", SDXL, metadata={"modelspec.title": "XL Lightning 4step"}
    )
    assert catalog.model_defaults(path).steps == 4
    named = write(
        tmp_path / "cup_lcm.safetensors", SDXL, metadata={"modelspec.title": "Cup XL Turbo"}
    )
    assert catalog.model_defaults(named).sampler == "LCM"


def test_defaults_of_sd15_are_its_own(tmp_path: Path):
    defaults = catalog.model_defaults(tmp_path / "cup.safetensors", "sd15")
    assert (defaults.width, defaults.height, defaults.steps) == (512, 512, 20)
    assert (defaults.sampler, defaults.scheduler, defaults.cfg_scale) == ("DPM++ 2M", "Karras", 7)
    few = catalog.model_defaults(tmp_path / "lcm.safetensors", "sd15")
    assert (few.width, few.sampler, few.steps) == (512, "LCM", 8)


def test_changed_files_beside_a_model_change_its_stamp(tmp_path: Path):
    folder = tmp_path / "Stable-diffusion"
    checkpoint()(folder)
    stamps = [_find(tmp_path).stamp]
    for name in ("cup.toml", "cup.yaml"):
        (folder / name).write_text("")
        stamps.append(_find(tmp_path).stamp)
    write(folder / "cup.vae.safetensors", VAE)
    stamps.append(_find(tmp_path).stamp)
    assert len(set(stamps)) == 4


@pytest.mark.parametrize(
    "text",
    [
        "5",
        "- &a [1]\n- &b [*a, *a]\n- [*b, *b]",
        "model: {params: [1]}",
        "parameterization: x",
        "a: 2001-99-99",
        "a: !!timestamp x",
        "a: !!int ''",
        "a: !!bool x",
    ],
)
def test_other_yaml_file_is_no_setting(tmp_path: Path, text: str):
    checkpoint(yaml=text)(tmp_path)
    file = tmp_path / "cup.safetensors"
    assert catalog.scheduler_of(file, read_header(file))["prediction_type"] == "epsilon"


# --- folders


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path):
    disk, folder = tmp_path / "disk", tmp_path / "models" / "Stable-diffusion"
    write(disk / "deep" / "cup.safetensors", SDXL)
    write(folder / "own" / "plate.safetensors", SDXL)
    (disk / "deep" / "back").symlink_to(disk)
    (disk / "up").symlink_to(folder)
    for name in ("a", "b"):
        (folder / name).symlink_to(disk)
    (folder / "again").symlink_to(folder / "own")
    (folder / "circle").symlink_to("circle")
    names = [entry.name for entry in catalog.find_models(tmp_path / "models")]
    assert names[:-1] == ["a_deep_cup", "own_plate"]


@pytest.mark.parametrize("name", ["Lora", "embeddings"])
def test_linked_folders_of_other_files_are_read(tmp_path: Path, name: str):
    write(tmp_path / "disk" / "style.safetensors", LORA)
    (tmp_path / name).mkdir()
    (tmp_path / name / "more").symlink_to(tmp_path / "disk")
    paths = catalog.usable_files(tmp_path / name)
    assert paths == [tmp_path / name / "more" / "style.safetensors"]


def test_folder_with_too_many_files_is_listed_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "MAX_ENTRIES", 3)
    monkeypatch.setattr(files, "MAX_DEPTH", 1)
    for i in range(5):
        (tmp_path / "wide" / f"{i}.safetensors").parent.mkdir(exist_ok=True)
        (tmp_path / "wide" / f"{i}.safetensors").touch()
    write(tmp_path / "deep" / "a" / "b" / "c.safetensors", {})
    assert len(files.list_files(tmp_path / "wide", lambda _: True)) == 3
    assert files.list_files(tmp_path / "deep", lambda name: name == "c.safetensors") == []


@pytest.mark.parametrize("name", ["._cup", ".Trash-0/cup", ".cup"])
def test_hidden_files_are_no_models(tmp_path: Path, name: str):
    for folder in ("Stable-diffusion", "Lora"):
        write(tmp_path / folder / f"{name}.safetensors", SDXL)
        write(tmp_path / folder / "good.safetensors", SDXL)
    assert catalog.resolve_model(None, catalog.find_models(tmp_path)).name == "good"
    assert len(catalog.find_models(tmp_path)) == 2
    assert [path.stem for path in catalog.usable_files(tmp_path / "Lora")] == ["good"]


def test_hidden_file_among_weights_is_not_read(tmp_path: Path):
    write(tmp_path / "model.safetensors", {})
    (tmp_path / "._model.safetensors").write_bytes(b"of macOS")
    assert catalog.weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_models_of_one_name_are_named_by_their_path(tmp_path: Path):
    folder = tmp_path / "Stable-diffusion"
    paths = [folder / "a" / "b.safetensors", folder / "a_b.safetensors"]
    for path in paths:
        write(path, SDXL)
    entries = catalog.find_models(tmp_path)[:-1]
    assert [entry.name for entry in entries] == ["a/b", "a_b"]
    titles = [SdModel.of(entry, tmp_path).title for entry in entries]
    assert titles == ["a/b.safetensors", "a_b.safetensors"]
    for entry in entries:
        assert catalog.resolve_model(SdModel.of(entry, tmp_path).title, entries) is entry
        assert catalog.resolve_model(entry.name, entries) is entry
        assert catalog.resolve_model(entry.title, entries) is entry


def test_pickle_of_the_same_name_has_a_name_and_title_of_its_own(tmp_path: Path):
    checkpoint()(tmp_path / "Stable-diffusion")
    _pickle(tmp_path / "Stable-diffusion")
    entries = catalog.find_models(tmp_path)[:-1]
    assert [entry.name for entry in entries] == ["cup", "cup.ckpt"]
    titles = [SdModel.of(entry, tmp_path).title for entry in entries]
    assert titles == ["cup.safetensors", "cup.ckpt"]


def test_folder_named_as_the_embedded_model_is_another_model(tmp_path: Path):
    made = folder()(tmp_path / "Stable-diffusion")
    assert isinstance(made, Path)
    own = made.rename(made.with_name(catalog.EMBEDDED_MODEL.name))
    entries = catalog.find_models(tmp_path)
    names = ["alphalayer-mini", "builtin_models/alphalayer-mini"]
    assert [entry.name for entry in entries] == names
    paths = [catalog.resolve_model(name, entries).path for name in names]
    assert paths == [own, catalog.EMBEDDED_MODEL]


# --- one bad file


def test_unexpected_error_is_the_problem_of_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(path: Path) -> object:
        if path.stem == "cup":
            raise ZeroDivisionError("broken")
        return read_settings(path)

    read_settings = entries.read_settings
    monkeypatch.setattr(entries, "read_settings", fail)
    models = tmp_path / "Stable-diffusion"
    checkpoint()(models)
    write(models / "good.safetensors", SDXL)
    for _ in range(2):
        assert "unexpected error" in f"{_find(tmp_path).problem}"
        assert _find(tmp_path, "good").problem is None
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "cup.safetensors" in record.message


@pytest.mark.parametrize(
    "vae",
    [
        {CONTEXT: (768, 1280), FIRST_CONV: (1, 9)},
        {CONTEXT: (1, 7), FIRST_CONV: (1, 9)},
        {"x": (1,)},
    ],
    ids=["refiner", "other", "unknown"],
)
def test_other_file_in_place_of_a_vae_is_named(tmp_path: Path, vae: Shapes):
    _beside(vae, SDXL)(tmp_path / "Stable-diffusion")
    message = f"{_find(tmp_path).problem}"
    assert "cup.vae.safetensors is " in message
    assert ", not a VAE." in message
    assert "is a unknown" not in message


def test_numbers_of_many_digits_in_names_are_read(tmp_path: Path):
    name = f"conditioner.embedders.0.layers.{'9' * 5000}.a"
    tensors({name: (1,)}, SDXL)(tmp_path / "Stable-diffusion")
    assert _find(tmp_path).problem is None


def test_long_name_is_checked_in_linear_time():
    start = time.process_time()
    assert missing_tensor({"conditioner" + ".layers.1" * 20_000 + "\n": (1,)}) == ""
    # a quadratic search takes minutes
    assert time.process_time() - start < 2


def test_checkpoint_without_the_first_text_encoder_is_refused(tmp_path: Path):
    checkpoint(CLIP_L)(tmp_path / "Stable-diffusion")
    assert "without both text encoders" in f"{_find(tmp_path).problem}"


# --- names of LoRAs


def _lora(tmp_path: Path, path: str, alias: str = "") -> Path:
    metadata = {"ss_output_name": alias} if alias else None
    return write(tmp_path / "Lora" / f"{path}.safetensors", LORA, metadata=metadata)


def test_lora_file_name_counts_before_its_alias(tmp_path: Path):
    first, second = _lora(tmp_path, "one", "trained"), _lora(tmp_path, "two", "one")
    assert catalog.find_lora(tmp_path, "trained") == first
    assert catalog.find_lora(tmp_path, "one") == first
    assert catalog.find_lora(tmp_path, "two") == second


def test_lora_name_of_several_files_is_refused_with_their_paths(tmp_path: Path):
    files = [_lora(tmp_path, f"{folder}/style", "alias") for folder in ("a", "b")]
    for name in ("style", "alias"):
        with pytest.raises(InvalidRequest, match=r"2 LoRAs.*a/style, b/style"):
            catalog.find_lora(tmp_path, name)
    assert [catalog.find_lora(tmp_path, f"{folder}/style") for folder in ("a", "b")] == files
    top = _lora(tmp_path, "style")
    assert catalog.find_lora(tmp_path, "style") == top


def test_metadata_is_text_that_can_be_sent_and_limited(tmp_path: Path):
    file = _lora(tmp_path, "style")
    header = {"__metadata__": {"a": "\ud800", "long": "x" * 200_000, "n": 5, "b": "1"}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    assert catalog.lora_metadata(file) == {"a": "?", "b": "1"}
    assert len(read_header(file).metadata["long"]) == 200_000
    file.write_bytes(b"damaged")
    os.utime(file, ns=(0, 0))
    assert catalog.lora_metadata(file) == {}
    assert catalog.lora_alias(file) == []


def test_summary_of_a_lora_keeps_its_alias_alone(tmp_path: Path):
    metadata = {"ss_output_name": "trained", "ss_tag_frequency": "x" * 50_000}
    file = write(tmp_path / "style.safetensors", LORA, metadata=metadata)
    summary = summarize(file)
    assert summary.alias == "trained"
    assert len(repr(summary)) < 1000
    assert len(catalog.lora_metadata(file)["ss_tag_frequency"]) == 50_000


if __name__ == "__main__":
    for row in LAYOUTS:
        print(f"| {row.name} | {row.result} |")
