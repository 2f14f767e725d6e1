"""The `alphalayer` command: images of a tiny model, file names, models, errors in one line."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pytest
import typer
from pydantic import BaseModel, Field
from tests.support import tiny_models
from tests.support.serving import free_port
from tests.unit.test_catalog import FAMILIES, write
from typer.main import get_command
from typer.testing import CliRunner

from alphalayer import __version__
from alphalayer.cli import rendering
from alphalayer.cli.app import app, load_command, main
from alphalayer.cli.options import add_options, name_flags, select_fields
from alphalayer.config import Settings
from alphalayer.core.inputs import size_for_image
from alphalayer.core.job import Job, JobResult, Output
from alphalayer.core.modes import MODES, ConditionRole
from alphalayer.core.request import GenerationOptions, GenerationRequest, ModelDefaults
from alphalayer.images import codecs, postprocess
from alphalayer.images.infotext import read_parameters

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make_diffusers_folder(folder / "Stable-diffusion" / "tiny")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the entry point in an empty folder.

    It returns the exit code, the standard output and the standard error.
    """
    import os

    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ALPHALAYER_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alphalayer", *arguments])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def _command(name: str) -> Any:
    return load_command(name)


def _generate(models: Path, *more: str) -> list[str]:
    return [
        "generate",
        "a red apple",
        "--models-dir",
        str(models),
        "--model",
        "tiny",
        "--steps",
        "1",
        "--device",
        "cpu",
        *more,
    ]


def test_generate_writes_a_transparent_png_with_its_settings(
    run: Run, models: Path, tmp_path: Path
):
    code, out, _ = run(*_generate(models, "--seed", "7"))
    assert code == 0
    (file,) = (tmp_path / "outputs").iterdir()
    assert re.fullmatch(r"alpha_\d{10}_[0-9a-f]{8}\.png", file.name)
    rgba, parameters = codecs.decode(file.read_bytes())
    assert rgba.shape == (64, 64, 4)
    assert rgba[..., 3].min() < 255
    saved = read_parameters(parameters or "")
    assert (saved["Prompt"], saved["Seed"], saved["Steps"], saved["Model"]) == (
        "a red apple",
        "7",
        "1",
        "tiny",
    )
    assert re.fullmatch(rf"outputs/{file.name}  64x64  seed 7  [\d.]+ s  tiny\n", out)


def test_generate_prints_each_warning_on_stderr(
    run: Run, models: Path, monkeypatch: pytest.MonkeyPatch
):
    result = JobResult(
        images=(), settings=ModelDefaults(), model_name="m", model_hash="", warnings=("a", "[b]")
    )

    def render(*_: object) -> JobResult:
        return result

    monkeypatch.setattr(rendering, "_run", render)
    assert run(*_generate(models))[::2] == (0, "a\n[b]\n")


def test_generate_batch_into_a_named_file_is_numbered(run: Run, models: Path, tmp_path: Path):
    code, out, _ = run(
        *_generate(models, "--batch-size", "2", "--output", str(tmp_path / "new" / "cup.png"))
    )
    assert code == 0
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["cup-2.png", "cup.png"]
    assert [line.split("  ")[2] for line in out.splitlines()] == ["seed 12345", "seed 12346"]
    first, second = (
        codecs.decode((tmp_path / "new" / name).read_bytes())[0]
        for name in ("cup.png", "cup-2.png")
    )
    assert not np.array_equal(first, second)


def test_generate_format_follows_file_name_or_flag(run: Run, models: Path, tmp_path: Path):
    assert run(*_generate(models, "--output", str(tmp_path / "cup.avif")))[0] == 0
    assert run(*_generate(models, "--output", str(tmp_path / "folder"), "--format", "webp"))[0] == 0
    (other,) = (tmp_path / "folder").iterdir()
    assert other.suffix == ".webp"
    for file in (tmp_path / "cup.avif", other):
        rgba, parameters = codecs.decode(file.read_bytes())
        assert rgba.shape == (64, 64, 4)
        assert (parameters or "").startswith("a red apple\n")


