"""The doctor on good and bad machines, with real files, ports and torch.

Each finding that is not ok has a hint.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.layer_shapes import layer_shapes
from tests.support.servers import Postgres
from tests.unit.test_catalog import FAMILIES, write

from alphalayer.catalog import entries
from alphalayer.cli import doctor
from alphalayer.cli.checks import check_port
from alphalayer.cli.doctor import Finding, diagnose
from alphalayer.config import Settings
from alphalayer.core.errors import SetupFailed


def _settings(folder: Path, port: int, **changes: object) -> Settings:
    return Settings(
        models_dir=folder / "models",
        outputs_dir=folder / "outputs",
        port=port,
        device="cpu",
        **changes,
    )


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def no_embedded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the embedded model."""
    monkeypatch.setattr(entries, "EMBEDDED_MODEL", tmp_path / "absent")


def _find_finding(findings: list[Finding], words: str) -> Finding:
    (finding,) = [finding for finding in findings if words in finding.text]
    return finding


def _write_models(folder: Path) -> None:
    write(folder / "models" / "Stable-diffusion" / "cup.safetensors", FAMILIES["sdxl"])
    layers = folder / "models" / "layer_model"
    write(layers / "layer_xl_transparent_attn.safetensors", FAMILIES["layerdiffuse-patch"])
    write(layers / "vae_transparent_decoder.safetensors", FAMILIES["transparent-decoder"])


def test_diagnose_good_machine_is_ok(tmp_path: Path, free_port: int):
    _write_models(tmp_path)
    findings = diagnose(_settings(tmp_path, free_port))
    assert [finding for finding in findings if finding.level == "error"] == []
    layers = ("LayerDiffuse patch", "LayerDiffuse transparent decoder")
    for words in ("torch", "model cup", *layers, f"port {free_port}", "GiB free for images"):
        assert _find_finding(findings, words).level == "ok"


def test_diagnose_missing_parts_are_findings_with_hints(
    tmp_path: Path, taken_port: int, no_embedded_model: None
):
    (tmp_path / "outputs").write_text("in the way")
    (tmp_path / "models").mkdir()
    settings = _settings(tmp_path, taken_port)
    findings = [
        finding
        for check in (doctor._models, doctor._port, doctor._outputs)
        for finding in check(settings)
    ]
    assert _find_finding(findings, "no usable model").level == "error"
    assert "alphalayer models pull" in _find_finding(findings, "no usable model").hint
    assert _find_finding(findings, f"port {taken_port}").level == "warning"
    assert "--port" in _find_finding(findings, f"port {taken_port}").hint
    assert _find_finding(findings, "cannot write to").level == "error"
    assert all(finding.hint for finding in findings if finding.level != "ok")


def test_layer_files_missing_are_errors_if_a_model_needs_them(tmp_path: Path):
    write(tmp_path / "models" / "Stable-diffusion" / "cup.safetensors", FAMILIES["sdxl"])
    findings = list(doctor._layer_files(_settings(tmp_path, 1)))
    assert [finding.level for finding in findings] == ["error", "error"]
    assert "layer_xl_transparent_attn.safetensors" in findings[0].text
    assert "vae_transparent_decoder.safetensors" in findings[1].text
    assert all("pull layerdiffuse" in finding.hint for finding in findings)


def test_layer_files_named_by_a_model_must_exist(tmp_path: Path, no_embedded_model: None):
    folder = tmp_path / "models" / "Stable-diffusion" / "own"
    shutil.copytree(
        Path(entries.__file__).parent.parent / "builtin_models" / "alphalayer-mini", folder
    )
    (folder / "layerdiffuse" / "config.json").write_text('{"patch": "mine.safetensors"}')
    (patch, decoder) = doctor._layer_files(_settings(tmp_path, 1))
    assert f"(mine.safetensors) is not in {folder / 'layerdiffuse'}" in patch.text
    assert f"is not in {tmp_path / 'models' / 'layer_model'}" in decoder.text
    (folder / "layerdiffuse" / "config.json").write_text("[" * 5)
    (broken,) = doctor._layer_files(_settings(tmp_path, 1))
    assert "config.json is damaged" in broken.text


