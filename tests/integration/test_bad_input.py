"""Bad input, one by one, through the real command and the real engine: each is one clear line that names the field or the file."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.support import tiny_models
from tests.unit.test_catalog import FAMILIES, write

from alphalayer.catalog.headers import CONTEXT, FIRST_CONV
from alphalayer.cli.app import main
from alphalayer.core.errors import AlphalayerError, CorruptFile, ModelUnusable
from alphalayer.core.request import GenerationRequest
from alphalayer.engine.pipeline import LocalEngine

SMALL = ["--width", "64", "--height", "64", "--steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good single file, a good diffusers folder and the LayerDiffuse files."""
    folder = tmp_path_factory.mktemp("originals")
    tiny_models.make_single_file(folder / "Stable-diffusion" / "single.safetensors")
    tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / "folder")
    tiny_models.make_layer_files(folder / "layer_model")
    return folder


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run `alphalayer ...`, which must fail; its one line of error."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ALPHALAYER_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["alphalayer", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        assert end.value.code == 1
        assert "Traceback" not in printed.err + printed.out
        lines = printed.err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert len(lines[0]) < 600
        return lines[0]

    return run


# --- fields


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([""], "prompt: empty"),
        (["   "], "prompt: empty"),
        (["x" * 100_000], "prompt: got 100000 characters; at most 10000"),
        (["x", "--negative-prompt", "x" * 100_000], "--negative-prompt: "),
        (["x", "--cfg-scale", "nan"], "--cfg-scale: "),
        (["x", "--cfg-scale", "inf"], "--cfg-scale: "),
        (["x", "--width", "-64"], "--width: "),
        (["x", "--width", "0"], "--width: "),
        (["x", "--height", "100000000"], "--height: "),
        (["x", "--steps", "0"], "--steps: "),
        (["x", "--steps", "1000000"], "--steps: "),
        (["x", "--batch-size", "-1"], "--batch-size: "),
        (["x", "--seed", "-7"], "--seed: "),
        (["x", "--seed", str(2**64)], "--seed: "),
        (
            ["x", "--sampler", "Magic"],
            '--sampler: unknown sampler "Magic"; use one of: DPM++ 2M SDE',
        ),
        (
            ["x", "--scheduler", "Magic"],
            '--scheduler: unknown scheduler "Magic"; use one of: Karras',
        ),
        (["x", "--format", "jpeg"], '--format: "jpeg"'),
        (["x", "--noise", "dice"], "--noise: "),
        (["x", "--decode", "forge3"], "--decode: "),
        (["x", "--dtype", "fp8"], "--dtype: got"),
        (["x", "--memory", "none"], "--memory: got"),
    ],
    ids=lambda value: " ".join(value)[-24:] if isinstance(value, list) else None,
)
def test_a_wrong_value_names_its_field(
    command: Callable[..., str], arguments: list[str], named: str
):
    assert command("generate", *arguments).startswith(f"error: {named}")


@pytest.mark.parametrize(
    ("device", "named"), [("cuda:99", 'device "cuda:99"'), ("toaster", 'unknown device "toaster"')]
)
def test_a_device_that_is_not_there_is_named(
    command: Callable[..., str], originals: Path, device: str, named: str
):
    assert named in command("generate", "x", "--models-dir", str(originals), "--device", device)


def test_gpu_noise_on_the_cpu_names_its_field(command: Callable[..., str], originals: Path):
    assert command(
        "generate", "x", *SMALL, "--models-dir", str(originals), "--noise", "gpu"
    ).startswith("error: --noise: ")


def test_brackets_beyond_measure_name_the_prompt(command: Callable[..., str], originals: Path):
    line = command(
        "generate", "(" * 1000 + "x", *SMALL, "--models-dir", str(originals), "--model", "folder"
    )
    assert line.startswith("error: prompt: the attention weight")


def test_a_long_prompt_within_the_limit_is_drawn(originals: Path):
    request = GenerationRequest(
        prompt="word, " * 1600, model="folder", width=64, height=64, steps=1
    )
    assert LocalEngine(originals, device="cpu").generate(request).images[0].rgba.shape == (
        64,
        64,
        4,
    )


# --- models


def test_a_model_that_is_not_there_lists_those_that_are(
    command: Callable[..., str], originals: Path
):
    line = command("generate", "x", *SMALL, "--models-dir", str(originals), "--model", "absent")
    assert line.startswith(f'error: --model: no model "absent" in {originals}/Stable-diffusion')
    assert "folder, single" in line


