"""Invalid input of the command and the engine.

Each error is one line that names the field or the file.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import tiny_models
from tests.unit.test_catalog import FAMILIES, write

from alphalayer.cli.app import main
from alphalayer.core.errors import AlphalayerError, CorruptFile, ModelUnusable
from alphalayer.core.request import GenerationRequest
from alphalayer.engine.pipeline import LocalEngine

SMALL = ["--width", "64", "--height", "64", "--steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a valid single file, a valid diffusers folder and the LayerDiffuse files."""
    folder = tmp_path_factory.mktemp("originals")
    tiny_models.make_single_file(folder / "Stable-diffusion" / "single.safetensors")
    tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / "folder")
    tiny_models.make_layer_files(folder / "layer_model")
    return folder


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs `alphalayer` and returns its only error line."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ALPHALAYER_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["alphalayer", *arguments])
        with pytest.raises(SystemExit) as exit_error:
            main()
        printed = capsys.readouterr()
        assert exit_error.value.code == 1
        assert "Traceback" not in printed.err + printed.out
        lines = printed.err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert len(lines[0]) < 600
        return lines[0]

    return run


# --- fields


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_generate_invalid_value_names_its_field(
    command: Callable[..., str], arguments: list[str], message: str
):
    assert command("generate", *arguments).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:99", 'device "cuda:99"'), ("toaster", 'unknown device "toaster"')],
)
def test_generate_unknown_device_is_named(
    command: Callable[..., str], originals: Path, device: str, message: str
):
    assert message in command("generate", "x", "--models-dir", str(originals), "--device", device)


def test_generate_gpu_noise_on_cpu_names_its_field(command: Callable[..., str], originals: Path):
    assert command(
        "generate", "x", *SMALL, "--models-dir", str(originals), "--noise", "gpu"
    ).startswith("error: --noise: ")


def test_generate_excessive_brackets_name_the_prompt(command: Callable[..., str], originals: Path):
    line = command(
        "generate", "(" * 1000 + "x", *SMALL, "--models-dir", str(originals), "--model", "folder"
    )
    assert line.startswith("error: prompt: the attention weight")


def test_engine_long_prompt_within_limit_renders(originals: Path):
    request = GenerationRequest(
        prompt="word, " * 1600, model="folder", width=64, height=64, steps=1
    )
    assert LocalEngine(originals, device="cpu").generate(request).images[0].rgba.shape == (
        64,
        64,
        4,
    )


# --- models


def test_generate_missing_model_lists_available_models(
    command: Callable[..., str], originals: Path
):
    line = command("generate", "x", *SMALL, "--models-dir", str(originals), "--model", "absent")
    assert line.startswith(f'error: --model: no model "absent" in {originals}/Stable-diffusion')
    assert "folder, single" in line


@pytest.mark.parametrize(
    "family",
    [
        "sd15-no-vae",
        "sd2",
        "sdxl-refiner",
        "sd2-inpaint",
        "ssd-1b",
        "sdxl-unet",
    ],
)
def test_generate_other_model_family_is_named(
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


def test_generate_pickle_file_is_refused(command: Callable[..., str], tmp_path: Path):
    (tmp_path / "models" / "Stable-diffusion").mkdir(parents=True)
    (tmp_path / "models" / "Stable-diffusion" / "old.ckpt").write_bytes(b"\x80\x02.")
    line = command(
        "generate", "x", *SMALL, "--models-dir", str(tmp_path / "models"), "--model", "old"
    )
    assert "old.ckpt is a pickle file" in line


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000)


def _truncate_to_5_bytes(file: Path) -> None:
    os.truncate(file, 5)


