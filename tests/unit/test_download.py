"""Downloads of published models, and verification of the models folder.

A real HTTP server answers as the public hub does. Each pull runs in a new process, so a second
one meets the files that the first one left.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from tests.support import header_files
from tests.support.layer_shapes import layer_shapes

from alphalayer import catalog
from alphalayer.catalog import download
from alphalayer.core.errors import InvalidRequest, LayerDiffuseMissing
from alphalayer.core.modes import DECODER_FILES, MODES, Mode
from alphalayer.engine.families.base import LayerDiffuseFiles

REPOSITORY, FILENAME = "someone/some-model", "weights.safetensors"
CONTENT = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Hub:
    """Content and behaviour of the server, and the requests that it received."""

    url: str = ""
    content: bytes = CONTENT
    breaks_at: int | None = None
    """The connection breaks after so many bytes, and later requests are answered 503."""
    is_broken: bool = False
    is_damaging: bool = False
    """The content that is sent is not that of the ETag."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        span = self.headers.get("Range")
        self.hub.requests.append((self.command, self.path, span))
        is_known = re.fullmatch(rf"/{REPOSITORY}/resolve/[^/]+/{FILENAME}", self.path)
        if self.hub.is_broken or not is_known:
            self.send_response(503 if is_known else 404)
            self.send_header("Content-Length", "0")
            if not is_known:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        start = int(re.match(r"bytes=(\d+)-", span)[1]) if span else 0
        content = self.hub.content[:-1] + b"!" if self.hub.is_damaging else self.hub.content
        body = content[start:]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(body)))
        if span:
            self.send_header(
                "Content-Range",
                f"bytes {start}-{len(self.hub.content) - 1}/{len(self.hub.content)}",
            )
        self.send_header("ETag", f'"{hashlib.sha256(self.hub.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body and self.hub.breaks_at is not None:
            self.hub.is_broken = True
            self.wfile.write(body[: self.hub.breaks_at])
            self.wfile.flush()
            self.connection.close()
        elif with_body:
            self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        hub.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield hub
        http.shutdown()
        thread.join(5)


_PULL = """
import json, sys
from pathlib import Path
from alphalayer.core.errors import AlphalayerError
from alphalayer.catalog.download import Published, pull
try:
    pulled = pull(Published(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    print(json.dumps({"path": str(pulled.path), "finding": pulled.finding}))
except AlphalayerError as error:
    print(json.dumps(error.to_dict()))
"""


def _published_fields(**changes: Any) -> dict[str, Any]:
    values = {
        "name": "m",
        "repository": REPOSITORY,
        "filename": FILENAME,
        "folder": "layer_model",
        "size": len(CONTENT),
    }
    return {**values, "sha256": DIGEST, "licence": "free", **changes}


def _environment(server: Hub, folder: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith("HF_")
    }
    return {
        **kept,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _pull(server: Hub, models: Path, **changes: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _PULL, json.dumps(_published_fields(**changes)), str(models)],
        env=_environment(server, models.parent),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_pull_downloads_and_checks_a_file_once(server: Hub, tmp_path: Path):
    models = tmp_path / "models"
    target = models / "layer_model" / FILENAME
    assert _pull(server, models) == {"path": str(target), "finding": "as published"}
    assert target.read_bytes() == CONTENT
    assert [command for command, *_ in server.requests] == ["HEAD", "GET"]
    assert _pull(server, models) == {"path": str(target), "finding": "as published"}
    assert len(server.requests) == 2


def test_pull_resumes_an_interrupted_download(server: Hub, tmp_path: Path):
    models = tmp_path / "models"
    # huggingface-hub writes pieces of 10 MB, so the first attempt leaves 20 MB
    server.content = CONTENT * 25
    server.breaks_at = 21 * 2**20
    published = {"size": len(server.content), "sha256": hashlib.sha256(server.content).hexdigest()}
    error = _pull(server, models, **published)
    assert error["code"] == "model_not_found"
    assert FILENAME in error["message"]
    assert "continues where it stopped" in error["hint"]
    assert not (models / "layer_model" / FILENAME).exists()

    server.breaks_at, server.is_broken = None, False
    server.requests.clear()
    assert "path" in _pull(server, models, **published)
    assert [span for command, _, span in server.requests if command == "GET"] == [
        f"bytes={20 * 2**20}-"
    ]
    assert (models / "layer_model" / FILENAME).read_bytes() == server.content


def test_pull_wrong_hash_is_an_error_and_keeps_the_file_apart(server: Hub, tmp_path: Path):
    models = tmp_path / "models"
    server.content = CONTENT[:-1] + b"!"
    error = _pull(server, models)
    assert error["code"] == "corrupt_file"
    assert DIGEST[:10] in error["message"]
    assert not (models / "layer_model" / FILENAME).exists()
    assert (models / "layer_model" / f"{FILENAME}.wrong").read_bytes() == server.content
    # as the hint states, the same command downloads it again
    server.content = CONTENT
    assert "path" in _pull(server, models)


def test_pull_without_a_published_hash_checks_that_of_the_hub(server: Hub, tmp_path: Path):
    server.is_damaging = True
    error = _pull(server, tmp_path / "models", sha256=None)
    assert error["code"] == "corrupt_file"
    assert DIGEST[:10] in error["message"]
    server.is_damaging = False
    assert _pull(server, tmp_path / "models", sha256=None)["finding"] == "as published"


def test_pull_keeps_a_users_own_file_of_the_same_name(server: Hub, tmp_path: Path):
    """Report that it differs; it may be the published one saved again."""
    own = tmp_path / "models" / "layer_model" / FILENAME
    own.parent.mkdir(parents=True)
    own.write_bytes(b"saved again")
    answer = _pull(server, tmp_path / "models")
    assert answer["path"] == str(own)
    assert "differs from the published file" in answer["finding"]
    assert own.read_bytes() == b"saved again"
    assert server.requests == []


def test_pull_during_another_download_of_the_file_is_refused(server: Hub, tmp_path: Path):
    folder = tmp_path / "models" / "layer_model"
    folder.mkdir(parents=True)
    with FileLock(folder / f".{FILENAME}.lock"):
        error = _pull(server, tmp_path / "models")
    assert error["code"] == "storage_failed"
    assert "another process downloads" in error["message"]
    assert server.requests == []
    assert _pull(server, tmp_path / "models")["finding"] == "as published"


def test_pull_file_missing_on_the_hub_is_named(server: Hub, tmp_path: Path):
    error = _pull(server, tmp_path / "models", filename="absent.safetensors")
    assert error["code"] == "model_not_found"
    assert "absent.safetensors" in error["message"]
    assert "\n" not in error["message"]


def test_pull_unreachable_hub_is_a_clear_error(tmp_path: Path):
    # port 1 of this machine has no listener
    error = _pull(Hub(url="http://127.0.0.1:1"), tmp_path / "models")
    assert error["code"] == "model_not_found"
    assert f"{REPOSITORY}/{FILENAME} cannot be downloaded" in error["message"]
    assert "connection" in error["hint"]


def test_pull_resumed_download_needs_only_the_missing_space(server: Hub, tmp_path: Path):
    folder = tmp_path / "models" / "layer_model"
    folder.mkdir(parents=True)
    # 2 GiB by its length, and nothing on the disk
    with (folder / f"{FILENAME}.{DIGEST[:10]}.part").open("wb") as file:
        file.truncate(2**31)
    assert (
        _pull(server, tmp_path / "models", size=shutil.disk_usage(tmp_path).free + 2**30)["code"]
        != "storage_failed"
    )


def test_pull_too_little_space_is_an_error_before_download(server: Hub, tmp_path: Path):
    error = _pull(server, tmp_path / "models", size=10**18)
    assert error["code"] == "storage_failed"
    assert "1000000000.0 GB" in error["message"]
    assert server.requests == []


def test_pull_impossible_models_folder_is_named(server: Hub, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    error = _pull(server, tmp_path / "file")
    assert error["code"] == "storage_failed"
    assert str(tmp_path / "file") in error["message"]


def test_pull_command_shows_licences_and_wrong_hash_in_one_line(server: Hub, tmp_path: Path):
    """Run the real command with the real list; the server has other content."""
    names = {
        "REPOSITORY": download.PUBLISHED[1].repository,
        "FILENAME": download.PUBLISHED[1].filename,
    }
    globals_before = {name: globals()[name] for name in names}
    globals().update(names)
    try:
        arguments = ["models", "pull", "layerdiffuse", "--yes"]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "alphalayer", *arguments),
                *("--models-dir", str(tmp_path / "models")),
            ],
            env=_environment(server, tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        globals().update(globals_before)
    assert done.returncode == 1
    assert done.stdout.startswith("LayerDiffuse weights: tagged creativeml-openrail-m")
    assert "2 files, about 1.0 GB" in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: layer_xl_transparent_attn.safetensors hashes to")
    assert "Traceback" not in done.stderr


# --- plans


def test_plan_pull_orders_names_and_refuses_unknown_ones():
    assert [entry.filename for entry in download.plan_pull(["layerdiffuse"])] == [
        "layer_xl_transparent_attn.safetensors",
        "vae_transparent_decoder.safetensors",
    ]
    assert [entry.name for entry in download.plan_pull(["layerdiffuse", "sdxl-base"])] == [
        "sdxl-base",
        "layerdiffuse",
        "layerdiffuse",
    ]
    files = download.plan_pull(["layerdiffuse-sd15", "layerdiffuse-sd15-decoder"])
    assert [file.filename for file in files] == [
        "layer_sd15_transparent_attn.safetensors",
        "layer_sd15_vae_transparent_decoder.safetensors",
    ]
    with pytest.raises(InvalidRequest, match=r'"sd3".*sdxl-base, layerdiffuse, layerdiffuse-conv'):
        download.plan_pull(["sd3"])


@pytest.mark.parametrize("name", ["juggernaut", "Juggernaut-XL-v9"])
def test_plan_pull_juggernaut_is_refused_for_its_licence(name: str):
    with pytest.raises(InvalidRequest, match="licence forbids use behind API services"):
        download.plan_pull([name])
    assert not any(
        "juggernaut" in (entry.name + entry.repository).lower() for entry in download.PUBLISHED
    )


def test_published_files_hold_each_file_of_a_mode():
    files = {file.filename: file.name for file in download.PUBLISHED}
    for mode in MODES.values():
        if mode.files:
            assert mode.download == files[mode.files[0]]


def test_published_files_have_a_licence_and_a_full_hash():
    for entry in download.PUBLISHED:
        assert entry.licence
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)


@pytest.mark.parametrize("mode", [mode for mode in MODES.values() if mode.files])
def test_missing_file_of_a_mode_is_named_with_its_pull_line(tmp_path: Path, mode: Mode):
    entry = catalog.ModelEntry("cup", tmp_path / "cup.safetensors", "single_file", mode.family)
    files = LayerDiffuseFiles(entry, {}, tmp_path)
    with pytest.raises(LayerDiffuseMissing, match=mode.files[0]) as caught:
        files.patch(mode.name)
    assert caught.value.hint == f"Run: alphalayer models pull {mode.download}"
    assert download.plan_pull([mode.download])[0].filename == mode.files[0]
    with pytest.raises(LayerDiffuseMissing, match=DECODER_FILES[mode.family][0]) as caught:
        files.decoder()
    pulled = download.plan_pull([caught.value.hint.rpartition(" ")[2]])
    assert DECODER_FILES[mode.family][0] in [file.filename for file in pulled]


# --- verify


def test_verify_describes_each_file(tmp_path: Path):
    layers, checkpoints = tmp_path / "layer_model", tmp_path / "Stable-diffusion"
    layers.mkdir()
    checkpoints.mkdir()
    save_file(
        {"latent_conv_in.weight": torch.zeros(64, 4, 1, 1)},
        layers / "vae_transparent_decoder.safetensors",
    )
    save_file({"x": torch.zeros(1)}, layers / "own.safetensors")
    (layers / "layer_xl_transparent_attn.safetensors").write_bytes(b"cut")
    (checkpoints / "old.ckpt").write_bytes(b"pickle")
    (checkpoints / "folder").mkdir()
    (checkpoints / "folder" / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionXLPipeline"}'
    )
    findings = {
        entry.path.name: entry
        for entry in download.verify(tmp_path, tmp_path / "embeddings")
        if tmp_path in entry.path.parents
    }
    assert (
        "differs from the published file" in findings["vae_transparent_decoder.safetensors"].finding
    )
    assert findings["vae_transparent_decoder.safetensors"].is_ok
    assert findings["own.safetensors"].finding.startswith("readable, ")
    assert not findings["layer_xl_transparent_attn.safetensors"].is_ok
    assert "pickle" in findings["old.ckpt"].finding
    assert not findings["old.ckpt"].is_ok
    assert not findings["folder"].is_ok


def test_verify_reports_layer_files_of_another_kind(tmp_path: Path):
    layers, one = tmp_path / "layer_model", torch.zeros(1)
    layers.mkdir()
    lora, patch, decoder = (
        {name: one} for name in ("lora_unet_x.lora_down.weight", "a::lora::0", "latent_conv_in.x")
    )
    files = {
        "layer_xl_transparent_attn": lora,
        "layer_xl_transparent_conv": decoder,
        "vae_transparent_decoder": patch,
        "style": lora,
        "layer_xl_fg2ble": patch,
        "ld_diffusers_sdxl_attn": {"unet.x.to_q.lora_A.weight": one},
    }
    for name, tensors in files.items():
        save_file(tensors, layers / f"{name}.safetensors")
    findings = {
        entry.path.stem: entry for entry in download.verify(tmp_path, tmp_path / "embeddings")
    }
    assert (
        "is not a LayerDiffuse patch, but a LoRA" in findings["layer_xl_transparent_attn"].finding
    )
    assert "is a LayerDiffuse transparent decoder" in findings["layer_xl_transparent_conv"].finding
    assert (
        "is not a LayerDiffuse transparent decoder, but a LayerDiffuse patch"
        in findings["vae_transparent_decoder"].finding
    )
    # a patch of another size could be any
    assert {name for name in files if findings[name].is_ok} == {
        "layer_xl_fg2ble",
        "ld_diffusers_sdxl_attn",
    }


LAYERS = layer_shapes()


@pytest.mark.parametrize("name", [name for name in LAYERS if "decoder" not in name])
def test_published_size_is_that_of_the_tensors(name: str):
    """A safetensors file with these tensors in float16 has the published size."""
    sizes = {file.filename: file.size for file in download.PUBLISHED}
    entries, end = {}, 0
    for tensor, shape in sorted(LAYERS[name].items()):
        after = end + 2 * math.prod(shape)
        entries[tensor] = {"dtype": "F16", "shape": shape, "data_offsets": [end, after]}
        end = after
    header = len(json.dumps(entries, separators=(",", ":")))
    assert sizes[f"{name}.safetensors"] == 8 + header + -header % 8 + end


def _verify_layer_file(path: Path) -> download.Verified:
    results = {result.path: result for result in download.verify_layer_files(path.parents[1])}
    return results[path]


@pytest.mark.parametrize("name", LAYERS)
def test_verify_layer_file_names_what_a_file_is(tmp_path: Path, name: str):
    """A published file is accepted under its name, and recognized under another one."""
    folder = tmp_path / "layer_model"
    path = header_files.write(folder / f"{name}.safetensors", LAYERS[name])
    assert _verify_layer_file(path).is_ok
    alike = [other for other in LAYERS if LAYERS[other] == LAYERS[name]]
    expected = " or ".join(f"{other}.safetensors" for other in alike)
    another = next(other for other in LAYERS if other not in alike)
    for other in (*alike, another, "backup"):
        path = path.rename(folder / f"{other}.safetensors")
        found = _verify_layer_file(path)
        assert found.is_ok == (other in alike)
        assert found.is_ok or f"with the tensors of {expected}. Rename it." in found.finding


def test_verify_layer_file_knows_converted_files(tmp_path: Path):
    folder = tmp_path / "layer_model"
    first = "diffusion_model.input_blocks.0.0.weight::diff::0"
    for mode in ("fgble2bg", "fg2ble", "bg2ble"):
        others = list(LAYERS[f"layer_xl_{mode}"].items())
        shapes = {f"mid_block.{number}": shape for number, (_, shape) in enumerate(others[1:])}
        shapes["conv_in.weight"] = LAYERS[f"layer_xl_{mode}"][first]
        path = folder / f"diffuser_layer_xl_{mode}.safetensors"
        assert _verify_layer_file(header_files.write(path, shapes)).is_ok
        wrong = path.rename(folder / "layer_xl_transparent_conv.safetensors")
        assert f"layer_xl_{mode}.safetensors" in _verify_layer_file(wrong).finding
    queries = {f"down_blocks.{number}.attn2.to_k.weight": (640, 2048) for number in range(560)}
    path = folder / "ld_diffusers_sdxl_attn.safetensors"
    assert _verify_layer_file(header_files.write(path, queries)).is_ok
    path = folder / "ld_diffusers_sdxl_vae_transparent_encoder.safetensors"
    encoder = header_files.write(path, LAYERS["vae_transparent_encoder"])
    assert "has another factor" in _verify_layer_file(encoder).finding


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_verify_reads_every_weight_file_of_a_folder(tmp_path: Path, part: str):
    folder = tmp_path / "Stable-diffusion" / "mini"
    shutil.copytree(catalog.EMBEDDED_MODEL, folder)
    (file,) = (folder / part).glob("*.safetensors")
    with file.open("r+b") as whole:
        whole.truncate(file.stat().st_size - 1)
    (entry,) = (
        entry
        for entry in download.verify(tmp_path, tmp_path / "embeddings")
        if entry.path == folder
    )
    assert "is cut off" in entry.finding
    assert not entry.is_ok


def test_verify_reads_loras_and_embeddings(tmp_path: Path):
    models, words = tmp_path / "models", tmp_path / "embeddings"
    for folder in (models / "Lora" / "styles", words):
        folder.mkdir(parents=True)
    one = torch.zeros(1, 4)
    save_file(
        {"lora_unet_x.lora_down.weight": one}, models / "Lora" / "styles" / "pixel.safetensors"
    )
    save_file({"unet.conv_in.weight": one}, models / "Lora" / "difference.safetensors")
    save_file({"latent_conv_in.weight": one}, models / "Lora" / "decoder.safetensors")
    (models / "Lora" / "cut.safetensors").write_bytes(b"cut")
    save_file({"clip_l": one, "clip_g": one.clone()}, words / "good.safetensors")
    save_file({"emb_params": one}, words / "sd15.safetensors")
    (words / "old.pt").write_bytes(b"pickle")
    findings = {
        entry.path.name: entry
        for entry in download.verify(models, words)
        if tmp_path in entry.path.parents
    }
    assert {name for name, entry in findings.items() if entry.is_ok} == {
        "pixel.safetensors",
        "difference.safetensors",
        "good.safetensors",
    }
    assert "LayerDiffuse transparent decoder" in findings["decoder.safetensors"].finding
    assert "clip_l and clip_g" in findings["sd15.safetensors"].finding
    assert "pickle" in findings["old.pt"].finding
    assert len(findings) == 7
