"""Upscalers of images: resampling, files, tiles, and networks of `models/ESRGAN`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from alphalayer import catalog
from alphalayer.core.errors import (
    CorruptFile,
    EngineFailed,
    InvalidRequest,
    ModelUnusable,
    SetupFailed,
)
from alphalayer.engine import upscalers
from alphalayer.engine.upscalers import Upscale, load_upscaler

CPU = torch.device("cpu")


def _image(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def _enlarge(upscale: Upscale, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return upscale(image, size, (0, 0, *size))


class Doubling:
    """Network of the interface of spandrel: a convolution, then each pixel twice."""

    scale, supports_half = 2, False
    device, dtype = CPU, torch.float32

    def __init__(self):
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 5, padding=2, padding_mode="replicate")
        nn.init.constant_(self.conv.weight, 1 / 75)
        nn.init.zeros_(self.conv.bias)
        self.sizes: list[tuple[int, ...]] = []

    def to(self, *_: object) -> Doubling:
        return self

    def eval(self) -> Doubling:
        return self

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(image.shape[-2:]))
        output = self.conv(image)
        return output.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Doubling:
    doubling = Doubling()
    monkeypatch.setattr(upscalers, "require", lambda *_: None)
    monkeypatch.setattr(upscalers, "_load_network", lambda _: doubling)
    monkeypatch.setattr(catalog, "find_upscaler", lambda *_: Path("doubling.safetensors"))
    return doubling


def test_network_runs_in_tiles_without_seams(network: Doubling, monkeypatch: pytest.MonkeyPatch):
    image = _image(300, 250)
    tiled = _enlarge(load_upscaler(Path(), "doubling", CPU), image, (600, 500))
    assert len(network.sizes) == 4
    monkeypatch.setattr(upscalers, "TILE", 1000)
    whole = _enlarge(load_upscaler(Path(), "doubling", CPU), image, (600, 500))
    assert network.sizes[4:] == [(250, 300)]
    assert np.abs(tiled.astype(int) - whole).max() <= 1


def test_network_runs_until_the_image_is_large_enough(network: Doubling):
    image = _enlarge(load_upscaler(Path(), "doubling", CPU), _image(20, 10), (50, 25))
    assert image.shape == (25, 50, 3)
    assert network.sizes == [(10, 20), (20, 40)]


def test_network_of_scale_1_runs_once(network: Doubling):
    network.scale = 1
    for size in ((20, 10), (50, 25)):
        image = _enlarge(load_upscaler(Path(), "denoising", CPU), _image(20, 10), size)
        assert image.shape == (*size[::-1], 3)
    assert network.sizes == [(10, 20), (10, 20)]


def test_network_runs_on_what_the_window_shows(network: Doubling):
    image, window = _image(200, 20), (250, 0, 290, 50)
    upscale = load_upscaler(Path(), "doubling", CPU)
    whole = _enlarge(upscale, image, (500, 50))
    network.sizes.clear()
    part = upscale(image, (500, 50), window)
    assert np.abs(part.astype(int) - whole[:, 250:290]).max() <= 1
    assert network.sizes[0] == (20, 16 + 16 + 16)


@pytest.mark.parametrize("name", ["Lanczos", "Nearest"])
def test_resampled_window_is_that_of_the_whole_image(name: str):
    image, upscale = _image(128, 128), load_upscaler(Path(), name, CPU)
    part = upscale(image, (166, 166), (0, 19, 166, 147))
    whole = _enlarge(upscale, image, (166, 166))
    assert np.abs(part.astype(int) - whole[19:147]).max() <= 1


def test_network_output_beyond_the_range_is_clamped(network: Doubling):
    nn.init.constant_(network.conv.bias, 2.0)
    assert (_enlarge(load_upscaler(Path(), "bright", CPU), _image(8, 8), (16, 16)) == 255).all()


def test_network_output_that_is_not_finite_is_an_error(network: Doubling):
    nn.init.constant_(network.conv.bias, float("nan"))
    with pytest.raises(EngineFailed, match="the upscaler"):
        _enlarge(load_upscaler(Path(), "broken", CPU), _image(8, 8), (16, 16))


def test_network_stops_when_the_check_raises(network: Doubling):
    def check() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        _enlarge(load_upscaler(Path(), "doubling", CPU, check), _image(20, 10), (40, 20))
    assert network.sizes == []


def test_nearest_repeats_pixels_and_lanczos_does_not():
    image = _image(8, 6)
    repeated = image.repeat(2, 0).repeat(2, 1)
    nearest = _enlarge(load_upscaler(Path(), "Nearest", CPU), image, (16, 12))
    assert np.array_equal(nearest, repeated)
    lanczos, none = (
        _enlarge(load_upscaler(Path(), name, CPU), image, (16, 12)) for name in ("Lanczos", "None")
    )
    assert np.array_equal(lanczos, none)
    assert not np.array_equal(lanczos, repeated)


# --- files


def _put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / "ESRGAN" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_files_are_found_by_name_and_by_that_of_automatic1111(tmp_path: Path):
    _put(tmp_path, "sharp.pth", "sharp.safetensors", "RealESRGAN_x4plus.pth", "notes.txt")
    assert set(catalog.upscaler_files(tmp_path)) == {"sharp", "RealESRGAN_x4plus"}
    assert catalog.find_upscaler(tmp_path, "sharp").suffix == ".safetensors"
    assert catalog.find_upscaler(tmp_path, "R-ESRGAN 4x+").stem == "RealESRGAN_x4plus"
    with pytest.raises(InvalidRequest, match=r"Latent, .*Lanczos, .*sharp") as caught:
        catalog.find_upscaler(tmp_path, "soft")
    assert caught.value.field == "hires_upscaler"


def test_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SetupFailed) as caught:
        load_upscaler(_put(tmp_path, "sharp.safetensors"), "sharp", CPU)
    assert "spandrel" in caught.value.message
    assert "[upscalers]" in caught.value.hint


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a file ran",)


def test_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"weight": _Code()}, tmp_path / "evil.pth")
    with pytest.raises(CorruptFile, match="more than tensors"):
        upscalers._read_pickle(tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""
    torch.save({"weight": torch.ones(2)}, tmp_path / "good.pth")
    assert upscalers._read_pickle(tmp_path / "good.pth")["weight"].tolist() == [1, 1]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Read a file as if spandrel raised an error, or returned a network."""
    save_file({"weight": torch.ones(2)}, tmp_path / "file.safetensors")

    def load(outcome: Any) -> Any:
        class Loader:
            def load_from_state_dict(self, _: Any) -> Any:
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome

        module = SimpleNamespace(
            canonicalize_state_dict=dict, ModelLoader=Loader, ImageModelDescriptor=SimpleNamespace
        )
        monkeypatch.setattr(upscalers.importlib, "import_module", lambda _: module)
        return upscalers._load_network(tmp_path / "file.safetensors")

    return load


