"""Start of the command: a command imports the packages that it needs, and no more."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alphalayer.cli.app import COMMANDS, load_command
from alphalayer.images import codecs

_IMPORTED = """
import json, sys
from alphalayer.cli.app import main
try:
    main()
except SystemExit:
    pass
print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
SERVICE = {"fastapi", "httpx", "huggingface_hub", "limits", "obstore", "opentelemetry"} | {
    "prometheus_client",
    "sqlalchemy",
    "stamina",
    "uvicorn",
}
ENGINE = {"torch", "diffusers", "transformers", "accelerate", "scipy", "safetensors", "sympy"}
IMAGES = {"numpy", "PIL", "isal"}


def _imported(*command: str) -> set[str]:
    """Return the packages that a process with this command has imported at its end."""
    output = subprocess.run(
        [sys.executable, "-c", _IMPORTED, *command], capture_output=True, text=True, check=True
    ).stdout
    return set(json.loads(output.splitlines()[-1]))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("image") / "cup.png"
    file.write_bytes(codecs.encode(np.zeros((8, 8, 4), np.uint8), "png", "a cup"))
    return str(file)


@pytest.mark.parametrize("command", ["--help", "models", "version", "models list", "keys list"])
def test_command_without_images_imports_no_image_package(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert not _imported(*command.split()) & (SERVICE | ENGINE | IMAGES)


def test_help_imports_no_settings():
    assert not _imported("--help") & {"asyncio", "pydantic", "structlog"}


def test_info_imports_no_service_and_no_engine(image: str):
    imported = _imported("info", image)
    assert "PIL" in imported
    assert not imported & (SERVICE | ENGINE)


def test_generate_with_a_wrong_option_imports_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert not _imported("generate", "a cup", "--steps", "0") & (SERVICE | ENGINE)


def test_engine_loads_no_compiler_to_generate(tmp_path: Path):
    """Load the embedded model and generate: torch's compiler would take seconds."""
    script = (
        "import sys, alphalayer.worker.engine_process\n"
        "from alphalayer.core.request import GenerationRequest\n"
        "from alphalayer.engine.pipeline import create_engine\n"
        f"engine = create_engine({{'models_dir': {str(tmp_path)!r}, 'device': 'cpu'}})\n"
        "engine.generate(GenerationRequest(prompt='a cup', width=64, height=64, steps=2))\n"
        "sys.exit(str({'torch._dynamo', 'torch._inductor', 'sympy', 'scipy'} & {*sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stderr.strip() == "set()"


@pytest.mark.parametrize("name", COMMANDS)
def test_summary_of_a_command_is_that_of_its_help(name: str):
    command = load_command(name)
    assert command.hidden == COMMANDS[name].is_hidden
    assert inspect.cleandoc(command.help).startswith(COMMANDS[name].summary)
