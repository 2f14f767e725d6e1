"""Errors as data: hints with a command, and the way through the journal."""

from __future__ import annotations

import json

from alphalayer.api.errors import Problem
from alphalayer.core.errors import AlphalayerError, CommandHint, LayerDiffuseMissing

ERROR = LayerDiffuseMissing(
    "patch.safetensors is missing.",
    hint=CommandHint("Get the files:", "models pull layerdiffuse"),
)


def test_command_hint_as_text_names_the_program():
    assert str(ERROR) == (
        "patch.safetensors is missing. Get the files: alphalayer models pull layerdiffuse"
    )
    assert Problem.of(ERROR).model_dump()["hint"] == (
        "Get the files: alphalayer models pull layerdiffuse"
    )


def test_command_hint_renders_the_program_as_started():
    hint = CommandHint("Get the files:", "models pull layerdiffuse")
    assert hint.command == "models pull layerdiffuse"
    assert hint.render("python3 run.py") == "Get the files: python3 run.py models pull layerdiffuse"


def test_error_survives_the_journal():
    restored = AlphalayerError.from_dict(json.loads(json.dumps(ERROR.to_dict())))
    assert type(restored) is LayerDiffuseMissing
    assert str(restored) == str(ERROR)


def test_error_of_an_unknown_code_keeps_its_code():
    error = AlphalayerError.from_dict({"code": "newer", "message": "width.", "field": "width"})
    assert (type(error), error.code, str(error)) == (AlphalayerError, "newer", "width: width.")
