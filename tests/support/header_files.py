"""Files with a header alone: sparse safetensors files, and shapes of SDXL and SD 1.5."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

from alphalayer.catalog.headers import BITS
from alphalayer.catalog.kinds import CONTEXT, FIRST_CONV, SD15_TEXT, VAE_MARKS

UNET = "model.diffusion_model."
CLIP_L = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
CLIP_G = "conditioner.embedders.1.model.token_embedding.weight"
MIDDLE = UNET + "middle_block.1.norm.weight"
ATTENTION = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1"
Shapes = dict[str, tuple[int, ...]]
VAE: Shapes = {
    **dict.fromkeys(VAE_MARKS, (128, 3, 3, 3)),
    **{name.replace("weight", "bias"): (128,) for name in VAE_MARKS},
}
FIRST_BIAS, MIDDLE_BIAS = (name.replace("weight", "bias") for name in (FIRST_CONV, MIDDLE))
SDXL: Shapes = {
    FIRST_CONV: (320, 4, 3, 3), FIRST_BIAS: (320,), CONTEXT: (640, 2048), CLIP_L: (49408, 768),
    CLIP_G: (49408, 1280), MIDDLE: (1280,), MIDDLE_BIAS: (1280,), **VAE,
}  # fmt: skip
SD15: Shapes = {
    FIRST_CONV: (320, 4, 3, 3), FIRST_BIAS: (320,), CONTEXT: (640, 768),
    SD15_TEXT[0]: (49408, 768), **VAE,
}  # fmt: skip


def write(
    path: Path,
    shapes: Shapes,
    missing: int = 0,
    dtype: str = "F16",
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a sparse file of zeros, without its last `missing` bytes."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps({"__metadata__": {"format": "pt", **(metadata or {})}, **entries}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + end - missing)
    return path