@pytest.mark.parametrize(
    "family",
    [
        "sd15",
        "sd2",
        "sdxl-refiner",
        "sdxl-inpaint",
        "sd15-inpaint",
        "sd2-inpaint",
        "ssd-1b",
        "sdxl-unet",
    ],
)
def test_a_checkpoint_of_another_family_is_named(
    command: Callable[..., str], tmp_path: Path, family: str
):
    from alphalayer.catalog import FAMILY_NAMES

    write(tmp_path / "models" / "Stable-diffusion" / "other.safetensors", FAMILIES[family])
    line = command(
        "generate", "x", *SMALL, "--models-dir", str(tmp_path / "models"), "--model", "other"
    )
    assert "other.safetensors is a " in line
    assert FAMILY_NAMES[family] in line
    assert "SDXL" in line


def test_a_tiny_model_turned_into_an_inpainting_one_is_refused(
    command: Callable[..., str], originals: Path, tmp_path: Path
):
    """By the shape of its first convolution, in an otherwise whole and good file."""
    tensors = load_file(originals / "Stable-diffusion" / "single.safetensors")
    assert CONTEXT in tensors
    tensors[FIRST_CONV] = tensors[FIRST_CONV][:, :1].repeat(1, 9, 1, 1)
    checkpoints = tmp_path / "models" / "Stable-diffusion"
    checkpoints.mkdir(parents=True)
    save_file(tensors, checkpoints / "inpaint.safetensors")
    line = command(
        "generate", "x", *SMALL, "--models-dir", str(tmp_path / "models"), "--model", "inpaint"
    )
    assert "inpaint" in line.removeprefix("error: ")


def test_a_pickle_file_is_refused(command: Callable[..., str], tmp_path: Path):
    (tmp_path / "models" / "Stable-diffusion").mkdir(parents=True)
    (tmp_path / "models" / "Stable-diffusion" / "old.ckpt").write_bytes(b"\x80\x02.")
    line = command(
        "generate", "x", *SMALL, "--models-dir", str(tmp_path / "models"), "--model", "old"
    )
    assert "old.ckpt is a pickle file" in line


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000)


def _cut_short(file: Path) -> None:
    os.truncate(file, 5)


def _flip_header(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(8)
        opened.write(b"#")


def _claim_a_huge_header(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(struct.pack("<Q", 2**62))


def _another_dtype(file: Path) -> None:
    """A well-formed header with a number format that does not exist, so that only the reader of tensors can notice."""
    data = file.read_bytes()
    file.write_bytes(
        data.replace(b'"dtype":"F16"', b'"dtype":"Q16"', 1).replace(
            b'"dtype":"F32"', b'"dtype":"Q32"', 1
        )
    )


DAMAGES = [_cut, _cut_short, _flip_header, _claim_a_huge_header, _another_dtype]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_single_file_is_named(
    command: Callable[..., str], originals: Path, tmp_path: Path, damage: Callable[[Path], None]
):
    file = tmp_path / "models" / "Stable-diffusion" / "broken.safetensors"
    file.parent.mkdir(parents=True)
    shutil.copy(originals / "Stable-diffusion" / "single.safetensors", file)
    damage(file)
    assert "broken.safetensors" in command(
        "generate", "x", *SMALL, "--models-dir", str(tmp_path / "models"), "--model", "broken"
    )


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("layer_xl_transparent_attn", _cut),
        ("layer_xl_transparent_attn", _another_dtype),
        ("vae_transparent_decoder", _cut_short),
        ("vae_transparent_decoder", _flip_header),
    ],
)
def test_a_damaged_layer_file_is_named(
    originals: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
):
    shutil.copytree(originals / "layer_model", tmp_path / "layer_model")
    (tmp_path / "Stable-diffusion").mkdir()
    (tmp_path / "Stable-diffusion" / "single.safetensors").symlink_to(
        originals / "Stable-diffusion" / "single.safetensors"
    )
    damage(tmp_path / "layer_model" / f"{name}.safetensors")
    request = GenerationRequest(prompt="x", width=64, height=64, steps=1, model="single")
    with pytest.raises(ModelUnusable, match=name):
        LocalEngine(tmp_path, device="cpu").generate(request)


