"""PNG encoder compared with Pillow, on images like those of the service.

    python benchmarks/png.py [FILE.png ...]

Times are the best of several runs with one thread. The last line is JSON.
"""

from __future__ import annotations

import io
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from alphalayer.images import codecs


def soft_object(side: int = 1024) -> np.ndarray:
    """Return a shaded, noisy ball with a soft edge: a typical transparent image."""
    rng = np.random.default_rng(0)
    y, x = np.ogrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    distance = np.hypot(x, y)
    light = np.clip(1 - np.hypot(x + 0.3, y + 0.3), 0, 1)
    rgba = np.zeros((side, side, 4))
    rgba[..., :3] = light[..., None] * [220, 60, 40] + rng.normal(0, 2, (side, side, 3))
    rgba[..., 3] = np.clip((0.8 - distance) * 40, 0, 1) * 255
    rgba[distance > 0.85] = 0
    return np.clip(np.rint(rgba), 0, 255).astype(np.uint8)


def with_pillow(level: int) -> Callable[[np.ndarray], bytes]:
    """Return Pillow's encoder for a compression level; 6 is its default."""

    def encode(rgba: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rgba).save(buffer, "PNG", compress_level=level)
        return buffer.getvalue()

    return encode


ENCODERS = {
    "pillow default": with_pillow(6),
    "pillow level 1": with_pillow(1),
    "alphalayer": lambda rgba: codecs.encode(rgba, "png"),
}


def measure(rgba: np.ndarray, runs: int = 5) -> dict[str, dict[str, float]]:
    """Return milliseconds and bytes of each encoder, after a check of the round trip."""
    result: dict[str, dict[str, float]] = {}
    for name, encode in ENCODERS.items():
        data = encode(rgba)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), rgba), name
        times: list[float] = []
        for _ in range(runs):
            start = time.perf_counter()
            encode(rgba)
            times.append(time.perf_counter() - start)
        result[name] = {"ms": round(min(times) * 1000, 2), "bytes": len(data)}
    return result


def machine() -> str:
    """Return the name of the processor, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def main() -> None:
    """Measure the files of the command line, or a generated image."""
    files = [Path(name) for name in sys.argv[1:]]
    images = {file.name: np.asarray(Image.open(file).convert("RGBA")) for file in files} or {
        "soft object": soft_object()
    }
    report = {name: measure(rgba) for name, rgba in images.items()}
    for name, encoders in report.items():
        base = encoders["pillow default"]
        for encoder, figures in encoders.items():
            speed, size = base["ms"] / figures["ms"], figures["bytes"] / base["bytes"]
            print(
                f"{name:20} {encoder:16} {figures['ms']:8.1f} ms  {figures['bytes']:9d} bytes  "
                f"{speed:5.1f}x as fast, {size:.2f}x the size"
            )
    print(
        json.dumps(
            {
                "machine": machine(),
                "python": platform.python_version(),
                "results": report,
            }
        )
    )


if __name__ == "__main__":
    main()
