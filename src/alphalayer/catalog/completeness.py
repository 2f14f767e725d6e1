"""Tensors that a file lacks, though those around them are there."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NETWORKS = re.compile(
    r"model\.diffusion_model\.|conditioner\.|cond_stage_model\."
    r"|first_stage_model\.(?:encoder|decoder|quant_conv|post_quant_conv)\."
)
"""Networks of an LDM single file."""
_WITHOUT_BIAS = re.compile(r"\.to_[qkv]$|_embedding$|text_projection$|\.register_tokens$")
_SIBLINGS = re.compile(
    r"(.*\.(?:transformer_blocks|layers|resblocks))\.([0-9]{1,4})\.(.+)", re.DOTALL
)


def missing_tensor(shapes: Mapping[str, tuple[int, ...]], *, is_part: bool = False) -> str:
    """Return the name of a tensor that is missing, or "".

    A layer has a weight and a bias, and the layers of a transformer have the same tensors. So no
    list of all names is needed. A missing network is not recognized.

    Args:
        shapes: Tensors of the file.
        is_part: The file is one network of a diffusers folder, not an LDM single file.
    """
    names = [name for name in shapes if is_part or _NETWORKS.match(name)]
    return _missing_half(names, shapes) or _missing_sibling(names)


def _missing_half(names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    for name in names:
        layer, _, half = name.rpartition(".")
        other = {"weight": "bias", "bias": "weight"}.get(half)
        if other and f"{layer}.{other}" not in shapes and not _WITHOUT_BIAS.search(layer):
            return f"{layer}.{other}"
    return ""


def _missing_sibling(names: list[str]) -> str:
    layers: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if match := _SIBLINGS.fullmatch(name):
            layers.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    for stack, siblings in layers.items():
        expected = set[str]().union(*siblings.values())
        for number in range(max(siblings) + 1) if max(siblings) < len(names) else ():
            if lacking := expected - siblings.get(number, set()):
                return f"{stack}.{number}.{min(lacking)}"
    return ""