@pytest.mark.parametrize("text", ["unknown architecture", "", " \n "])
def test_file_of_another_kind_is_refused(loaded: Callable[[Any], Any], text: str):
    with pytest.raises(ModelUnusable, match=rf"\({text.strip()}\)"):
        loaded(ValueError(text))


def test_network_of_a_large_scale_is_refused(loaded: Callable[[Any], Any]):
    network = SimpleNamespace(input_channels=3, output_channels=3, scale=4)
    assert loaded(network) is network
    network.scale = 8
    with pytest.raises(ModelUnusable, match="enlarges by 8; at most 4"):
        loaded(network)


def test_out_of_memory_is_no_damaged_file(
    loaded: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(MemoryError):
        loaded(MemoryError())

    def load(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        upscalers._read_pickle(tmp_path / "large.pth")


# --- spandrel


def esrgan(is_old: bool, width: int = 8, blocks: int = 2) -> dict[str, torch.Tensor]:
    """Return random weights of an RRDBNet that enlarges by 4, in the old or the new layout."""
    generator = torch.Generator().manual_seed(2)
    state: dict[str, torch.Tensor] = {}

    def conv(name: str, entering: int, leaving: int) -> None:
        weight = torch.randn(leaving, entering, 3, 3, generator=generator)
        state[f"{name}.weight"] = weight * (0.5 / (9 * entering) ** 0.5)
        state[f"{name}.bias"] = torch.full((leaving,), 0.05)

    growth = 32  # of all RRDBNets
    conv("model.0" if is_old else "conv_first", 3, width)
    for block in range(blocks):
        for dense in (1, 2, 3):
            for layer in range(1, 6):
                name = (
                    f"model.1.sub.{block}.RDB{dense}.conv{layer}.0"
                    if is_old
                    else f"body.{block}.rdb{dense}.conv{layer}"
                )
                conv(name, width + (layer - 1) * growth, growth if layer < 5 else width)
    conv(f"model.1.sub.{blocks}" if is_old else "conv_body", width, width)
    old, new = (3, 6, 8), ("conv_up1", "conv_up2", "conv_hr")
    for number, name in zip(old, new, strict=True):
        conv(f"model.{number}" if is_old else name, width, width)
    conv("model.10" if is_old else "conv_last", width, 3)
    return state


@pytest.mark.filterwarnings("ignore")
def test_esrgan_files_of_both_layouts_give_the_same_image(tmp_path: Path):
    pytest.importorskip("spandrel")
    folder = tmp_path / "ESRGAN"
    folder.mkdir()
    save_file(esrgan(is_old=True), folder / "old.safetensors")
    save_file(esrgan(is_old=False), folder / "new.safetensors")
    torch.save({"params_ema": esrgan(is_old=False)}, folder / "saved.pth")
    images = [
        _enlarge(load_upscaler(tmp_path, name, CPU), _image(20, 12), (60, 36))
        for name in ("old", "new", "saved")
    ]
    assert images[0].shape == (36, 60, 3)
    assert images[0].std() > 1
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])