def test_generate_options_reach_the_engine(run: Run, models: Path, tmp_path: Path):
    options = [
        "--sampler",
        "DPM++ 2M Karras",
        "--scheduler",
        "Automatic",
        "--cfg-scale",
        "3.5",
        "--width",
        "128",
        "--height",
        "70",
        "--noise",
        "cpu",
    ]
    assert (
        run(
            *_generate(
                models,
                *options,
                "--no-transparent",
                "--negative-prompt",
                "",
                "-o",
                str(tmp_path / "cup.png"),
            )
        )[0]
        == 0
    )
    rgba, parameters = codecs.decode((tmp_path / "cup.png").read_bytes())
    assert rgba.shape == (70, 128, 4)
    assert (rgba[..., 3] == 255).all()
    saved = read_parameters(parameters or "")
    assert (saved["Sampler"], saved["Schedule type"], saved["CFG scale"], saved["RNG"]) == (
        "DPM++ 2M",
        "Karras",
        "3.5",
        "CPU",
    )
    assert saved["Negative prompt"] == ""
    assert "layerdiffusion_enabled" not in saved


def test_generate_has_an_option_for_each_core_field():
    """Add fields in one place only: the core."""
    models = (GenerationRequest, GenerationOptions, Output)
    names = {name for model in models for name in model.model_fields}
    parameters = {parameter.name: parameter for parameter in _command("generate").params}
    assert names - {"prompt", "inputs", "options", "warnings"} <= parameters.keys()
    assert {f"{role}_image" for role in get_args(ConditionRole)} <= parameters.keys()
    assert {"image", "mask"} <= parameters.keys()
    assert parameters["iterations"].opts == ["--n-iter"]
    assert parameters.keys().isdisjoint({"previews", "stages", "stores_layers"})
    flags = {option for parameter in parameters.values() for option in parameter.opts}
    assert {"--mode", "--clip-skip", "--trim-padding", "--layerdiffuse-stop-at", "-o"} <= flags


def test_add_options_describes_options_by_their_fields():
    class Example(BaseModel):
        strength: Annotated[float, Field(gt=0, le=2, description="How strong.")] | None = None
        count: Annotated[int, Field(ge=0, le=2**63, description="How many.")] = 0
        color: Annotated[Literal["red", "blue"], Field(description="Color.")] = "red"
        tags: Annotated[tuple[str, ...], Field(description="Tags.")] = ()
        is_large: Annotated[bool, Field(description="Large.")] = False
        left_out: int = 0
        own: int = 0

    received: list[dict[str, object]] = []
    example = typer.Typer()

    @example.command()
    @name_flags
    @add_options(Example, skip=("left_out",))
    def command(own: str = "mine", **options: object) -> None:
        received.append({"own": own, **select_fields(Example, options)})

    run = CliRunner().invoke
    assert run(example, []).exit_code == 0
    options = '--strength 1.5 --count 3 --tags ["a"] --no-is-large --own x'
    assert run(example, options.split()).exit_code == 0
    assert received == [
        {"own": "mine"},
        {"own": "x", "strength": 1.5, "count": 3, "tags": ["a"], "is_large": False},
    ]
    for wrong in (["--tags", "a"], ["--count", "many"], ["--left-out", "1"]):
        assert run(example, wrong).exit_code == 2
    help_ = {parameter.name: parameter.help for parameter in get_command(example).params}
    assert help_["strength"] == "How strong. More than 0, at most 2."
    assert help_["count"] == "How many. At least 0. Default: 0."
    assert help_["tags"] == "Tags. As JSON."
    assert help_["color"] == "Color. One of: red, blue. Default: red."


