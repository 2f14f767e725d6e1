"""Parameter names of VAEs: from LDM files and old diffusers folders to those of diffusers now.

Source: `ldm/modules/diffusionmodules/model.py` of CompVis' latent-diffusion, and diffusers'
`AutoencoderKL`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

V = TypeVar("V")
LDM_PREFIX = "first_stage_model."
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

_LDM = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
_LDM_UP = re.compile(r"^decoder\.up\.(\d+)\.(block|upsample)\.")
_UP = {"block": "resnets.", "upsample": "upsamplers.0."}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"\.attentions\.0\.({'|'.join(_OLD_ATTENTION)})\.")


def from_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE of an LDM single file by canonical name.

    LDM counts the levels of the decoder from the image. The projections of its attention are 1x1
    convolutions, which become linear.

    Args:
        tensors: Tensors of the file. Those of other networks and of the training are left out.
    """
    parts = tuple(LDM_PREFIX + part for part in _PARTS)
    own = {
        name.removeprefix(LDM_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(parts)
    }
    last = max((int(match[1]) for name in own if (match := _LDM_UP.match(name))), default=0)

    def rename_up(match: re.Match[str]) -> str:
        return f"decoder.up_blocks.{last - int(match[1])}.{_UP[match[2]]}"

    renamed: dict[str, Tensor] = {}
    for name, tensor in own.items():
        new = _LDM_UP.sub(rename_up, name)
        for pattern, replacement in _LDM:
            new = re.sub(pattern, replacement, new)
        is_linear = ".attentions.0.to_" in new and tensor.ndim == 4
        renamed[new] = tensor[:, :, 0, 0] if is_linear else tensor
    return renamed


def with_prefix(values: Mapping[str, V]) -> dict[str, V]:
    """Return the values of a VAE's own file by their names in a single file.

    The file has the names of LDM, with or without the prefix.
    """
    return {LDM_PREFIX + name.removeprefix(LDM_PREFIX): value for name, value in values.items()}


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE of a diffusers folder by canonical name.

    Versions before 0.15 saved the attention under other names.
    """
    return {
        _OLD.sub(lambda match: f".attentions.0.{_OLD_ATTENTION[match[1]]}.", name): tensor
        for name, tensor in tensors.items()
    }