def _flip_header(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(8)
        stream.write(b"#")


def _enlarge_header_size(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", 2**62))


def _replace_dtype(file: Path) -> None:
    """Write a valid header with an unknown number format.

    Only the reader of tensors can detect it.
    """
    data = file.read_bytes()
    file.write_bytes(
        data.replace(b'"dtype":"F16"', b'"dtype":"Q16"', 1).replace(
            b'"dtype":"F32"', b'"dtype":"Q32"', 1
        )
    )


FILE_DAMAGES = [_truncate, _truncate_to_5_bytes, _flip_header, _enlarge_header_size, _replace_dtype]


@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_generate_damaged_single_file_is_named(
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
        ("layer_xl_transparent_attn", _truncate),
        ("layer_xl_transparent_attn", _replace_dtype),
        ("vae_transparent_decoder", _truncate_to_5_bytes),
        ("vae_transparent_decoder", _flip_header),
    ],
)
def test_engine_damaged_layer_file_is_named(
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


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


FOLDER_DAMAGES: dict[str, Callable[[Path], None]] = {
    "UNet truncated": lambda folder: _truncate(
        folder / "unet" / "diffusion_pytorch_model.safetensors"
    ),
    "text encoder truncated": lambda folder: _truncate(
        folder / "text_encoder_2" / "model.safetensors"
    ),
    "UNet missing": lambda folder: (
        folder / "unet" / "diffusion_pytorch_model.safetensors"
    ).unlink(),
    "VAE config missing": lambda folder: (folder / "vae" / "config.json").unlink(),
    "VAE config damaged": lambda folder: (folder / "vae" / "config.json").write_text("{"),
    "VAE class unknown": lambda folder: (folder / "vae" / "config.json").write_text(
        '{"_class_name": "Nonsense"}'
    ),
    "UNet of a trillion channels": lambda folder: _change(
        folder / "unet" / "config.json", block_out_channels=[10**12] * 3
    ),
    "UNet of a million layers": lambda folder: _change(
        folder / "unet" / "config.json", layers_per_block=10**6
    ),
    "UNet of negative groups": lambda folder: _change(
        folder / "unet" / "config.json", norm_num_groups=-32
    ),
    "text encoder without heads": lambda folder: _change(
        folder / "text_encoder" / "config.json", num_attention_heads=-1
    ),
    "scheduler of no steps": lambda folder: _change(
        folder / "scheduler" / "scheduler_config.json", num_train_timesteps=0
    ),
    "scheduler of few steps": lambda folder: _change(
        folder / "scheduler" / "scheduler_config.json", num_train_timesteps=199
    ),
    "scheduler of text": lambda folder: _change(
        folder / "scheduler" / "scheduler_config.json", beta_start="low"
    ),
    "VAE scaled by infinity": lambda folder: _change(
        folder / "vae" / "config.json", scaling_factor=float("inf")
    ),
    "patch above its folder": lambda folder: _change(
        folder / "layerdiffuse" / "config.json", patch="../../patch.safetensors"
    ),
    "encoder above its folder": lambda folder: _change(
        folder / "layerdiffuse" / "config.json", encoder="../../encoder.safetensors"
    ),
    "decoder of a million layers": lambda folder: _change(
        folder / "layerdiffuse" / "config.json", decoder_config={"layers_per_block": 10**6}
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
        '{"patch": "patch.safetensors", "decoder": "decoder.safetensors",'
        ' "decoder_config": {"latent_block": 99}}'
    ),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGES)
def test_engine_damaged_folder_raises_alphalayer_error(
    originals: Path, tmp_path: Path, damage: str
):
    folder = tmp_path / "Stable-diffusion" / "broken"
    shutil.copytree(originals / "Stable-diffusion" / "folder", folder)
    FOLDER_DAMAGES[damage](folder)
    request = GenerationRequest(prompt="x", width=64, height=64, steps=1, model="broken")
    with pytest.raises(AlphalayerError) as error:
        LocalEngine(tmp_path, device="cpu").generate(request)
    assert "\n" not in str(error.value)
    assert "broken" in str(error.value)


def test_engine_file_damaged_after_listing_is_named(originals: Path, tmp_path: Path):
    """Damage the file after its header was read and cached."""
    from alphalayer import catalog

    file = tmp_path / "Stable-diffusion" / "single.safetensors"
    file.parent.mkdir()
    shutil.copy(originals / "Stable-diffusion" / "single.safetensors", file)
    catalog.find_models(tmp_path)
    stamp = file.stat()
    _truncate(file)
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


def test_generate_uncreatable_output_folder_is_named(
    command: Callable[..., str], originals: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("in the way")
    line = command(*_generate(originals, tmp_path / "file" / "deep"))
    assert f"cannot write {tmp_path / 'file' / 'deep'}" in line
    assert "--output" in line


def test_generate_folder_at_output_file_is_named(
    command: Callable[..., str], originals: Path, tmp_path: Path
):
    (tmp_path / "image.png").mkdir()
    assert "cannot write" in command(*_generate(originals, tmp_path / "image.png"))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_generate_read_only_output_folder_is_named(
    command: Callable[..., str], originals: Path, tmp_path: Path
):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    line = command(*_generate(originals, folder))
    assert str(folder) in line
    assert "Permission denied" in line


@pytest.mark.skipif(
    not Path("/proc/sys").is_dir(), reason="needs a folder that no user can write to"
)
def test_generate_folder_unwritable_for_root_is_named(command: Callable[..., str], originals: Path):
    assert "cannot write /proc/sys/" in command(*_generate(originals, Path("/proc/sys")))


def test_generate_unsupported_output_format_is_refused(
    command: Callable[..., str], originals: Path, tmp_path: Path
):
    assert '"jpg" is not a supported format' in command(
        *_generate(originals, tmp_path / "image.jpg")
    )


def test_info_unreadable_image_is_named(command: Callable[..., str], tmp_path: Path):
    assert "absent.png" in command("info", str(tmp_path / "absent.png"))
    (tmp_path / "text.png").write_text("no image")
    assert "not an image" in command("info", str(tmp_path / "text.png"))