def test_generate_mode_and_output_options_reach_the_file(run: Run, models: Path, tmp_path: Path):
    options = "--mode attention --layerdiffuse-weight 0.5 --layerdiffuse-stop-at 0.75 --clip-skip 2"
    options += " --subseed 5 --subseed-strength 0.25 --trim --trim-threshold 200 --trim-padding 3"
    assert run(*_generate(models, *options.split(), "-o", "cup.png"))[0] == 0
    rgba, parameters = codecs.decode((tmp_path / "cup.png").read_bytes())
    saved = read_parameters(parameters or "")
    assert saved["layerdiffusion_method"] == MODES["attention"].label
    assert saved["layerdiffusion_weight"] == "0.5"
    assert saved["layerdiffusion_ending_step"] == "0.75"
    assert (saved["Clip skip"], saved["Variation seed strength"]) == ("2", "0.25")
    assert saved["Variation seed"] == "5"
    code, _, err = run(*_generate(models, "--mode", "conv"))
    assert code == 1
    assert 'not one of "conv"' in err
    whole, _ = codecs.decode(_generate_untrimmed(run, models, options).read_bytes())
    np.testing.assert_array_equal(rgba, postprocess.trim(whole, 200, 3))


def _generate_untrimmed(run: Run, models: Path, options: str) -> Path:
    """Generate the image of the same options, without trimming."""
    kept = options.replace("--trim --trim-threshold 200 --trim-padding 3", "")
    assert run(*_generate(models, *kept.split(), "-o", "whole.png"))[0] == 0
    return Path("whole.png")


def test_generate_iterations_into_a_named_file_are_numbered(run: Run, models: Path, tmp_path: Path):
    options = ["--n-iter", "2", "--mode", "opaque", "-o", "new/cup.webp"]
    code, out, _ = run(*_generate(models, *options))
    assert code == 0
    assert [line.split("  ")[::2][:2] for line in out.splitlines()] == [
        ["new/cup.webp", "seed 12345"],
        ["new/cup-2.webp", "seed 12346"],
    ]
    for name in ("cup.webp", "cup-2.webp"):
        rgba, _ = codecs.decode((tmp_path / "new" / name).read_bytes())
        assert (rgba[..., 3] == 255).all()


def test_generate_replaces_a_named_file(run: Run, models: Path, tmp_path: Path):
    (tmp_path / "cup.png").write_bytes(b"old")
    assert run(*_generate(models, "-o", "cup.png"))[0] == 0
    assert codecs.decode((tmp_path / "cup.png").read_bytes())[0].shape == (64, 64, 4)


def test_generate_reads_an_input_image_from_its_file(run: Run, tmp_path: Path):
    models = tmp_path / "models"
    tiny_models.make_condition_patch(tiny_models.make_shared_models(models), "fg2ble")
    mode = ("--mode", "fg2ble", "--width", "64", "--height", "64")
    arguments = (*mode, "--foreground-image", "table.png", "-o", "cup.png")
    code, _, err = run(*_generate(models, *arguments))
    assert code == 1
    assert "--foreground-image: cannot read table.png: No such file or directory." in err
    (tmp_path / "table.png").write_bytes(b"no image")
    assert "--foreground-image: not an image." in run(*_generate(models, *arguments))[2]
    (tmp_path / "table.png").write_bytes(codecs.encode(np.zeros((8, 8, 4), np.uint8)))
    code, out, err = run(*_generate(models, *arguments))
    assert code == 0, err
    assert out.startswith("cup.png")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["cup.png", "table.png"]


def test_generate_mode_without_its_input_image_is_refused(run: Run, models: Path):
    err = run(*_generate(models, "--mode", "fg2ble"))[2]
    assert 'mode "fg2ble" takes one image each of: foreground' in err


def _cut_out(width: int, height: int) -> bytes:
    rgba = np.full((height, width, 4), 200, np.uint8)
    rgba[0, :, 3] = 0
    return codecs.encode(rgba)


