"""The models folder: families by tensor shapes, unusable files, names, hashes and their cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.header_files import (
    ATTENTION,
    CLIP_G,
    MIDDLE,
    SD15,
    SDXL,
    UNET,
    VAE,
    Shapes,
    write,
)

from alphalayer import catalog
from alphalayer.api.a1111.schemas import SdModel
from alphalayer.catalog import download, headers
from alphalayer.catalog.hashes import HashCache
from alphalayer.catalog.headers import read_header
from alphalayer.catalog.kinds import CONTEXT, FIRST_CONV, SD15_TEXT, SUPPORTED, VAE_MARKS, family_of
from alphalayer.core.errors import (
    CorruptFile,
    InvalidRequest,
    ModelNotFound,
    PickleRefused,
    UnsupportedFamily,
)
from alphalayer.engine.families.configs import SHIPPED
from alphalayer.engine.text.textual_inversion import read_embeddings

# the tensors by which families differ, with the shapes of the published checkpoints
FAMILIES: dict[str, Shapes] = {
    "sdxl": SDXL,
    "edit": {**SDXL, FIRST_CONV: (320, 8, 3, 3)},
    "sdxl-edm": {**SDXL, "edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)},
    "sdxl-no-vae": {name: shape for name, shape in SDXL.items() if name not in VAE},
    "sdxl-refiner": {
        FIRST_CONV: (384, 4, 3, 3), CONTEXT: (768, 1280), MIDDLE: (1536,),
        "conditioner.embedders.0.model.token_embedding.weight": (49408, 1280),
    },
    "sdxl-unet": {
        FIRST_CONV.removeprefix(UNET): (320, 4, 3, 3), CONTEXT.removeprefix(UNET): (640, 2048),
    },
    "ssd-1b": {
        FIRST_CONV: (320, 4, 3, 3), CONTEXT: (640, 2048), CLIP_G: (49408, 1280),
        UNET + "middle_block.0.x": (1280,),
    },
    "sd15": SD15,
    "sd15-no-vae": {name: shape for name, shape in SD15.items() if name not in VAE},
    "sd15-unet": {FIRST_CONV: (320, 4, 3, 3), CONTEXT: (640, 768), **VAE},
    "sd2": {
        FIRST_CONV: (320, 4, 3, 3), CONTEXT: (640, 1024),
        "cond_stage_model.model.ln_final.weight": (1024,),
    },
    "sd2-inpaint": {FIRST_CONV: (320, 9, 3, 3), CONTEXT: (640, 1024)},
    "vae": {"first_stage_model.post_quant_conv.weight": (4, 4, 1, 1)},
    "lora": {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (8, 640)},
    "layerdiffuse-patch": {
        f"{ATTENTION}.to_q.weight::lora::0": (640, 256),
    },
    "transparent-decoder": {"latent_conv_in.weight": (64, 4, 1, 1)},
    "unknown": {"something.weight": (3, 3)},
}  # fmt: skip


def _without(shapes: Shapes, name: str) -> Shapes:
    return {other: shape for other, shape in shapes.items() if other != name}


def _find_own_models(models_dir: Path) -> dict[str, catalog.ModelEntry]:
    """Return the models of a folder by name, without the embedded model."""
    return {
        entry.name: entry
        for entry in catalog.find_models(models_dir)
        if models_dir in entry.path.parents
    }


# --- families


def test_family_of_other_marker_tensors_is_the_same(tmp_path: Path):
    same: list[tuple[str, Shapes]] = [
        ("sdxl-edm", {**SDXL, "edm_vpred.sigma_max": ()}),
        ("sdxl-no-vae", {name: shape for name, shape in SDXL.items() if name != VAE_MARKS[0]}),
        ("sdxl", {**SDXL, "v_pred": (), "ztsnr": ()}),
        ("sdxl", {**SDXL, FIRST_CONV: (320, 9, 3, 3)}),
        ("edit", {FIRST_CONV: (320, 8, 3, 3), CONTEXT: (640, 768)}),
        ("sd15", {**_without(SD15, SD15_TEXT[0]), SD15_TEXT[1]: (49408, 768)}),
        ("sd15", {**SD15, CONTEXT: (640, 32)}),
        ("sd15", {**SD15, FIRST_CONV: (320, 9, 3, 3)}),
        ("text-encoder", {SD15_TEXT[0]: (49408, 768)}),
        ("embedding", {"emb_params": (3, 768)}),
        ("embedding", {"<cup>": (768,)}),
        ("embedding-other", {"emb_params": (3, 1024)}),
        ("unknown", {"<cup>": (1024,)}),
    ]
    for family, shapes in same:
        assert (
            family_of(read_header(write(tmp_path / "model.safetensors", shapes)).shapes) == family
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_family_of_tensor_shapes_is_recognized(tmp_path: Path, family: str):
    assert (
        family_of(read_header(write(tmp_path / "model.safetensors", FAMILIES[family])).shapes)
        == family
    )


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SUPPORTED])
def test_unsupported_family_is_named(tmp_path: Path, family: str):
    write(tmp_path / "Stable-diffusion" / "other.safetensors", FAMILIES[family])
    entry = _find_own_models(tmp_path)["other"]
    assert isinstance(entry.problem, UnsupportedFamily)
    assert "other.safetensors" in entry.problem.message
    assert catalog.FAMILY_NAMES[family] in entry.problem.message
    with pytest.raises(UnsupportedFamily):
        catalog.resolve_model("other", [entry])


@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("layerdiffuse-patch", "layer_model"),
        ("transparent-decoder", "layer_model"),
        ("lora", "Lora"),
    ],
)
def test_file_in_the_wrong_folder_names_the_right_folder(tmp_path: Path, family: str, place: str):
    write(tmp_path / "Stable-diffusion" / "other.safetensors", FAMILIES[family])
    problem = _find_own_models(tmp_path)["other"].problem
    assert problem is not None
    assert place in problem.hint


# --- damaged files


def _problem(tmp_path: Path) -> str:
    problem = _find_own_models(tmp_path)["bad"].problem
    assert isinstance(problem, CorruptFile)
    assert "bad.safetensors" in problem.message
    return problem.message


def test_truncated_file_reports_the_missing_bytes(tmp_path: Path):
    write(tmp_path / "Stable-diffusion" / "bad.safetensors", FAMILIES["sdxl"], missing=1234)
    assert "1,234 of" in _problem(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        b"<html>404 Not Found</html>" * 20,
        struct.pack("<Q", 10**15) + b"{}",
        struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<Q", 10) + b'{"a": 123}',
        struct.pack("<Q", 25) + b'{"a": {"shape": [1, "x"]}}'[:25],
        struct.pack("<Q", 50) + b'{"a": {"shape": [1], "data_offsets": [0]}}'.ljust(50),
        struct.pack("<Q", 60_000) + b"[" * 60_000,
    ],
)
def test_damaged_header_is_a_clear_error(tmp_path: Path, content: bytes):
    folder = tmp_path / "Stable-diffusion"
    folder.mkdir()
    (folder / "bad.safetensors").write_bytes(content)
    assert "safetensors" in _problem(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80))
def test_header_of_any_bytes_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: bytes
):
    path = tmp_path_factory.mktemp("headers") / "any.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    # any other exception fails the test
    with suppress(CorruptFile):
        assert family_of(read_header(path).shapes) in catalog.FAMILY_NAMES


@pytest.mark.parametrize("suffix", catalog.PICKLE_SUFFIXES)
def test_pickle_file_is_refused_and_never_opened(tmp_path: Path, suffix: str):
    folder = tmp_path / "Stable-diffusion"
    folder.mkdir()
    # opening this one as a pickle would leave a file behind
    trace = tmp_path / "opened"
    (folder / f"old{suffix}").write_bytes(f"cos\nsystem\n(S'touch {trace}'\ntR.".encode())
    problem = _find_own_models(tmp_path)["old"].problem
    assert isinstance(problem, PickleRefused)
    assert "run any code" in problem.message
    assert ".safetensors" in problem.hint
    assert not trace.exists()


# --- names


def test_model_name_comes_from_its_path(tmp_path: Path):
    for relative in ("plain", "sub/deep/model", "b"):
        write(tmp_path / "Stable-diffusion" / f"{relative}.safetensors", FAMILIES["sdxl"])
    assert list(_find_own_models(tmp_path)) == ["b", "plain", "sub_deep_model"]
    assert all(entry.problem is None for entry in _find_own_models(tmp_path).values())


def _make_diffusers_folder(path: Path, index: object) -> Path:
    """Write a folder with the parts of SDXL base and placeholder weights."""
    shutil.copytree(SHIPPED, path)
    (path / "model_index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        write(path / part / "diffusion_pytorch_model.safetensors", {})
    return path


def _change_config(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_diffusers_folder_is_one_model(tmp_path: Path):
    _make_diffusers_folder(
        tmp_path / "Stable-diffusion" / "sub" / "xl", {"_class_name": "StableDiffusionXLPipeline"}
    )
    (entry,) = _find_own_models(tmp_path).values()
    assert (entry.name, entry.kind, entry.family, entry.problem) == (
        "sub_xl",
        "diffusers",
        "sdxl",
        None,
    )


@pytest.mark.parametrize(
    "pipeline",
    [
        "StableDiffusionXLImg2ImgPipeline",  # the refiner
        "FluxPipeline",
        5,
        None,
    ],
)
def test_diffusers_folder_of_another_pipeline_is_named(tmp_path: Path, pipeline: object):
    _make_diffusers_folder(tmp_path / "Stable-diffusion" / "other", {"_class_name": pipeline})
    problem = _find_own_models(tmp_path)["other"].problem
    assert isinstance(problem, UnsupportedFamily)
    assert str(pipeline) in problem.message


def test_diffusers_folders_of_sd15_and_sd2_differ_in_the_unet(tmp_path: Path):
    path = _make_diffusers_folder(
        tmp_path / "Stable-diffusion" / "old", {"_class_name": "StableDiffusionPipeline"}
    )
    for part in ("text_encoder_2", "tokenizer_2"):
        shutil.rmtree(path / part)
    assert _find_own_models(tmp_path)["old"].family == "sd2"
    config = path / "unet" / "config.json"
    _change_config(config, use_linear_projection=False)
    entry = _find_own_models(tmp_path)["old"]
    assert (entry.family, entry.problem) == ("sd15", None)
    _change_config(config, in_channels=9)
    assert _find_own_models(tmp_path)["old"].family == "sd15"
    _change_config(config, in_channels=4)
    shutil.rmtree(path / "text_encoder")
    assert "text_encoder" in str(_find_own_models(tmp_path)["old"].problem)


DEEP = '{"a":' + "[" * 60_000 + "]" * 60_000 + "}"


@pytest.mark.parametrize(
    ("file", "values", "family"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}, "edit"),
        ("unet/config.json", {"in_channels": 8}, "edit"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EDMDPMSolverMultistepScheduler"},
            "sdxl-edm",
        ),
        (
            "scheduler/scheduler_config.json",
            {"sigma_data": 1.0, "prediction_type": "v_prediction"},
            "sdxl-edm",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "sdxl-other"),
    ],
)
def test_diffusers_folder_of_another_family_is_refused(
    tmp_path: Path, file: str, values: dict, family: str
):
    path = _make_diffusers_folder(
        tmp_path / "Stable-diffusion" / "a", {"_class_name": "StableDiffusionXLPipeline"}
    )
    _make_diffusers_folder(
        tmp_path / "Stable-diffusion" / "b", {"_class_name": "StableDiffusionXLPipeline"}
    )
    _change_config(path / file, **values)
    entry = _find_own_models(tmp_path)["a"]
    assert entry.family == family
    assert isinstance(entry.problem, UnsupportedFamily)
    assert catalog.FAMILY_NAMES[family] in entry.problem.message
    assert catalog.resolve_model(None, list(_find_own_models(tmp_path).values())).name == "b"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "scheduler"])
def test_diffusers_folder_missing_part_is_named(tmp_path: Path, part: str):
    path = _make_diffusers_folder(
        tmp_path / "Stable-diffusion" / "a", {"_class_name": "StableDiffusionXLPipeline"}
    )
    shutil.rmtree(path / part)
    problem = _find_own_models(tmp_path)["a"].problem
    assert isinstance(problem, CorruptFile)
    assert str(path / part) in problem.message


@pytest.mark.parametrize("index", ["{", "[]", "", DEEP], ids=["open", "list", "empty", "deep"])
def test_diffusers_folder_damaged_index_is_named(tmp_path: Path, index: str):
    _make_diffusers_folder(tmp_path / "Stable-diffusion" / "bad", index)
    problem = _find_own_models(tmp_path)["bad"].problem
    assert isinstance(problem, CorruptFile)
    assert "model_index.json" in problem.message


def test_config_nested_too_deeply_is_damaged(tmp_path: Path):
    own = tmp_path / "layerdiffuse" / "config.json"
    own.parent.mkdir()
    own.write_text(DEEP)
    for read in (catalog.model_defaults, catalog.layer_config):
        with pytest.raises(CorruptFile, match=r"config\.json"):
            read(tmp_path)


def test_resolve_model_accepts_every_name_of_a_model(tmp_path: Path):
    write(tmp_path / "Stable-diffusion" / "sub" / "cup.safetensors", FAMILIES["unknown"])
    entry = _find_own_models(tmp_path)["sub_cup"]
    known = catalog.ModelEntry(entry.name, entry.path, entry.kind, "sdxl", "ab" * 32)
    assert known.title == "sub_cup [ababababab]"
    for name in (
        "sub_cup",
        "sub_cup [ababababab]",
        "cup.safetensors",
        "cup",
        "ab" * 32,
        "ababababab",
    ):
        assert catalog.resolve_model(name, [known]) is known
    # as Forge writes its titles
    for name in (
        "sub/cup.safetensors [0123456789]",
        r"sub\cup.safetensors [0123456789]",
        "sub/cup",
    ):
        assert catalog.resolve_model(name, [known]) is known


def test_resolve_model_prefers_a_usable_file_of_the_same_name(tmp_path: Path):
    folder = tmp_path / "Stable-diffusion"
    write(folder / "cup.safetensors", FAMILIES["sdxl"])
    (folder / "cup.ckpt").write_bytes(b"pickle")
    entries = catalog.find_models(tmp_path)
    assert catalog.resolve_model("cup", entries).path == folder / "cup.safetensors"
    with pytest.raises(PickleRefused):
        catalog.resolve_model("cup.ckpt", entries)
    (folder / "cup.safetensors").unlink()
    with pytest.raises(PickleRefused):
        catalog.resolve_model("cup", catalog.find_models(tmp_path))


def test_resolve_model_prefers_model_names_to_file_names():
    folder = Path("models", "Stable-diffusion")
    backup = catalog.ModelEntry(
        "backup_cup", folder / "backup" / "cup.safetensors", "single_file", "sdxl", "b" * 64
    )
    cup = catalog.ModelEntry("cup", folder / "cup.safetensors", "single_file", "sdxl", "a" * 64)
    for name in ("cup", "cup.safetensors", cup.title, "a" * 10, "cup.safetensors [0123456789]"):
        assert catalog.resolve_model(name, [backup, cup]) is cup
    # a hash outranks a name: the file was moved
    for name in ("backup/cup", backup.title, "cup.safetensors [bbbbbbbbbb]"):
        assert catalog.resolve_model(name, [backup, cup]) is backup
    damaged = replace(cup, problem=CorruptFile("cut off."))
    with pytest.raises(CorruptFile):
        catalog.resolve_model("cup", [backup, damaged])


def test_resolve_model_unknown_name_lists_the_models(tmp_path: Path):
    write(tmp_path / "Stable-diffusion" / "cup.safetensors", FAMILIES["sdxl"])
    with pytest.raises(ModelNotFound, match=r'"plate".*cup') as error:
        catalog.resolve_model("plate", list(_find_own_models(tmp_path).values()))
    assert error.value.field == "model"


def test_resolve_model_without_a_name_returns_first_usable(tmp_path: Path):
    write(tmp_path / "Stable-diffusion" / "a-broken.safetensors", FAMILIES["sdxl"], missing=1)
    write(tmp_path / "Stable-diffusion" / "b-good.safetensors", FAMILIES["sdxl"])
    entries = list(_find_own_models(tmp_path).values())
    assert catalog.resolve_model(None, entries).name == "b-good"
    with pytest.raises(CorruptFile):
        catalog.resolve_model(None, entries[:1])
    with pytest.raises(ModelNotFound, match="no model"):
        catalog.resolve_model(None, [])


def test_find_lora_returns_the_file_of_a_name(tmp_path: Path):
    file = write(tmp_path / "Lora" / "sub" / "style.safetensors", FAMILIES["lora"])
    assert catalog.find_lora(tmp_path, "style") == file
    with pytest.raises(InvalidRequest, match=r'"other".*style') as error:
        catalog.find_lora(tmp_path, "other")
    assert error.value.field == "loras"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "../Lora/sub/style"])
def test_find_lora_path_as_a_name_is_refused(tmp_path: Path, name: str):
    write(tmp_path / "Lora" / "sub" / "style.safetensors", FAMILIES["lora"])
    with pytest.raises(InvalidRequest):
        catalog.find_lora(tmp_path, name)


def test_find_models_absent_folder_is_empty(tmp_path: Path):
    assert _find_own_models(tmp_path / "absent") == {}


# --- hashes


def test_model_hash_covers_the_file_and_is_listed_once_known(tmp_path: Path):
    file = write(tmp_path / "Stable-diffusion" / "cup.safetensors", FAMILIES["unknown"])
    entry = _find_own_models(tmp_path)["cup"]
    assert (entry.sha256, entry.short_hash, entry.title) == (None, None, "cup")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert catalog.hash_model(entry, tmp_path) == digest
    entry = _find_own_models(tmp_path)["cup"]
    assert (entry.sha256, entry.short_hash, entry.title) == (
        digest,
        digest[:10],
        f"cup [{digest[:10]}]",
    )
    for title in (SdModel.of(entry, tmp_path).title, entry.title, "cup.safetensors"):
        assert catalog.resolve_model(title, [replace(entry, problem=None)]).name == "cup"
    assert SdModel.of(entry, tmp_path).model_dump() == {
        "title": f"cup.safetensors [{digest[:10]}]",
        "model_name": "cup",
        "hash": digest[:10],
        "sha256": digest,
        "filename": f"{tmp_path.name}/Stable-diffusion/cup.safetensors",
        "config": None,
    }


def test_model_hash_of_a_folder_is_that_of_its_unet(tmp_path: Path):
    path = _make_diffusers_folder(
        tmp_path / "Stable-diffusion" / "xl", {"_class_name": "StableDiffusionXLPipeline"}
    )
    digest = hashlib.sha256(
        (path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    ).hexdigest()
    assert catalog.hash_model(_find_own_models(tmp_path)["xl"], tmp_path) == digest


def test_model_hash_covers_the_weight_file_in_use(tmp_path: Path):
    path = _make_diffusers_folder(
        tmp_path / "Stable-diffusion" / "xl", {"_class_name": "StableDiffusionXLPipeline"}
    )
    half = path / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    half.write_bytes(b"half")
    plain = hashlib.sha256(
        (path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    ).hexdigest()
    assert catalog.hash_model(_find_own_models(tmp_path)["xl"], tmp_path) == plain
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert (
        catalog.hash_model(_find_own_models(tmp_path)["xl"], tmp_path)
        == hashlib.sha256(b"half").hexdigest()
    )


def test_layer_file_is_the_models_own_or_the_shared_one(tmp_path: Path):
    model, names = tmp_path / "model", ("first.safetensors", "second.safetensors")
    own, shared = model / "layerdiffuse", tmp_path / "layer_model"
    for folder in (own, shared):
        folder.mkdir(parents=True)
    assert catalog.layer_file(model, names, None, tmp_path) == shared / names[0], (
        "where it would be"
    )
    (shared / names[1]).touch()
    assert catalog.layer_file(model, names, None, tmp_path) == shared / names[1]
    (own / names[0]).touch()
    assert catalog.layer_file(model, names, None, tmp_path) == own / names[0]
    assert (
        catalog.layer_file(model, names, "named.safetensors", tmp_path) == own / "named.safetensors"
    )


def test_model_hash_of_a_folder_without_weights_is_an_error(tmp_path: Path):
    path = _make_diffusers_folder(
        tmp_path / "Stable-diffusion" / "xl", {"_class_name": "StableDiffusionXLPipeline"}
    )
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CorruptFile, match="diffusion_pytorch_model"):
        catalog.hash_model(_find_own_models(tmp_path)["xl"], tmp_path)


def _write_modified(file: Path, content: bytes, modified: int) -> None:
    file.write_bytes(content)
    os.utime(file, ns=(modified, modified))


def test_hash_cache_computes_again_after_size_or_time_change(tmp_path: Path):
    file, cache_file = tmp_path / "model", tmp_path / "cache.json"

    def digest(content):
        return hashlib.sha256(content).hexdigest()

    _write_modified(file, b"one", 1_000)
    assert HashCache(cache_file).sha256(file) == digest(b"one")
    _write_modified(file, b"two", 1_000)  # same size and time: the remembered hash
    assert HashCache(cache_file).sha256(file) == digest(b"one")
    _write_modified(file, b"two", 2_000)
    assert HashCache(cache_file).get(file) is None
    assert HashCache(cache_file).sha256(file) == digest(b"two")
    _write_modified(file, b"three", 2_000)
    assert HashCache(cache_file).sha256(file) == digest(b"three")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "null"])
def test_hash_cache_damaged_file_is_replaced(tmp_path: Path, content: str):
    file, cache_file = tmp_path / "model", tmp_path / "cache.json"
    file.write_bytes(b"one")
    cache_file.write_text(content.replace('"x"', json.dumps(str(file))))
    assert HashCache(cache_file).sha256(file) == hashlib.sha256(b"one").hexdigest()
    assert HashCache(cache_file).get(file) is not None


def test_hash_cache_unwritable_file_still_returns_hashes(tmp_path: Path):
    (tmp_path / "model").write_bytes(b"one")
    cache = HashCache(tmp_path / "absent" / "cache.json")
    assert cache.sha256(tmp_path / "model") == hashlib.sha256(b"one").hexdigest()


def test_layerdiffuse_method_of_a_models_own_patch_is_checked(tmp_path: Path):
    own = tmp_path / "own" / "layerdiffuse"
    own.mkdir(parents=True)
    entry = catalog.ModelEntry("own", own.parent, "diffusers", "sdxl")
    for config, methods in (
        ({}, "both"),
        ({"patch": "p"}, "attention"),
        ({"patch": "p", "method": "conv"}, "both"),
    ):
        (own / "config.json").write_text(json.dumps(config))
        catalog.check_layerdiffuse_mode(entry, "attention")
        with (
            contextlib.nullcontext()
            if methods == "both"
            else pytest.raises(InvalidRequest, match="own LayerDiffuse")
        ):
            catalog.check_layerdiffuse_mode(entry, "conv")


def test_layerdiffuse_mode_of_another_family_is_refused():
    entry = catalog.ModelEntry("cup", Path("cup.safetensors"), "single_file", "sd15")
    catalog.check_layerdiffuse_mode(entry, "opaque")
    with pytest.raises(InvalidRequest, match='mode "conv" is one of SDXL') as error:
        catalog.check_layerdiffuse_mode(entry, "conv")
    assert error.value.field == "mode"
    assert '"opaque"' in error.value.hint


# --- odd files: one row with its reason


def _header(text: str | bytes, rest: bytes = b"") -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data + rest


def _tensor(**values: object) -> bytes:
    entry = {"dtype": "F16", "shape": [1], "data_offsets": [0, 2], **values}
    return _header(json.dumps({"a": entry}), b"\0\0")


ODD_HEADERS = {
    "infinity": _header('{"a":{"dtype":"F16","shape":[Infinity],"data_offsets":[0,2]}}', b"\0\0"),
    "1e400": _header('{"a":{"dtype":"F16","shape":[1e400],"data_offsets":[0,2]}}', b"\0\0"),
    "nan": _tensor(shape=[float("nan")]),
    "negative": _tensor(shape=[-1, -1]),
    "huge": _tensor(shape=[2**63]),
    "boolean": _tensor(shape=[True]),
    "text": _tensor(shape="1"),
    "rank": _tensor(shape=[1] * 65),
    "offsets-reversed": _tensor(data_offsets=[2, 0]),
    "offsets-lie": _tensor(data_offsets=[0, 1]),
    "offsets-gap": _tensor(data_offsets=[2, 4]),
    "offsets-text": _tensor(data_offsets=["0", "2"]),
    "no-dtype": _tensor(dtype=None),
    "dtype-unknown": _tensor(dtype="Q16"),
    "twice": _header('{"a":{},"a":{}}'),
    "list": _header("[]"),
    "number": _header("17"),
    "deep": _header('{"a":' + "[" * 100_000),
    "not-utf-8": _header(b'{"\xff":{}}'),
    "bytes-after": _header("{}", b"more"),
}


@pytest.mark.parametrize("content", ODD_HEADERS.values(), ids=ODD_HEADERS)
def test_odd_header_is_one_row_with_its_reason(tmp_path: Path, content: bytes):
    write(tmp_path / "Stable-diffusion" / "good.safetensors", SDXL)
    (tmp_path / "Stable-diffusion" / "bad.safetensors").write_bytes(content)
    assert "safetensors" in _problem(tmp_path)
    assert _find_own_models(tmp_path)["good"].problem is None


@pytest.mark.parametrize(
    "shapes",
    [{CONTEXT: ()}, {CONTEXT: (640,)}, {**SDXL, FIRST_CONV: (320,)}, {CONTEXT: (1, 2, 3)}],
    ids=["scalar", "vector", "first", "three"],
)
def test_family_of_wrong_ranks_is_unknown(tmp_path: Path, shapes: Shapes):
    assert family_of(read_header(write(tmp_path / "x.safetensors", shapes)).shapes) == "unknown"


def test_large_header_is_refused_with_the_limit(tmp_path: Path):
    file = tmp_path / "Stable-diffusion" / "bad.safetensors"
    file.parent.mkdir()
    file.write_bytes(struct.pack("<Q", headers.MAX_HEADER_BYTES + 1))
    os.truncate(file, 2 * headers.MAX_HEADER_BYTES)
    assert f"at most {headers.MAX_HEADER_BYTES:,}" in _problem(tmp_path)


def test_header_of_many_parts_is_refused_before_it_is_parsed(tmp_path: Path):
    file = tmp_path / "Stable-diffusion" / "bad.safetensors"
    file.parent.mkdir()
    file.write_bytes(_header(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"))
    assert "more than 1,000,000 parts" in _problem(tmp_path)


def test_damaged_header_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "Stable-diffusion" / "bad.safetensors"
    file.parent.mkdir()
    file.write_bytes(_header("[]"))
    reads: list[Path] = []

    def read(path: Path) -> headers.Header:
        reads.append(path)
        return read_header(path)

    monkeypatch.setattr(headers, "read_header", read)
    for _ in range(3):
        assert _problem(tmp_path)
    assert len(reads) == 1
    # the same size and time of change, as a copy with its attributes has
    status = file.stat()
    file.write_bytes(_header("{}"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert isinstance(_find_own_models(tmp_path)["bad"].problem, UnsupportedFamily)
    assert len(reads) == 2


def _make_pipe(path: Path) -> None:
    os.mkfifo(path)


def _make_socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


ODD_FILES: dict[str, Callable[[Path], None]] = {
    "pipe": _make_pipe,
    "socket": _make_socket,
    "folder": Path.mkdir,
    "link to nothing": lambda path: path.symlink_to("absent"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "empty": Path.touch,
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with pipes as files")
@pytest.mark.parametrize("make", ODD_FILES.values(), ids=ODD_FILES)
def test_odd_file_is_one_row_and_never_opened(tmp_path: Path, make: Callable[[Path], None]):
    for name in ("Stable-diffusion", "layer_model", "Lora", "embeddings"):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "bad.safetensors")
    assert _problem(tmp_path)
    results = download.verify(tmp_path, tmp_path / "embeddings")
    assert {
        result.path.parent.name: result.is_ok for result in results if "bad" in str(result)
    } == {
        "Stable-diffusion": False,
        "layer_model": False,
        "Lora": False,
        "embeddings": False,
    }
    assert read_embeddings(tmp_path / "embeddings") == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with pipes as files")
def test_pipes_in_a_diffusers_folder_are_named_and_never_opened(tmp_path: Path):
    index = {"_class_name": "StableDiffusionXLPipeline"}
    path = _make_diffusers_folder(tmp_path / "Stable-diffusion" / "bad", index)
    (tmp_path / ".alphalayer-hashes.json").unlink(missing_ok=True)
    os.mkfifo(tmp_path / ".alphalayer-hashes.json")
    for file in ("unet/config.json", "model_index.json"):
        (path / file).unlink()
        os.mkfifo(path / file)
        problem = _find_own_models(tmp_path)["bad"].problem
        assert problem is not None
        assert file in problem.message


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"_class_name": "\\ud800"}', '{"a": "\xff"'],
    ids=["deep", "digits", "surrogate", "latin-1"],
)
def test_odd_model_index_is_one_row_that_can_be_sent(tmp_path: Path, text: str):
    path = _make_diffusers_folder(tmp_path / "Stable-diffusion" / "bad", {})
    (path / "model_index.json").write_bytes(text.encode("latin-1"))
    problem = _find_own_models(tmp_path)["bad"].problem
    assert problem is not None
    assert problem.message.encode()


# --- odd names


ODD_NAMES = (b"b\xffd", b"two\nlines", b"\x1b[31mred", b"back\x08", "\u202egpj".encode())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("name", ODD_NAMES)
def test_name_that_cannot_be_shown_is_one_row_to_rename(tmp_path: Path, name: bytes):
    for folder in ("Stable-diffusion", "layer_model", "Lora"):
        write(tmp_path / folder / (os.fsdecode(name) + ".safetensors"), SDXL)
    [entry] = _find_own_models(tmp_path).values()
    assert entry.problem is not None
    assert "Rename it." in str(entry.problem)
    for shown in (entry.name, str(entry.problem), *map(str, download.verify(tmp_path, tmp_path))):
        assert shown.encode().decode().isprintable(), shown
        assert "\ufffd" in shown or "alphalayer-mini" in shown
    with pytest.raises(InvalidRequest):
        catalog.find_lora(tmp_path, os.fsdecode(name))


@pytest.mark.parametrize(
    "name",
    ["n" * 243, "-rf", "CON", "a:b", "пони", "👩‍🎨", " ", "a.b.c"],
    ids=range(8),
)
def test_unusual_name_is_usable(tmp_path: Path, name: str):
    for folder in ("Stable-diffusion", "Lora"):
        file = write(tmp_path / folder / f"{name}.safetensors", SDXL)
    entries = [*_find_own_models(tmp_path).values()]
    assert [entry.name for entry in entries] == [name]
    assert catalog.resolve_model(name, entries).problem is None
    assert catalog.find_lora(tmp_path, name) == file


def test_composed_and_decomposed_names_are_two_models(tmp_path: Path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for name in (composed, decomposed):
        write(tmp_path / "Stable-diffusion" / f"{name}.safetensors", SDXL)
        write(tmp_path / "Lora" / f"{name}.safetensors", FAMILIES["lora"])
    if len(os.listdir(tmp_path / "Lora")) == 1:  # noqa: PTH208
        pytest.skip("this file system normalizes names")
    entries = catalog.find_models(tmp_path)
    for name in (composed, decomposed):
        assert catalog.resolve_model(name, entries).name == name
        assert catalog.find_lora(tmp_path, name).stem == name
    (tmp_path / "Stable-diffusion" / f"{composed}.safetensors").unlink()
    (tmp_path / "Lora" / f"{composed}.safetensors").unlink()
    assert catalog.resolve_model(composed, catalog.find_models(tmp_path)).name == decomposed
    assert catalog.find_lora(tmp_path, composed).stem == decomposed


def test_link_to_its_own_folder_is_not_followed(tmp_path: Path):
    write(tmp_path / "Stable-diffusion" / "cup.safetensors", SDXL)
    (tmp_path / "Stable-diffusion" / "loop").symlink_to(".")
    assert list(_find_own_models(tmp_path)) == ["cup"]


# --- paths for clients


def test_shorten_paths_hides_what_is_above_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "models", Path("models")):
        error = CorruptFile(f'"{folder}/a b.safetensors" and {tmp_path}/models are bad.')
        shown = catalog.shorten_paths(error, folder).message
        assert shown == '"models/a b.safetensors" and models are bad.'
    other = CorruptFile(f"{tmp_path}/models2/x and /a{tmp_path}/models/x are others.")
    assert catalog.shorten_paths(other, tmp_path / "models").message.count(str(tmp_path)) == 2
    root = CorruptFile("/models/Stable-diffusion/x and not/models/x.")
    assert (
        catalog.shorten_paths(root, Path("/models")).message
        == "models/Stable-diffusion/x and not/models/x."
    )
