"""UNet parameter names: from published checkpoints (LDM) and LoRA files to diffusers.

The UNets of SDXL and SD 1.5 have two residual blocks a level. So each level has three input blocks
and three output blocks.

Source: Podell et al. 2023, "SDXL", arXiv 2307.01952. Layouts: Stability AI's `generative-models`,
diffusers' `UNet2DConditionModel`, kohya's `sd-scripts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_WHOLE = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK = re.compile(r"(input|output)_blocks[._](\d+)[._](\d+)(?=[._]|$)")


def ldm_to_diffusers(name: str) -> str:
    """Rename a UNet parameter from LDM's layout to that of diffusers.

    For instance `input_blocks.4.1.norm.weight` becomes `down_blocks.1.attentions.0.norm.weight`.
    Names of other layouts do not change.
    """
    match = _BLOCK.match(name)
    if match and not name.startswith("input_blocks.0."):
        return _rename_resnet_layers(_rename_block(match, name) + name[match.end() :])
    for old, new in _WHOLE.items():
        if name.startswith(old + "."):
            return _rename_resnet_layers(new + name[len(old) :])
    return name


def _rename_block(match: re.Match[str], name: str) -> str:
    side, number, part = match[1], int(match[2]), int(match[3])
    if side == "input":
        level, layer = divmod(number - 1, 3)
        if layer == 2:
            return f"down_blocks.{level}.downsamplers.0.conv"
        return f"down_blocks.{level}.{'resnets' if part == 0 else 'attentions'}.{layer}"
    level, layer = divmod(number, 3)
    # the upsampler is the last part of an output block, after the attention if there is one
    if part == 2 or (part == 1 and re.match(r"[._]conv", name[match.end() :])):
        return f"up_blocks.{level}.upsamplers.0"
    return f"up_blocks.{level}.{'resnets' if part == 0 else 'attentions'}.{layer}"


def _rename_resnet_layers(name: str) -> str:
    name = name.replace("downsamplers.0.conv.op.", "downsamplers.0.conv.")
    if ".resnets." in name:
        for old, new in _RESNET.items():
            name = name.replace(f".{old}.", f".{new}.")
    return name


def flat_names(modules: Iterable[str]) -> dict[str, str]:
    """Map flat module names of LoRA files, with underscores for dots, to module names."""
    return {_flat(name): name for name in modules if name}


def unflatten(flat: str, known: Mapping[str, str]) -> str | None:
    """Find the module of a flat LoRA name in the layout of diffusers or LDM.

    Args:
        flat: Name with underscores for dots.
        known: Module names by their flat form, see `flat_names`.

    Returns:
        The module name, None if there is none.
    """
    if flat in known:
        return known[flat]
    match = _BLOCK.match(flat)
    name = flat
    if match and not flat.startswith("input_blocks_0_"):
        name = _rename_block(match, flat) + flat[match.end() :].removesuffix("_op")
    for old, new in _WHOLE.items():
        if name.startswith(_flat(old) + "_") or name == _flat(old):
            name = new + name[len(old) :]
    for old, new in _RESNET.items():
        if name.endswith("_" + _flat(old)):
            name = name.removesuffix(_flat(old)) + new
    return known.get(_flat(name))


def _flat(name: str) -> str:
    return name.replace(".", "_")