def test_generate_with_an_image_and_mask_requests_a_change(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cup.png").write_bytes(_cut_out(100, 73))
    (tmp_path / "mask.png").write_bytes(_cut_out(100, 73))
    rendered: list[tuple[Job, dict[str, codecs.Rgba]]] = []

    def render(job: Job, files: Any, _: Settings) -> JobResult:
        rendered.append((job, {}))
        for image in job.spec.generation.inputs:

            async def read(name: str) -> bytes:
                return b"".join([part async for part in (await files.open(name)).chunks])

            data = asyncio.run(read(image.file_name))
            rendered[-1][1][image.role] = codecs.decode(data)[0]
        return JobResult(images=(), settings=ModelDefaults(), model_name="m", model_hash="")

    monkeypatch.setattr(rendering, "_run", render)
    images = ("--image", "cup.png", "--mask", "mask.png")
    options = "--strength 0.4 --exact-steps --alpha keep --mask-fill fill --masked-only"
    code, _, err = run(*_generate(models, *images, *options.split(), "--mask-blur", "2"))
    assert code == 0, err
    ((job, inputs),) = rendered
    request = job.spec.generation
    assert (request.width, request.height) == (96, 72)
    assert (request.strength, request.exact_steps, request.alpha) == (0.4, True, "keep")
    assert (request.mask_fill, request.masked_only, request.mask_blur) == ("fill", True, 2)
    assert inputs["init"][0, 0].tolist() == [200, 200, 200, 0]
    # the opaque part of the mask is changed
    assert [inputs["mask"][row, 0, 0] for row in (0, 1)] == [0, 255]
    run(*_generate(models, *images, "--width", "128"))
    assert rendered[1][0].spec.generation.size == (128, 96)


def test_generate_opaque_image_is_refused_with_advice(run: Run, models: Path, tmp_path: Path):
    (tmp_path / "photo.png").write_bytes(codecs.encode(np.full((8, 8, 4), 255, np.uint8)))
    code, _, err = run(*_generate(models, "--image", "photo.png"))
    assert code == 1
    assert "--image: the image is opaque, and LayerDiffuse changes images with" in err
    assert "Remove its background first, or add --no-transparent." in err
    assert "unknown mode" in run(*_generate(models, "--image", "photo.png", "--mode", "x"))[2]
    err = run(*_generate(models, "--mask", "photo.png"))[2]
    assert "--mask: it needs an image to change. Name one with --image." in err
    assert "--mask: cannot read none.png" in run(*_generate(models, "--mask", "none.png"))[2]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((100, 73), (96, 72)),
        ((4096, 1000), (2048, 496)),
        ((16, 32), (64, 128)),
        ((3000, 10), (2048, 64)),
        ((1, 16_000), (64, 2048)),
    ],
)
def test_size_for_image_is_near_its_own(size: tuple[int, int], expected: tuple[int, int]):
    assert size_for_image(size) == expected


def test_size_for_image_follows_from_a_requested_side():
    assert size_for_image((300, 200), 1200) == (1200, 800)
    assert size_for_image((300, 200), height=100) == (152, 100)
    assert size_for_image((300, 200), 70, 80) == (70, 80)
    assert size_for_image((1000, 10), 1000) == (1000, 64)


def test_generate_same_command_gives_the_same_image(run: Run, models: Path, tmp_path: Path):
    for name in ("one.png", "two.png"):
        run(*_generate(models, "-o", str(tmp_path / name)))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_info_shows_the_settings_of_an_image(run: Run, tmp_path: Path):
    (tmp_path / "cup.png").write_bytes(
        codecs.encode(
            np.zeros((3, 5, 4), np.uint8), parameters="a [cup]\nSteps: 1, Size: 5x3, Seed: 2"
        )
    )
    (tmp_path / "bare.png").write_bytes(codecs.encode(np.zeros((3, 5, 4), np.uint8)))
    code, out, _ = run("info", "cup.png")
    assert (code, out) == (0, "cup.png  5x3\na [cup]\nSteps: 1, Size: 5x3, Seed: 2\n")
    assert "no settings" in run("info", "bare.png")[1]


def test_models_list_and_verify_report_each_file(run: Run, tmp_path: Path):
    write(tmp_path / "models" / "Stable-diffusion" / "cup.safetensors", FAMILIES["lora"])
    write(tmp_path / "models" / "Stable-diffusion" / "old.safetensors", FAMILIES["sd2"], missing=5)
    code, out, _ = run("models", "list")
    assert code == 0
    checkpoints = "models/Stable-diffusion"
    assert (
        f"error  cup  {checkpoints}/cup.safetensors is a LoRA, not a checkpoint.\n"
        "    Move it to Lora/.\n" in out
    )
    assert f"error  old  {checkpoints}/old.safetensors is cut off" in out
    assert re.search(
        r"^ok  alphalayer-mini( \[\w+\])?  small, built in  \S+/builtin_models/alphalayer-mini\n"
        r"    For SDXL run: alphalayer models pull sdxl-base layerdiffuse$",
        out,
        re.MULTILINE,
    )
    code, out, _ = run("models", "verify")
    assert code == 1
    assert f"error  {checkpoints}/old.safetensors  is cut off" in out


