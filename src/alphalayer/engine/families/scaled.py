"""Weights that are stored as fp8 numbers with a scale, as ComfyUI writes them.

Two layouts, for a weight `X.weight`:

- `X.scale_weight`, and a tensor `scaled_fp8` as the mark of the file
- `X.weight_scale`, and `X.comfy_quant`, which is JSON with the name of the format
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from alphalayer.catalog.files import parse_json

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (".scale_weight", ".weight_scale")
_EXTRAS = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant")
_OTHERS = {
    ".weight_scale_2": "nvfp4",
    ".quant_state.bitsandbytes__nf4": "nf4",
    ".quant_state.bitsandbytes__fp4": "fp4",
    ".absmax": "a format of bitsandbytes",
    ".qweight": "GPTQ or AWQ",
}
"""Ends of tensor names of other formats."""


def load_scaled(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a file below a prefix, with their scales applied.

    Raises:
        ValueError: The weights are stored in another quantized format, or a scale does not fit,
            or a product is no number of float16.
    """
    tensors = load_file(path)
    return apply_scales({name: tensors[name] for name in tensors if name.startswith(prefix)})


def apply_scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without scales: fp8 weights that have one are multiplied by it.

    The products are float16, which keeps eleven bits where fp8 has four.

    Raises:
        ValueError: See `load_scaled`.
    """
    scales = {
        f"{name.removesuffix(end)}.weight": scale
        for name, scale in tensors.items()
        for end in _SCALES
        if name.endswith(end)
    }
    for name, tensor in tensors.items():
        if kind := next((kind for end, kind in _OTHERS.items() if name.endswith(end)), ""):
            raise ValueError(f"its weights are quantized as {kind}; supported: fp8")
        if name.endswith(".comfy_quant"):
            _check_format(tensor)
    return {
        name: _multiply(name, tensor, scales[name]) if name in scales else tensor
        for name, tensor in tensors.items()
        if not name.endswith(_EXTRAS)
    }


def _multiply(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """Return a weight times its scale: one number, or one for each output."""
    if weight.dtype not in _FP8 or scale.numel() not in (1, len(weight) if weight.ndim else 1):
        raise ValueError(f"{name} has a scale, and is not in fp8 with one scale for each output")
    rows = scale.float().reshape([-1, *[1] * (weight.ndim - 1)])
    product = (weight.float() * rows).reshape(weight.shape).half()
    if not product.isfinite().all():
        raise ValueError(f"{name} times its scale has numbers beyond those of float16")
    return product


def _check_format(tensor: Tensor) -> None:
    """Check the JSON text of a `comfy_quant` tensor, which is stored as bytes."""
    config = parse_json(bytes(tensor.to(torch.uint8).flatten().tolist()))
    kind = config.get("format") if isinstance(config, dict) else None
    if not str(kind).startswith("float8"):
        raise ValueError(f"its weights are quantized as {str(kind)[:40]}; supported: fp8")