def test_layer_files_damaged_content_is_an_error(tmp_path: Path):
    _write_models(tmp_path)
    patch = tmp_path / "models" / "layer_model" / "layer_xl_transparent_attn.safetensors"
    patch.write_bytes(os.urandom(5000))
    finding = _find_finding(list(doctor._layer_files(_settings(tmp_path, 1))), "LayerDiffuse patch")
    assert finding.level == "error"
    assert str(patch) in finding.text
    assert "pull layerdiffuse" in finding.hint


def test_layer_files_with_a_wrong_name_are_errors(tmp_path: Path):
    _write_models(tmp_path)
    layers = tmp_path / "models" / "layer_model"
    shapes = layer_shapes()
    write(layers / "layer_xl_fgble2bg.safetensors", shapes["layer_xl_bgble2fg"])
    write(layers / "layer_xl_bg2ble.safetensors", shapes["layer_xl_fg2ble"])
    findings = [
        finding
        for finding in doctor._layer_files(_settings(tmp_path, 1))
        if finding.level == "error"
    ]
    (finding,) = findings
    assert (
        "layer_xl_fgble2bg.safetensors  is a LayerDiffuse patch with the tensors of "
        in finding.text
    )
    assert "layer_xl_bgble2fg.safetensors. Rename it." in finding.text


def test_modes_are_ready_with_their_files(tmp_path: Path, no_embedded_model: None):
    _write_models(tmp_path)
    layers = tmp_path / "models" / "layer_model"
    (layers / "diffuser_layer_xl_fg2ble.safetensors").touch()
    ready, missing, *_ = doctor._modes(_settings(tmp_path, 1))
    assert ready.text == "modes that are ready: attention, fg2ble"
    assert "fgble2bg (layer_xl_fgble2bg.safetensors)" in missing.text
    assert "models pull layerdiffuse-conv layerdiffuse-fgble2bg" in missing.hint
    assert "img2img (vae_transparent_encoder.safetensors)" in missing.text
    assert "layerdiffuse-encoder" in missing.hint
    (layers / "vae_transparent_decoder.safetensors").unlink()
    ready, missing, *_ = doctor._modes(_settings(tmp_path, 1))
    # its result is opaque
    assert ready.text == "modes that are ready: fg2ble"
    assert "attention (vae_transparent_decoder.safetensors)" in missing.text
    assert missing.hint.startswith("To use them run: alphalayer models pull layerdiffuse ")


def test_modes_of_a_model_with_its_own_patch(tmp_path: Path):
    """The embedded model has one mode, and no others whose files could be missing."""
    ready, others = doctor._modes(_settings(tmp_path, 1))
    assert ready.text == "modes that are ready: attention, img2img"
    assert others.text.startswith("modes without a model that has them: conv, fg2ble, ")


def test_database_of_a_shared_queue_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: Postgres, free_port: int
):
    assert list(doctor._database(_settings(tmp_path, 1))) == []
    (finding,) = doctor._database(_settings(tmp_path, 1, database=postgres.fresh_database()))
    assert finding.level == "ok"
    assert "PostgreSQL 1" in finding.text
    unreachable = _settings(
        tmp_path, 1, database=f"postgresql://me:swordfish@127.0.0.1:{free_port}/x"
    )
    (finding,) = doctor._database(unreachable)
    assert (finding.level, "swordfish" in finding.text) == ("error", False)
    monkeypatch.setitem(sys.modules, "alphalayer.jobs.postgres", None)
    monkeypatch.delattr("alphalayer.jobs.postgres", raising=False)
    (finding,) = doctor._database(unreachable)
    assert finding.level == "error"
    assert "[shared]" in finding.hint