def test_output_names_in_brackets_are_shown_unchanged(run: Run, tmp_path: Path):
    """Square brackets are markup to the library that prints."""
    folder = tmp_path / "m[/x]" / "Stable-diffusion"
    write(folder / "model[v1].safetensors", FAMILIES["sd2"])
    for command in (["models", "list"], ["models", "verify"], ["doctor"]):
        _, out, err = run(*command, "--models-dir", "m[/x]")
        assert "m[/x]/Stable-diffusion/model[v1].safetensors" in out
        assert err == ""
    (tmp_path / "cup[red].png").write_bytes(codecs.encode(np.zeros((3, 5, 4), np.uint8)))
    assert run("info", "cup[red].png")[1].startswith("cup[red].png  5x3\n")


@pytest.mark.parametrize(
    "command", [["models", "list"], ["models", "verify"], ["generate", "x"], ["serve"]]
)
def test_models_dir_missing_folder_is_an_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
):
    (tmp_path / "file").touch()
    for folder, why in (("absent", "does not exist"), ("file", "is not a folder")):
        code, out, err = run(*command, "--models-dir", folder)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: the models folder {folder} {why}.")
    monkeypatch.setenv("ALPHALAYER_MODELS_DIR", "elsewhere")
    assert run(*command)[2].startswith("error: the models folder elsewhere does not exist.")


