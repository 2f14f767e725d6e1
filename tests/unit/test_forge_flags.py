"""Flags of AUTOMATIC1111 and Forge: supported, without effect or unknown; none stops a start."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_catalog import FAMILIES, write

from alphalayer.catalog import find_models, resolve_model
from alphalayer.cli.forge_flags import HONOURED, NO_EFFECT, SWITCHES, UNSUPPORTED, split, translate
from alphalayer.config import Settings
from alphalayer.core.errors import SetupFailed


def _settings(line: str) -> dict[str, str]:
    translation = translate(shlex.split(line))
    assert translation.warnings == []
    return translation.settings


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("--nowebui --api --listen --port 7861", {"host": "0.0.0.0", "port": "7861"}),
        ("--port=9000", {"port": "9000"}),
        ("--listen --server-name 10.0.0.5", {"host": "10.0.0.5"}),
        ("--server-name 10.0.0.5 --listen", {"host": "10.0.0.5"}),
        ("--api-auth user:pass=word", {"api_auth": "user:pass=word"}),
        ("--api-auth=user:pass=word", {"api_auth": "user:pass=word"}),
        ("--device-id 1 --all-in-fp32", {"device": "cuda:1", "dtype": "fp32"}),
        ("--use-cpu all", {"device": "cpu"}),
        ("--always-cpu", {"device": "cpu"}),
        ("--medvram-sdxl", {"memory": "balanced"}),
        ("--cors-allow-origins 'http://a,http://b'", {"cors_allow_origins": "http://a,http://b"}),
        ("--ckpt 'my model.safetensors'", {"default_model": "my model.safetensors"}),
        ("--ckpt models/Stable-diffusion/cup.safetensors", {"default_model": "cup.safetensors"}),
        ("--ckpt=/srv/models/cup.safetensors", {"default_model": "cup.safetensors"}),
        (r"--ckpt 'C:\models\cup.safetensors'", {"default_model": "cup.safetensors"}),
        ("--models-dir /srv/models", {"models_dir": "/srv/models"}),
        (
            "--models-dir /elsewhere --data-dir /srv",
            {
                "models_dir": "/elsewhere",
                "embeddings_dir": "/srv/embeddings",
                "outputs_dir": "/srv/outputs",
            },
        ),
        ("--precision full", {"dtype": "fp32"}),
        ("--precision autocast", {"dtype": "auto"}),
        ("--no-half --precision autocast", {"dtype": "fp32"}),
        ("--precision full --all-in-fp16", {"dtype": "fp16"}),
        ("--always-normal-vram", {"memory": "auto"}),
        ("--loglevel WARNING", {"log_level": "warning"}),
        ("--loglevel CRITICAL", {"log_level": "error"}),
    ],
)
def test_translate_supported_flags_become_settings(line: str, expected: dict[str, str]):
    assert _settings(line) == expected


def test_translate_resolves_folders_against_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert _settings("--models-dir ../m --embeddings-dir e") == {
        "models_dir": str(tmp_path / ".." / "m"),
        "embeddings_dir": str(tmp_path / "e"),
    }


@pytest.mark.parametrize("flag", sorted(UNSUPPORTED))
def test_translate_unsupported_flag_warns_without_its_value(flag: str):
    for arguments in ([flag, "user:secret"], [f"{flag}=user:secret"], [flag]):
        translation = translate([*arguments, "--port", "80"])
        assert translation.settings == {"port": "80"}
        assert translation.warnings == [f"{flag} is ignored: {UNSUPPORTED[flag]}."]


@pytest.mark.parametrize("flag", sorted(NO_EFFECT))
def test_translate_flag_without_effect_is_named(flag: str):
    translation = translate([flag, "--port", "80"])
    assert translation.settings == {"port": "80"}
    assert translation.warnings == [f"{flag} has no effect here and is ignored."]


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["--bogus"], "--bogus is not known"),
        (["--bogus", "value"], "--bogus value is not known"),
        (["--bogus=value"], "--bogus value is not known"),
        (["--port"], "--port needs a value"),
        (["--use-cpu", "vae"], "--use-cpu vae is not known"),
        (["stray"], "stray is not known"),
        (["--listen", "stray"], "stray is not known"),
        (["--loglevel", "loud"], "--loglevel loud is not known"),
        (["--precision", "banana"], "--precision banana is not known"),
        (["--port="], "--port needs a value"),
    ],
)
def test_translate_unknown_flag_is_named_and_ignored(arguments: list[str], warning: str):
    translation = translate(arguments)
    assert translation.settings == ({"host": "0.0.0.0"} if "--listen" in arguments else {})
    assert len(translation.warnings) == 1
    assert warning in translation.warnings[0]


def test_translate_uses_existing_settings_only():
    values = {"--loglevel": "INFO", "--use-cpu": "all", "--precision": "full"}
    made = [make(values.get(flag, "x")) for flag, make in HONOURED.items()]
    assert all(made)
    names = {name for settings in (*made, *SWITCHES.values()) for name in settings}
    assert names <= set(Settings.model_fields)


@pytest.mark.parametrize("flag", sorted(SWITCHES))
def test_translate_switches_are_valid_settings(flag: str):
    Settings(**translate([flag]).settings)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([*HONOURED, *SWITCHES, "--x", "--x=y", "--=", "-1", "v", "", "--"])
        | st.text(max_size=6),
        max_size=8,
    )
)
def test_translate_any_flags_allow_a_start(arguments: list[str]):
    try:
        translation = translate(arguments)
    except SetupFailed:
        assert "--api-auth" in arguments
    else:
        assert all("ignored" in line for line in translation.warnings)


@pytest.mark.parametrize(
    "line", ["--api-auth '' --listen", "--api-auth --listen", "--api-auth=", "--listen --api-auth"]
)
def test_translate_api_auth_without_a_password_is_refused(line: str):
    with pytest.raises(SetupFailed, match="--api-auth needs a value"):
        translate(shlex.split(line))


def test_launch_script_explains_every_supported_flag():
    script = (Path(__file__).parents[2] / "launch.py").read_text(encoding="utf-8")
    assert [flag for flag in (*HONOURED, *SWITCHES) if flag not in script] == []


def test_translate_flag_after_a_switch_is_no_value():
    assert translate(["--listen", "-f", "--port", "-h"]).settings == {"host": "0.0.0.0"}


def test_split_open_quote_is_an_error_without_the_password():
    assert split("--port '7 8'") == ["--port", "7 8"]
    with pytest.raises(
        SetupFailed, match="COMMANDLINE_ARGS cannot be read: no closing quotation"
    ) as raised:
        split('--api-auth user:secret --port "78')
    assert "secret" not in str(raised.value)


def test_translate_checkpoint_path_resolves_to_its_model(tmp_path: Path):
    folder = tmp_path / "Stable-diffusion"
    for name in ("a", "cup"):
        write(folder / "sub" / f"{name}.safetensors", FAMILIES["sdxl"])
    for path in (
        "models/Stable-diffusion/sub/cup.safetensors",
        str(folder / "sub" / "cup.safetensors"),
    ):
        requested = translate(["--ckpt", path]).settings["default_model"]
        assert (
            resolve_model(requested, find_models(tmp_path)).path
            == folder / "sub" / "cup.safetensors"
        )