FOLDER_DAMAGES: dict[str, Callable[[Path], None]] = {
    "UNet cut off": lambda folder: _cut(folder / "unet" / "diffusion_pytorch_model.safetensors"),
    "text encoder cut off": lambda folder: _cut(folder / "text_encoder_2" / "model.safetensors"),
    "UNet missing": lambda folder: (
        folder / "unet" / "diffusion_pytorch_model.safetensors"
    ).unlink(),
    "VAE config missing": lambda folder: (folder / "vae" / "config.json").unlink(),
    "VAE config damaged": lambda folder: (folder / "vae" / "config.json").write_text("{"),
    "VAE class unknown": lambda folder: (folder / "vae" / "config.json").write_text(
        '{"_class_name": "Nonsense"}'
    ),
    "VAE config is a list": lambda folder: (folder / "vae" / "config.json").write_text("[]"),
    "scheduler config damaged": lambda folder: (
        folder / "scheduler" / "scheduler_config.json"
    ).write_text("{"),
    "tokenizer missing": lambda folder: shutil.rmtree(folder / "tokenizer"),
    "layerdiffuse config damaged": lambda folder: (
        folder / "layerdiffuse" / "config.json"
    ).write_text("{"),
    "layerdiffuse config is a list": lambda folder: (
        folder / "layerdiffuse" / "config.json"
    ).write_text("[]"),
    "layerdiffuse defaults wrong": lambda folder: (
        folder / "layerdiffuse" / "config.json"
    ).write_text('{"defaults": {"steps": "many"}}'),
    "layerdiffuse decoder sizes wrong": lambda folder: (
        folder / "layerdiffuse" / "config.json"
    ).write_text(
        '{"patch": "patch.safetensors", "decoder": "decoder.safetensors", "decoder_config": {"latent_block": 99}}'
    ),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGES)
def test_a_damaged_folder_is_an_error_for_users(originals: Path, tmp_path: Path, damage: str):
    folder = tmp_path / "Stable-diffusion" / "broken"
    shutil.copytree(originals / "Stable-diffusion" / "folder", folder)
    FOLDER_DAMAGES[damage](folder)
    request = GenerationRequest(prompt="x", width=64, height=64, steps=1, model="broken")
    with pytest.raises(AlphalayerError) as error:
        LocalEngine(tmp_path, device="cpu").generate(request)
    assert "\n" not in str(error.value)
    assert "broken" in str(error.value)


def test_a_file_that_changes_under_a_listing_is_named(originals: Path, tmp_path: Path):
    """Damage that comes after the header was looked at and believed."""
    from alphalayer import catalog

    file = tmp_path / "Stable-diffusion" / "single.safetensors"
    file.parent.mkdir()
    shutil.copy(originals / "Stable-diffusion" / "single.safetensors", file)
    catalog.find_models(tmp_path)
    stamp = file.stat()
    _cut(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(CorruptFile, match=r"single\.safetensors"):
        LocalEngine(tmp_path, device="cpu").generate(
            GenerationRequest(prompt="x", model="single", width=64, height=64, steps=1)
        )


# --- output


def _generate(originals: Path, output: Path) -> list[str]:
    return [
        "generate",
        "x",
        *SMALL,
        "--models-dir",
        str(originals),
        "--model",
        "folder",
        "--output",
        str(output),
    ]


def test_an_output_folder_that_cannot_be_made_is_named(
    command: Callable[..., str], originals: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("in the way")
    line = command(*_generate(originals, tmp_path / "file" / "deep"))
    assert f"cannot write {tmp_path / 'file' / 'deep'}" in line
    assert "--output" in line


def test_a_folder_in_the_place_of_the_output_file_is_named(
    command: Callable[..., str], originals: Path, tmp_path: Path
):
    (tmp_path / "picture.png").mkdir()
    assert "cannot write" in command(*_generate(originals, tmp_path / "picture.png"))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_read_only_output_folder_is_named(
    command: Callable[..., str], originals: Path, tmp_path: Path
):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    line = command(*_generate(originals, folder))
    assert str(folder) in line
    assert "Permission denied" in line


@pytest.mark.skipif(
    not Path("/proc/sys").is_dir(), reason="needs a folder that nobody may write to"
)
def test_a_folder_that_not_even_root_may_write_to_is_named(
    command: Callable[..., str], originals: Path
):
    assert "cannot write /proc/sys/" in command(*_generate(originals, Path("/proc/sys")))


def test_an_output_name_of_another_format_is_refused(
    command: Callable[..., str], originals: Path, tmp_path: Path
):
    assert '"jpg" is not a supported format' in command(
        *_generate(originals, tmp_path / "picture.jpg")
    )


def test_a_picture_that_cannot_be_read_is_named(command: Callable[..., str], tmp_path: Path):
    assert "absent.png" in command("info", str(tmp_path / "absent.png"))
    (tmp_path / "text.png").write_text("no picture")
    assert "not an image" in command("info", str(tmp_path / "text.png"))