def test_generate_missing_model_names_the_models_folder(run: Run, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    _, _, err = run("generate", "x", "--models-dir", "mine", "--model", "absent")
    assert err.startswith(
        'error: --model: no model "absent" in mine/Stable-diffusion; '
        "there is: alphalayer-mini (built in)."
    )


def test_generate_with_the_embedded_model_is_reported(run: Run, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    small = ["--width", "64", "--height", "64", "--steps", "1", "--device", "cpu"]
    code, out, err = run("generate", "an apple", "--models-dir", "mine", *small)
    assert code == 0
    assert out.endswith("  alphalayer-mini\n")
    assert err.startswith(
        "Generating with alphalayer-mini, the small embedded model. "
        "mine/Stable-diffusion holds no other"
    )
    assert "alphalayer models pull" in err


def test_usage_and_hints_name_the_program_as_started(run: Run, monkeypatch: pytest.MonkeyPatch):
    assert "Usage: alphalayer generate" in run("generate", "-h")[1]
    assert "or run: alphalayer models pull" in run("generate", "apple", "--model", "absent")[2]
    monkeypatch.setenv("ALPHALAYER_STARTED_BY", "python3 run.py")
    assert "Usage: python3 run.py generate" in run("generate")[2]
    assert "or run: python3 run.py models pull" in run("generate", "apple", "--model", "absent")[2]
    assert "    For SDXL run: python3 run.py models pull" in run("models", "list")[1]


def test_keys_broken_file_is_one_line(run: Run, tmp_path: Path):
    (tmp_path / "data").mkdir()
    for content in ("{", '[{"name": "me"}]', '{"name": "me"}'):
        (tmp_path / "data" / "keys.json").write_text(content)
        code, _, err = run("keys", "list")
        assert code == 1
        assert err.startswith("error: data/keys.json cannot be read: ")
        assert len(err.splitlines()) == 1
        assert "https://" not in err


def test_keys_add_prints_the_key_alone_and_its_file_to_stderr(run: Run, tmp_path: Path):
    code, out, err = run("keys", "add", "bob")
    assert code == 0
    assert re.fullmatch(r"alk_\S+\n", out)
    assert str(tmp_path / "data" / "keys.json") in err
    run("keys", "add", "ann")
    assert run("keys", "remove", "bob") == (0, "", "")
    code, _, err = run("keys", "remove", "ann")
    assert code == 0
    assert "no key is left, so every request is rejected" in err
    assert str(tmp_path / "data" / "keys.json") in err


def test_keys_list_shows_scopes_expiry_limits_and_last_use(run: Run, tmp_path: Path):
    scopes = ("--scope", "read", "--scope", "metrics")
    assert run("keys", "add", "bob", *scopes, "--expires", "2999-01-31")[0] == 0
    assert run("keys", "add", "ann", "--cost-per-minute", "600")[0] == 0
    (tmp_path / "data" / "keys-used.json").write_text('{"bob": 86400.0}')
    code, out, _ = run("keys", "list")
    assert code == 0
    for text in ("read", "metrics", "2999-01-31 00:00", "1970-01-02 00:00", "600 megapixel-steps"):
        assert text in out
    code, _, err = run("keys", "add", "eve", "--scope", "root")
    assert code == 1
    assert '"root"' in err
    code, out, _ = run("keys", "rotate", "bob")
    assert code == 0
    assert re.fullmatch(r"alk_\S+\n", out)


def test_serve_missing_default_model_stops_the_start(run: Run):
    for command in (
        ["serve", "--default-model", "nope"],
        ["serve-as-before", "--ckpt", "nope.safetensors"],
    ):
        code, _, err = run(*command, "--port", str(free_port()))
        assert code == 1
        assert "error: setting default_model: no model " in err
        assert '"nope' in err


def test_models_pull_requires_confirmation(run: Run, tmp_path: Path):
    """Answer "n", after which nothing is downloaded."""
    result = CliRunner().invoke(
        app, ["models", "pull", "sdxl-base", "--models-dir", str(tmp_path)], input="n\n"
    )
    assert result.exit_code == 1
    assert "Download them under these licences?" in result.output
    assert list(tmp_path.iterdir()) == []


def test_models_pull_unknown_or_restricted_model_is_refused(run: Run):
    for name, message in (
        ("sd3", 'error: name: "sd3" is not'),
        ("juggernaut-xl", "error: name: Juggernaut XL cannot be downloaded"),
    ):
        code, _, err = run("models", "pull", name)
        assert code == 1
        assert err.startswith(message)
        assert len(err.splitlines()) == 1


def test_doctor_exit_code_follows_its_findings(run: Run, models: Path):
    code, out, _ = run("doctor", "--models-dir", str(models))
    assert "torch" in out
    assert "model tiny" in out
    assert code == (1 if re.search("^error", out, re.MULTILINE) else 0)


def test_settings_error_is_one_line(run: Run, tmp_path: Path):
    (tmp_path / "alphalayer.toml").write_text('port = "many"')
    code, out, err = run("models", "list")
    assert (code, out) == (1, "")
    assert err.startswith("error: alphalayer.toml, port: ")
    assert len(err.splitlines()) == 1


def test_serve_has_a_flag_for_each_setting(run: Run, monkeypatch: pytest.MonkeyPatch):
    recorded: list[Settings] = []
    monkeypatch.setattr("alphalayer.cli.serve.run_server", recorded.append)
    flags = [
        "--queue-limit",
        "5",
        "--log-json",
        "--no-tracing",
        "--keep-jobs-days",
        "0.5",
        "--api-auth",
        "ann:a",
    ]
    assert run("serve", *flags, "--port", "9000")[0] == 0
    (settings,) = recorded
    assert (settings.queue_limit, settings.log_json, settings.tracing, settings.port) == (
        5,
        True,
        False,
        9000,
    )
    assert settings.keep_jobs_days == 0.5
    assert run("serve", "--queue-limit", "many")[2].startswith("error: --queue-limit: ")
    assert run("serve", "--listen")[0] == 0
    assert recorded[-1].host == "0.0.0.0"
    assert run("serve", "--listen", "--host", "10.0.0.5")[0] == 0
    assert recorded[-1].host == "10.0.0.5"


def test_help_fits_a_narrow_terminal_with_whole_flags(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("serve", "--help")[1].splitlines()
    assert max(map(len, lines)) <= 80
    for name in Settings.model_fields:
        assert any(line.lstrip().startswith(f"--{name.replace('_', '-')}") for line in lines), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "100"], "--batch-size: got 100; at most 8."),
        (["--dtype", "fp8"], '--dtype: got "fp8"'),
        (["--n-iter", "17"], "--n-iter: got 17; at most 16."),
        (["--mode", "magic"], '--mode: unknown mode "magic"; use one of: attention, conv,'),
        (["--trim-threshold", "255"], "--trim-threshold: got 255; at most 254."),
        (["--format", "jpeg"], '--format: "jpeg" is not a supported format with transparency'),
        (["--output", "cup.jpeg"], '--format: "jpeg" is not a supported format with transparency'),
        (["--loras", '[{"name": "x", "weight": 101}]'], "loras.0.weight: got 101; at most 100."),
        (["--background", "red"], '--background: got "red"; a colour'),
        (
            ["--output", "/proc/absent/cup.png"],
            "No such file or directory. Name another place with --output.",
        ),
    ],
)
def test_generate_errors_name_the_flag(run: Run, arguments: list[str], message: str):
    code, _, err = run("generate", "x", *arguments)
    assert code == 1
    assert message in err


