"""A full-size checkpoint with LayerDiffuse files loads offline and generates on two cores, 24 GiB.

The checkpoint has random numbers: 6.9 GB, float16. Not part of the default run:
`python3 run.py test -m full_size -s` needs 8 GB of disk, 16 GiB of memory and some minutes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphalayer.core.request import GenerationRequest
from alphalayer.engine.pipeline import LocalEngine
from tests.full_size.full_size_models import (
    checkpoint_shapes,
    sd15_shapes,
    write_models,
    write_random,
)

pytestmark = pytest.mark.full_size

# its own peak: ru_maxrss of a child counts the process that started it
GENERATE = r"""
import json, re, sys, time
from pathlib import Path
start = time.perf_counter()
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.core.request import GenerationRequest
imported = time.perf_counter()
engine = LocalEngine(Path(sys.argv[1]), device="cpu")
request = GenerationRequest(prompt="an apple, high quality", steps=3, width=256, height=256)
result = engine.generate(request)
status = Path("/proc/self/status").read_text()
print(json.dumps({
    "import_s": round(imported - start, 1),
    **{f"{stage}_s": round(seconds, 1) for stage, seconds in result.seconds.items()},
    "peak_gib": round(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20, 1),
    "shape": result.images[0].rgba.shape,
}))
"""


def test_full_size_checkpoint_loads_offline_and_renders(tmp_path: Path):
    shapes = checkpoint_shapes()
    checkpoint = write_models(tmp_path)
    assert len(shapes) == 1680 + 248 + 196 + 390
    assert 6.9e9 < checkpoint.stat().st_size < 7.0e9
    result = subprocess.run(
        [sys.executable, "-c", GENERATE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    print("\n" + json.dumps(report))
    assert report["shape"] == [256, 256, 4]
    # Forge takes 16.4 GB for the same image, with the mapped file
    assert report["peak_gib"] < 15.3
    assert report["load_s"] < report["sample_s"] + report["decode_s"]


def test_full_size_sd15_loads_offline_and_renders(tmp_path: Path):
    shapes = sd15_shapes()
    assert len(shapes) == 686 + 248 + 196
    unet = [shape for name, shape in shapes.items() if name.startswith("model.")]
    assert sum(math.prod(shape) for shape in unet) == 859_520_964
    write_random(tmp_path / "Stable-diffusion" / "random.safetensors", shapes)
    engine = LocalEngine(tmp_path, device="cpu")
    request = GenerationRequest(
        prompt="an apple", model="random", mode="opaque", steps=1, width=64, height=64
    )
    result = engine.generate(request)
    assert result.images[0].rgba.shape == (64, 64, 4)
    # as published: in float16, computed in float32 on a CPU
    assert engine.model.memory_bytes() > 4 * 859_520_964
