"""The old stack's flags: those that count, those that mean nothing, and that none stops a start."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphalayer.config import Settings
from alphalayer.oldflags import HONOURED, MEANINGLESS, SWITCHES, translate


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
    ],
)
def test_flags_that_count(line: str, expected: dict[str, str]):
    assert _settings(line) == expected


@pytest.mark.parametrize("flag", sorted(MEANINGLESS))
def test_flags_without_meaning_are_named(flag: str):
    translation = translate([flag, "--port", "80"])
    assert translation.settings == {"port": "80"}
    assert translation.warnings == [f"{flag} has nothing to change here and is ignored."]


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["--bogus"], "--bogus is not known"),
        (["--bogus", "value"], "--bogus value is not known"),
        (["--bogus=value"], "--bogus value is not known"),
        (["--port"], "--port needs a value"),
        (["--use-cpu", "vae"], "--use-cpu vae is not known"),
        (["stray"], "stray is not known"),
    ],
)
def test_unknown_flags_are_named_and_left_out(arguments: list[str], warning: str):
    translation = translate(arguments)
    assert translation.settings == {}
    assert len(translation.warnings) == 1
    assert warning in translation.warnings[0]


def test_every_translation_is_a_setting_that_exists():
    names = {*HONOURED.values(), *(name for setting in SWITCHES.values() for name in setting)}
    assert names <= set(Settings.model_fields)


@pytest.mark.parametrize("flag", sorted(SWITCHES))
def test_every_switch_is_accepted_by_the_settings(flag: str):
    Settings(**translate([flag]).settings)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([*HONOURED, *SWITCHES, "--x", "--x=y", "--=", "-1", "v", "", "--"]) | st.text(max_size=6),
        max_size=8,
    )
)
def test_nothing_stops_a_start(arguments: list[str]):
    translation = translate(arguments)
    assert all(isinstance(line, str) and line.endswith("ignored.") for line in translation.warnings)