def test_generate_prompt_without_quotes_is_explained(run: Run):
    code, _, err = run("generate", "an", "apple", "--steps", "1")
    assert code == 2
    assert 'put it in quotes: alphalayer generate "an apple"' in err


def test_generate_finishes_the_image_as_requested(run: Run, models: Path):
    assert (
        run(*_generate(models, "--background", "#ff0000", "--defringe", "-o", "plain.png"))[0] == 0
    )
    rgba, _ = codecs.decode(Path("plain.png").read_bytes())
    assert (rgba[..., 3] == 255).all()
    code, out, _ = run(*_generate(models, "--trim", "-o", "cut.png"))
    assert code == 0
    trimmed, _ = codecs.decode(Path("cut.png").read_bytes())
    assert f"{trimmed.shape[1]}x{trimmed.shape[0]}" in out


def test_serve_as_before_reports_unreadable_flags_and_settings(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home = tmp_path / "home"
    home.mkdir()
    (home / "alphalayer.toml").write_text('port = "many"')
    code, _, err = run("serve-as-before", "--home", str(home), "--bogus")
    assert code == 1
    assert [line.partition(":")[0] for line in err.splitlines()] == ["warning", "error"]
    assert "alphalayer.toml, port" in err
    monkeypatch.setenv("COMMANDLINE_ARGS", '--port "78')
    code, _, err = run("serve-as-before")
    assert code == 1
    assert err.startswith("error: COMMANDLINE_ARGS cannot be read: no closing quotation.")


def test_serve_as_before_decodes_as_forge_2_unless_set(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[Settings] = []
    monkeypatch.setattr("alphalayer.cli.serve.run_server", started.append)
    run("serve-as-before", "--home", str(tmp_path))
    monkeypatch.setenv("ALPHALAYER_DECODE", "official")
    run("serve-as-before", "--home", str(tmp_path))
    assert [settings.decode for settings in started] == ["auto", "official"]


def test_errors_hold_no_terminal_markup(run: Run):
    """Show a name in square brackets unchanged."""
    _, _, err = run("generate", "x", "--sampler", "[bold]Magic[/]")
    assert '"[bold]Magic[/]"' in err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    "arguments",
    [["generate"], ["generate", "x", "--steps", "many"], ["generate", "x", "--bogus"], ["bogus"]],
)
def test_wrong_usage_exits_2_without_a_traceback(run: Run, arguments: list[str]):
    code, _, err = run(*arguments)
    assert code == 2
    assert "Usage:" in err
    assert "Traceback" not in err


def test_help_and_version_are_printed(run: Run):
    help_ = " ".join(run("generate", "--help")[1].split())
    assert "DPM++ 3M SDE" in help_
    assert "SGM Uniform" in help_
    assert run("--version") == run("version")
    assert run("version") == (0, f"alphalayer {__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    for command in ("generate", "serve", "models", "doctor", "info", "version"):
        assert command in out
