"""Benchmarks of the engine and of its peers, on random models of the smallest size."""

from __future__ import annotations

import base64
import io
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import engine, peers
from benchmarks.peer_engines import LORA, OFFSETS
from benchmarks.peer_models import make_models, write_patch_forms
from PIL import Image
from safetensors.torch import load_file
from tests.support.serving import served

from alphalayer.engine.transparency.patch import read_patch


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"), "tiny")


def test_engine_benchmark_counts_launches_and_floor(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(engine, "WARM_RUNS", 1)
    arguments = ["--width", "64", "--height", "64", "--steps", "3", "--batch", "1"]
    engine.main(["--random-sdxl", str(models), "--device", "cpu", *arguments])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (figures,) = report["batches"].values()
    assert figures["times_floor"] >= 1
    assert figures["host_ms_a_step"] > 0
    unet = figures["unet_call"]
    # 17 residual blocks with two convolutions, at least
    assert 34 < unet["launches"] < 1000
    # one multiply-add for each of the 2.5 million weights or more, at 64 positions and fewer
    assert 0.05 < unet["gigaoperations"] < 0.5


@pytest.mark.skipif(sys.platform == "win32", reason="reads /proc")
def test_peers_run_in_turn_with_ratios(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "peers.json"
    arguments = ["--model", "tiny", "--models-dir", str(models), "--steps", "1", "--warm", "1"]
    arguments += ["--rounds", "1", "--engines", "alphalayer-opaque", "diffusers"]
    peers.main([*arguments, "--output", str(output)])
    figures = json.loads(output.read_text())["figures"]
    assert set(figures) == {"alphalayer-opaque", "diffusers"}
    for values in figures.values():
        assert 0 < values["decode_s"] < values["warm_s"] < values["cold_s"]
        assert 0 < values["warm_cpu_s"] < values["cold_cpu_s"]
        assert values["peak_mb"] > 200
    own, other = (figures[name]["warm_s"] for name in ("alphalayer-opaque", "diffusers"))
    table = capsys.readouterr().out
    assert f"({other / own:.2f}x)" in table
    assert "Forge is left out" in table


def test_running_server_is_measured_without_its_start(models: Path, tmp_path: Path):
    task = peers.Task(str(models), 64, 64, steps=1)
    with served(tmp_path, models_dir=models) as client:
        open_peer = partial(peers.over_http, str(client.base_url), None)
        figures = peers.measure(peers.Peer("forge", "", "forge", open_peer), task, warm=1)
    assert set(figures) == {"warm_s"}


def test_opaque_image_of_a_peer_is_refused():
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "png")
    with pytest.raises(SystemExit, match="LayerDiffuse is not active"):
        peers.check_alpha("http://forge", base64.b64encode(image.getvalue()).decode())


@pytest.mark.parametrize(
    ("flag", "part", "repository"),
    [
        ("--diffuser-layerdiffuse", "layer_diffuse/models", "rootonchair/diffuser_layerdiffuse"),
        ("--layerdiffuse-cli", "lib_layerdiffuse", "lllyasviel/LayerDiffuse_DiffusersCLI"),
    ],
)
def test_folder_without_clone_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, part: str, repository: str
):
    folder = tmp_path / "missing"
    with pytest.raises(SystemExit, match="2"):
        peers.parse_options([flag, str(folder)])
    message = f"argument {flag}: got {folder}; it has no folder {part}. Clone https://github.com/"
    assert f"{message}{repository}." in capsys.readouterr().err


def test_clone_with_tiny_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "lib_layerdiffuse").mkdir()
    with pytest.raises(SystemExit, match="2"):
        peers.parse_options(["--model", "tiny", "--layerdiffuse-cli", str(tmp_path)])
    assert "the clones have a fixed decoder" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="reads /proc")
def test_clone_that_fails_to_import_ends_the_run(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    module = tmp_path / "layer_diffuse" / "models" / "__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text("import package_that_is_missing")
    options = peers.parse_options(["--diffuser-layerdiffuse", str(tmp_path)])
    peer = next(peer for peer in peers.find_peers(options) if peer.name in peers.CLONES)
    with pytest.raises(SystemExit, match="diffuser_layerdiffuse: the process ended with status 1"):
        peers.measure(peer, peers.Task(str(models), 64, 64, steps=1), warm=1)
    assert "No module named 'package_that_is_missing'" in capfd.readouterr().err


def test_patch_forms_change_weights_equally(models: Path):
    write_patch_forms(models)
    weights = {name: torch.zeros_like(w) for name, w in load_file(models / OFFSETS).items()}
    published = read_patch(
        models / "layer_model" / "layer_xl_transparent_attn.safetensors", weights
    )
    assert set(published.deltas) == set(weights)
    for form in (LORA, OFFSETS):
        patch = read_patch(models / form, weights)
        assert set(patch.deltas) == set(weights)
        for name, delta in patch.deltas.items():
            change = published.deltas[name].apply(weights[name].float(), 1.0)
            # float16 holds numbers this small up to 3e-8
            torch.testing.assert_close(
                delta.apply(weights[name].float(), 1.0), change, rtol=1e-3, atol=3e-8
            )