def test_bucket_is_checked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    s3: dict[str, str],
    s3_prefix: str,
    free_port: int,
):
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    (finding,) = doctor._bucket(_settings(tmp_path, 1, storage=s3_prefix))
    assert finding == Finding("ok", f"{s3_prefix} can be read")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    (finding,) = doctor._bucket(_settings(tmp_path, 1, storage=s3_prefix))
    assert finding.level == "error"
    assert s3_prefix in finding.text


def test_layer_files_missing_are_fine_if_a_model_has_its_own(
    tmp_path: Path, no_embedded_model: None
):
    folder = tmp_path / "models" / "Stable-diffusion" / "own"
    (folder / "layerdiffuse").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert list(doctor._layer_files(_settings(tmp_path, 1))) == []


def test_models_unsupported_files_are_described(tmp_path: Path):
    checkpoints = tmp_path / "models" / "Stable-diffusion"
    write(checkpoints / "old.safetensors", FAMILIES["sd2"])
    write(checkpoints / "style.safetensors", FAMILIES["lora"])
    write(checkpoints / "cut.safetensors", FAMILIES["sdxl"], missing=10)
    (checkpoints / "virus.ckpt").write_bytes(b"\x80")
    findings = list(doctor._models(_settings(tmp_path, 1)))
    right = ("old.safetensors is a Stable Diffusion 2", "style.safetensors is a LoRA")
    for words in (*right, "cut.safetensors is cut off", "virus.ckpt is a pickle"):
        assert _find_finding(findings, words).level == "warning"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_check_port_taken_port_is_refused(host: str):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.socket(family)
        listener.bind((host, 0))
    except OSError:
        pytest.skip("no IPv6 here")
    with listener:
        port = listener.getsockname()[1]
        listener.listen()
        with pytest.raises(SetupFailed, match=f"port {port} on {host}"):
            check_port(host, port)
    check_port(host, port)


@pytest.mark.parametrize("host", ["203.0.113.1", "nowhere.invalid"])
def test_check_port_foreign_address_is_named(host: str):
    with pytest.raises(SetupFailed, match=f"port 8000 on {host}") as raised:
        check_port(host, 8000)
    assert "--host" in raised.value.hint
    assert "--port" not in raised.value.hint


STAND_IN = """
__version__ = "9.9"
class version: cuda = None
class cuda: is_available = staticmethod(lambda: False)
class backends:
    class mps: is_available = staticmethod(lambda: {mps})
"""


def _check_torch(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> list[Finding]:
    """Return the findings where importing torch runs `source`."""
    (folder / "torch.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    # else Python reuses the bytecode of a file of the same length and second
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return list(doctor._torch(_settings(folder, 1)))


def test_torch_import_that_hangs_or_fails_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "TIMEOUT_S", 2)
    for source, words in (
        ("import time; time.sleep(60)", "torch does not answer within 2 s"),
        (
            "raise OSError('libcuda.so is damaged')",
            "torch cannot be imported: OSError: libcuda.so is damaged",
        ),
        ("import os; os._exit(7)", "torch cannot be imported: exit code 7"),
        ("import sys; sys.exit()", "torch did not report its version"),
    ):
        (finding,) = _check_torch(tmp_path, monkeypatch, source)
        assert finding.level == "error"
        assert words in finding.text
        assert finding.hint


def test_torch_import_that_prints_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in = f'print("a library greets")\n{STAND_IN.format(mps=False)}'
    assert _check_torch(tmp_path, monkeypatch, stand_in)[0] == Finding("ok", "torch 9.9")


def test_torch_on_apple_silicon_finds_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torch.py").write_text(STAND_IN.format(mps=True))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = _settings(tmp_path, 1).model_copy(update={"device": "auto"})
    assert list(doctor._torch(settings))[1:] == [Finding("ok", "GPU of Apple silicon (mps)")]


def test_models_missing_folder_is_an_error(tmp_path: Path):
    (finding,) = doctor._models(_settings(tmp_path, 1))
    assert finding.level == "error"
    assert f"the models folder {tmp_path / 'models'} does not exist" in finding.text
