"""The command `layers`: a chain of a tiny model, its images and documents, and its errors."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from tests.support import tiny_models

from alphalayer.cli import rendering
from alphalayer.cli.app import load_command, main
from alphalayer.core.modes import MODES
from alphalayer.core.request import RequestFields
from alphalayer.images import codecs, layered

Run = Callable[..., tuple[int, str, str]]
ROLES = ("background", "foreground", "blended", "composite")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    layer_model = tiny_models.make_shared_models(folder)
    for mode in ("fg2ble", "fgble2bg"):
        tiny_models.make_condition_patch(layer_model, mode)
    return folder


@pytest.fixture
def run(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Return a function that runs the command with the tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    common = f"--models-dir {models} --model tiny --steps 1 --device cpu".split()

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alphalayer", "layers", "an apple", *common, *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def _read(path: Path) -> codecs.Rgba:
    return codecs.decode(path.read_bytes())[0]


def test_layers_writes_images_and_documents_of_each_set(run: Run, tmp_path: Path):
    documents = ("--psd", "new/cup.psd", "--ora", "cup.ora", "--tiff", "cup.tiff")
    size = ("--width", "64", "--height", "64", "--batch-size", "2")
    code, out, err = run(*documents, *size, "-o", "layers")
    assert code == 0, err
    seeds = [line.split("  ")[2] for line in out.splitlines()]
    assert seeds == ["seed 12345"] * (len(ROLES) + 3) + ["seed 12346"] * (len(ROLES) + 3)
    images = {role: _read(*(tmp_path / "layers").glob(f"*_{role}.png")) for role in ROLES}
    pixels = layered.composite_layers([images["background"], images["foreground"]])
    np.testing.assert_array_equal(images["composite"], pixels)
    assert images["foreground"][..., 3].min() < images["background"][..., 3].min() == 255
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"cup.psd", "cup-2.psd"}
    with zipfile.ZipFile("cup.ora") as file:
        stack = ElementTree.fromstring(file.read("stack.xml")).findall("stack/layer")
        shown = [layer.get("name") for layer in stack if layer.get("visibility") == "visible"]
        assert shown == ["Foreground", "Background"]
        assert [layer.get("name", "").lower() for layer in reversed(stack)] == list(ROLES)
        merged, _ = codecs.decode(file.read("mergedimage.png"))
        np.testing.assert_array_equal(merged, pixels)
    with Image.open("cup.tiff") as pages:
        for number, role in enumerate(ROLES):
            pages.seek(number)
            np.testing.assert_array_equal(np.asarray(pages), images[role])
    second = _read(*(tmp_path / "layers").glob("*_foreground-2.png"))
    assert not np.array_equal(second, images["foreground"])


def test_layers_of_a_foreground_have_its_size_and_keep_it(run: Run, tmp_path: Path):
    cut_out = np.full((64, 72, 4), 90, np.uint8)
    (tmp_path / "cup.png").write_bytes(codecs.encode(cut_out))
    code, out, err = run("--foreground", "cup.png", "--want", "blended", "--psd", "cup.psd")
    assert code == 0, err
    assert out.startswith("cup.psd  72x64  seed 12345  ")
    assert not (tmp_path / "outputs").exists()
    with Image.open(io.BytesIO((tmp_path / "cup.psd").read_bytes())) as image:
        names = [layer[0] for layer in getattr(image, "layers", [])]
    assert names == ["Foreground", "Blended"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--want sky", "--want: got \"sky\"; 'layers', 'foreground', 'background' or 'blended'."),
        ("--want foreground --foreground cup.png", "--want: the foreground is given already."),
        ("--foreground photo.png", "--foreground: the foreground is opaque"),
        ("--background none.png", "--background: cannot read none.png: No such file"),
        ("--sampler none", '--sampler: unknown sampler "none"; use one of: '),
        ("--n-iter 0", "--n-iter: got 0; at least 1"),
        ("--psd /proc/none/cup.psd", "cannot write /proc/none/cup.psd"),
    ],
)
def test_layers_errors_name_the_flag(run: Run, tmp_path: Path, arguments: str, message: str):
    for name, alpha in (("cup", 9), ("photo", 255)):
        pixels = np.full((64, 64, 4), alpha, np.uint8)
        (tmp_path / f"{name}.png").write_bytes(codecs.encode(pixels))
    code, _, err = run(*arguments.split())
    assert code == 1
    assert message in err


def test_layers_missing_file_names_the_pull_line(run: Run, tmp_path: Path):
    (tmp_path / "photo.png").write_bytes(codecs.encode(np.full((64, 64, 4), 255, np.uint8)))
    err = run("--background", "photo.png")[2]
    assert "layer_xl_bg2ble.safetensors is not in" in err
    assert f"models pull {MODES['bg2ble'].download}" in err


def test_layers_missing_file_of_a_later_stage_stops_the_first(
    run: Run, models: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("alphalayer.cli.layers.render", lambda *_: pytest.fail("it rendered"))
    file = models / "layer_model" / MODES["fgble2bg"].files[0]
    moved = file.rename(models / "moved")
    code, _, err = run()
    moved.rename(file)
    assert code == 1
    assert f"{file.name} is not in" in err


def test_layers_has_an_option_for_each_field_of_a_request():
    parameters = {parameter.name for parameter in load_command("layers").params}
    fields = {name for name in RequestFields.model_fields if not name.startswith("hires_")}
    assert fields | {"want", "foreground_prompt", "iterations"} <= parameters
    assert set(rendering.SETTINGS) <= parameters
