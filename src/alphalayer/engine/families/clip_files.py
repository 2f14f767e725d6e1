"""CLIP's text models, read from diffusers folders and LDM single files.

Canonical names are those of `alphalayer.engine.networks.clip`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphalayer import catalog
from alphalayer.engine.families.configs import heads_of
from alphalayer.engine.families.folders import read_part
from alphalayer.engine.networks.clip import ACTIVATIONS, ClipTextModel
from alphalayer.engine.networks.weights import build

TEXT_STORED = torch.float16
"""dtype of the weights, as in AUTOMATIC1111. The models compute in float32."""
_FIRST = "conditioner.embedders.0.transformer."
_SECOND = "conditioner.embedders.1.model."
# eos_token_id 2 means the largest id, see `build_text_model`
_OPENAI: Mapping[str, Any] = {"hidden_act": "quick_gelu", "eos_token_id": 2}
_OPEN_CLIP: Mapping[str, Any] = {"hidden_act": "gelu", "eos_token_id": 2}


def read_text_folder(folder: Path) -> ClipTextModel:
    """Read the text model of a diffusers folder's part, such as `text_encoder`.

    Raises:
        CorruptFile: The config.json or a weight file cannot be read.
        LookupError, ValueError: A weight is missing or has another shape.
    """
    tensors = transformers_names(read_part(folder), "")
    return build_text_model(tensors, catalog.read_config(folder / "config.json"))


def read_text_models(tensors: Mapping[str, Tensor]) -> tuple[ClipTextModel, ClipTextModel]:
    """Return both text models of an SDXL single file.

    Args:
        tensors: Tensors of the file by name. Other tensors than those of the text models are
            ignored.

    Raises:
        LookupError, ValueError: A weight is missing or has another shape.
    """
    return (
        read_clip_l(tensors, _FIRST),
        build_text_model(open_clip_names(tensors, _SECOND), _OPEN_CLIP),
    )


def read_clip_l(tensors: Mapping[str, Tensor], prefix: str) -> ClipTextModel:
    """Return OpenAI's text model from the tensors below a prefix of a single file.

    Raises:
        LookupError, ValueError: A weight is missing or has another shape.
    """
    return build_text_model(transformers_names(tensors, prefix), _OPENAI)


def build_text_model(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> ClipTextModel:
    """Build a text model whose weights are rounded to `TEXT_STORED`.

    Args:
        tensors: Tensors by canonical name. Sizes come from their shapes. With `text_projection`
            the model has a projection.
        config: Values of a config.json: `hidden_act`, `num_attention_heads` (default: heads of
            `HEAD_WIDTH` channels), `layer_norm_eps` and `eos_token_id`. In old files the
            latter is 2, which is not the end token: the end is the largest id of a row.

    Raises:
        LookupError, ValueError: A weight is missing or has another shape.
    """
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    projection = tensors.get("text_projection.weight")
    end = config.get("eos_token_id", 49407)
    heads = config.get("num_attention_heads") or heads_of(width)
    if type(end) is not int or type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(
            f"its text model has {heads} heads for {width} channels, and ends at {end}"
        )
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"its hidden_act: got {activation}; supported: {', '.join(ACTIVATIONS)}")

    def create() -> ClipTextModel:
        return ClipTextModel(
            vocabulary=vocabulary,
            positions=len(tensors["embeddings.position_embedding.weight"]),
            width=width,
            inner_width=len(tensors["encoder.layers.0.mlp.fc1.weight"]),
            layers=1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name),
            heads=heads,
            projection=None if projection is None else len(projection),
            activation=activation,
            eps=float(config.get("layer_norm_eps", 1e-5)),
            end=None if end == 2 else end,
        )

    # copies, so that the file may change while the model is in use
    copies = {name: tensor.to(TEXT_STORED, copy=True) for name, tensor in tensors.items()}
    return build(create, copies, TEXT_STORED)


def transformers_names(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors below a prefix by canonical name.

    Some versions of transformers have a level `text_model`. Older ones store `position_ids`, which
    no model reads.
    """
    return {
        name.removeprefix(prefix).removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def open_clip_names(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return OpenCLIP's tensors below a prefix by canonical name.

    OpenCLIP stacks q, k and v, and stores the transposed projection.
    """
    canonical: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        for old, new in _OPEN_CLIP_NAMES.items():
            name = name.replace(old, new)
        if name == "text_projection":
            canonical["text_projection.weight"] = tensor.T.contiguous()
        elif ".in_proj_" in name:
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                canonical[name.replace(".in_proj_", f".{part}_proj.")] = value
        else:
            canonical[name] = tensor
    return canonical


_OPEN_CLIP_NAMES = {
    "token_embedding.": "embeddings.token_embedding.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "transformer.resblocks.": "encoder.layers.",
    ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    "ln_final.": "final_layer_norm.",
}
