"""LoRA files of public trainers: each layout with tiny layers, and the table of the page.

The expected weights are computed in float64 from the formulas of the papers, not by the code under
test: LoRA arXiv 2106.09685, LyCORIS 2309.14859, GLoRA 2306.07967, DoRA 2402.09353.
`python -m tests.parity.test_file_layouts` prints the table of docs/reference/file-layouts.md.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.support.tiny_models import unet_name_in_ldm
from torch import Tensor

from alphalayer.core.errors import ModelUnusable
from alphalayer.engine.transparency.changes import Delta
from alphalayer.engine.transparency.lora_files import read_lora
from alphalayer.engine.transparency.patch import Patch, PatchFile, WeightPatcher, read_patch

TABLES = Path(__file__).parents[2] / "docs" / "reference" / "file-layouts.md"
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0."
Q, OUT, K = f"{BLOCK}attn1.to_q", f"{BLOCK}attn1.to_out.0", f"{BLOCK}attn2.to_k"
PROJ, CONV = "down_blocks.1.attentions.0.proj_in", "down_blocks.1.resnets.0.conv1"
DOWN, EMB = "down_blocks.0.downsamplers.0.conv", "down_blocks.1.resnets.0.time_emb_proj"
NORM, GROUP = f"{BLOCK}norm1", "down_blocks.1.resnets.0.norm1"
UNET, ATTENTION, CONVS = (Q, OUT, K, PROJ, CONV, DOWN, EMB), (Q, OUT, K, PROJ), (CONV, DOWN)
L, L_FC = "text_encoder.encoder.layers.0.self_attn.q_proj", "text_encoder.encoder.layers.0.mlp.fc1"
G = "text_encoder_2.encoder.layers.0.self_attn.q_proj"
G_OUT = "text_encoder_2.text_projection"
TEXT = (L, L_FC, G, G_OUT)
SHAPES = {
    Q: (6, 4), OUT: (4, 6), K: (6, 10), PROJ: (4, 4), CONV: (4, 6, 3, 3), DOWN: (4, 4, 3, 3),
    EMB: (4, 8), NORM: (4,), GROUP: (4,), L: (6, 6), L_FC: (12, 6), G: (8, 8), G_OUT: (8, 8),
}  # fmt: skip
RANK = 2
Tensors = dict[str, Tensor]
Name = Callable[[str], str]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 100 * seed)) / 3


WEIGHTS: Tensors = {
    f"{module}.weight": _random(*shape, seed=i) for i, (module, shape) in enumerate(SHAPES.items())
} | {
    f"{module}.bias": _random(SHAPES[module][0], seed=50 + i)
    for i, module in enumerate((OUT, PROJ, CONV, NORM, GROUP, L))
}


@dataclass(frozen=True)
class Made:
    """A file, and the weights that it leads to by the formulas. Others do not change."""

    tensors: Tensors
    expected: Tensors = field(default_factory=dict[str, Tensor])
    metadata: dict[str, str] = field(default_factory=dict[str, str])

    def __or__(self, other: Made) -> Made:
        return Made(
            self.tensors | other.tensors,
            self.expected | other.expected,
            self.metadata | other.metadata,
        )


@dataclass(frozen=True)
class Layout:
    """A layout, what becomes of it, and the error if it is refused."""

    name: str
    make: Callable[[], Made]
    result: str = "merged"
    error: str = ""


# --- names of modules


def _ldm(module: str) -> str:
    return unet_name_in_ldm(f"{module}.weight").removesuffix(".weight")


def _flat(prefix: str, name: Name = str) -> Name:
    return lambda module: prefix + name(module).replace(".", "_")


def _dotted(prefix: str, name: Name = str) -> Name:
    return lambda module: prefix + name(module)


def _processor(module: str) -> str:
    block, layer = module.removesuffix(".0").rsplit(".", 1)
    return f"unet.{block}.processor.{layer}"


def _text(first: str, second: str, separator: str = ".") -> Name:
    def name(module: str) -> str:
        part, inner = module.split(".", 1)
        inner = inner if inner.startswith("text_projection") else f"text_model.{inner}"
        prefix = first if part == "text_encoder" else second
        return prefix + inner.replace(".", separator)

    return name


KOHYA, KOHYA_LDM = _flat("lora_unet_"), _flat("lora_unet_", _ldm)
KOHYA_TEXT = _text("lora_te1_", "lora_te2_", "_")
DIFFUSERS, DIFFUSERS_TEXT = _dotted("unet."), _text("text_encoder.", "text_encoder_2.")
COMFY = _dotted("diffusion_model.", _ldm)
COMFY_TEXT = _text("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")
UP_DOWN = {
    "kohya": (".lora_up.weight", ".lora_down.weight"),
    "PEFT": (".lora_B.weight", ".lora_A.weight"),
    "default": (".lora_B.default.weight", ".lora_A.default.weight"),
    "adapter": (".lora_B.my_style.weight", ".lora_A.my_style.weight"),
    "diffusers": (".lora.up.weight", ".lora.down.weight"),
    "linear_layer": (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "processor": ("_lora.up.weight", "_lora.down.weight"),
}


# --- kinds of changes: tensors by suffix, and the new weight


def _weight(module: str) -> Tensor:
    return WEIGHTS[f"{module}.weight"].double()


def _pair(module: str, rank: int = RANK) -> tuple[Tensor, Tensor]:
    rows, *inputs = SHAPES[module]
    return _random(rows, rank, *[1] * (len(inputs) - 1), seed=7), _random(rank, *inputs, seed=8)


def _product(up: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("or...,ri...->oi...", up.double(), down.double())


def lora(
    modules: tuple[str, ...],
    name: Name,
    ends: str = "kohya",
    alpha: float | None = None,
    scale: float = 1.0,
    metadata: dict[str, str] | None = None,
) -> Made:
    """Make low-rank pairs. `scale` is what `alpha` or the metadata mean."""
    made = Made({}, metadata=metadata or {})
    for module in modules:
        up, down = _pair(module)
        stem = name(module)
        made.tensors[stem + UP_DOWN[ends][0]] = up
        made.tensors[stem + UP_DOWN[ends][1]] = down
        if alpha is not None:
            made.tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        made.expected[f"{module}.weight"] = _weight(module) + scale * _product(up, down)
    return made


def other(
    modules: tuple[str, ...], name: Name, kind: Callable[[str], tuple[Tensors, Tensors]]
) -> Made:
    """Make changes of another kind: tensors by suffix, and new weights by their last name."""
    made = Made({})
    for module in modules:
        tensors, expected = kind(module)
        made.tensors.update({name(module) + end: tensor for end, tensor in tensors.items()})
        made.expected.update({f"{module}.{end}": tensor for end, tensor in expected.items()})
    return made


def _flat_size(module: str) -> tuple[int, int]:
    rows, *inputs = SHAPES[module]
    return rows, torch.Size(inputs).numel()


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return sum of left[o, m] core[m, n, ...] right[n, i], one pair of ranks at a time."""
    total = torch.zeros(len(left), right.shape[1], *core.shape[2:], dtype=torch.double)
    for m in range(core.shape[0]):
        for n in range(core.shape[1]):
            outer = torch.outer(left[:, m].double(), right[n].double())
            total += outer[..., None, None] * core[m, n].double()
    return total


def locon_mid(module: str) -> tuple[Tensors, Tensors]:
    rows, inputs, *kernel = SHAPES[module]
    up, mid = _random(rows, RANK, 1, 1, seed=1), _random(RANK, RANK, *kernel, seed=2)
    down = _random(RANK, inputs, 1, 1, seed=3)
    change = _tucker(mid, up[:, :, 0, 0], down[:, :, 0, 0])
    tensors = {".lora_up.weight": up, ".lora_mid.weight": mid, ".lora_down.weight": down}
    return {**tensors, ".alpha": torch.tensor(1.0)}, {"weight": _weight(module) + change / RANK}


def loha(module: str) -> tuple[Tensors, Tensors]:
    rows, columns = _flat_size(module)
    a, c = (_random(rows, RANK, seed=seed) for seed in (1, 2))
    b, d = (_random(RANK, columns, seed=seed) for seed in (3, 4))
    change = (a.double() @ b.double()) * (c.double() @ d.double())
    tensors = {".hada_w1_a": a, ".hada_w1_b": b, ".hada_w2_a": c, ".hada_w2_b": d}
    tensors[".alpha"] = torch.tensor(1.0)
    return tensors, {"weight": _weight(module) + change.reshape(SHAPES[module]) / RANK}


def loha_tucker(module: str) -> tuple[Tensors, Tensors]:
    rows, inputs, *kernel = SHAPES[module]
    tensors: Tensors = {}
    parts = []
    for i in (1, 2):
        core = _random(RANK, RANK, *kernel, seed=i)
        left, right = _random(RANK, rows, seed=2 + i), _random(RANK, inputs, seed=4 + i)
        tensors |= {f".hada_t{i}": core, f".hada_w{i}_a": left, f".hada_w{i}_b": right}
        parts.append(_tucker(core, left.T, right))
    return tensors, {"weight": _weight(module) + parts[0] * parts[1]}


def lokr(first: str, second: str) -> Callable[[str], tuple[Tensors, Tensors]]:
    """Return a kind with "whole" or "low" matrices, or "tucker" as the second."""

    def make(module: str) -> tuple[Tensors, Tensors]:
        rows, inputs, *kernel = SHAPES[module]
        tensors: Tensors = {}
        scale = 1.0 if (first, second) == ("whole", "whole") else 0.5 / RANK
        if first == "whole":
            w1 = tensors[".lokr_w1"] = _random(2, 2, seed=1)
        else:
            a, b = _random(2, RANK, seed=1), _random(RANK, 2, seed=2)
            tensors |= {".lokr_w1_a": a, ".lokr_w1_b": b}
            w1 = a.double() @ b.double()
        shape = (rows // 2, inputs // 2, *kernel)
        if second == "whole":
            w2 = tensors[".lokr_w2"] = _random(*shape, seed=3)
        elif second == "low":
            a = _random(shape[0], RANK, seed=3)
            b = _random(RANK, torch.Size(shape[1:]).numel(), seed=4)
            tensors |= {".lokr_w2_a": a, ".lokr_w2_b": b}
            w2 = (a.double() @ b.double()).reshape(shape)
        else:
            core = _random(RANK, RANK, *kernel, seed=3)
            a, b = _random(RANK, shape[0], seed=4), _random(RANK, shape[1], seed=5)
            tensors |= {".lokr_t2": core, ".lokr_w2_a": a, ".lokr_w2_b": b}
            w2 = _tucker(core, a.T, b)
        change = torch.einsum("ij,kl...->ikjl...", w1.double(), w2.double())
        tensors[".alpha"] = torch.tensor(0.5)
        return tensors, {"weight": _weight(module) + scale * change.reshape(SHAPES[module])}

    return make


def glora(is_old: bool) -> Callable[[str], tuple[Tensors, Tensors]]:
    def make(module: str) -> tuple[Tensors, Tensors]:
        rows, columns = SHAPES[module]
        a, b = _random(columns, RANK, seed=1), _random(RANK, columns, seed=2)
        c, d = _random(rows, RANK, seed=3), _random(RANK, columns, seed=4)
        weight = _weight(module)
        change = weight @ a.double() @ b.double() + c.double() @ d.double()
        names = (".a2", ".a1", ".b2", ".b1") if is_old else (".a1", ".a2", ".b1", ".b2")
        tensors = {f"{name}.weight": t for name, t in zip(names, (a, b, c, d), strict=True)}
        return {**tensors, ".alpha": torch.tensor(1.0)}, {"weight": weight + change / RANK}

    return make


def ia3(on_input: bool) -> Callable[[str], tuple[Tensors, Tensors]]:
    def make(module: str) -> tuple[Tensors, Tensors]:
        rows, inputs, *kernel = SHAPES[module]
        ones = [1] * len(kernel)
        vector = _random(1, inputs if on_input else rows, *ones, seed=1)
        factor = vector if on_input else vector.transpose(0, 1)
        tensors = {".weight": vector, ".on_input": torch.tensor(on_input)}
        return tensors, {"weight": _weight(module) * (1 + factor.double())}

    return make


def peft_ia3(module: str) -> tuple[Tensors, Tensors]:
    vector = _random(SHAPES[module][0], 1, seed=1)
    return {".ia3_l": vector}, {"weight": _weight(module) * vector.double()}


def difference(weight: str, bias: str = "") -> Callable[[str], tuple[Tensors, Tensors]]:
    def make(module: str) -> tuple[Tensors, Tensors]:
        ends = {weight: "weight", bias: "bias"} if bias else {weight: "weight"}
        tensors = {
            end: _random(*WEIGHTS[f"{module}.{own}"].shape, seed=9) for end, own in ends.items()
        }
        new = {own: WEIGHTS[f"{module}.{own}"].double() + tensors[end] for end, own in ends.items()}
        return tensors, new

    return make


def replacement(module: str) -> tuple[Tensors, Tensors]:
    tensors = {".set_weight": _random(*SHAPES[module], seed=9)}
    return tensors, {"weight": tensors[".set_weight"].double()}


def dora(end: str, axis: int, base: Callable[[str], tuple[Tensors, Tensors]] | None = None):
    """Return DoRA over LoRA, or over another kind: one magnitude a row along `axis`."""

    def make(module: str) -> tuple[Tensors, Tensors]:
        if base:
            tensors, new = base(module)
            merged = new["weight"]
        else:
            up, down = _pair(module)
            names = UP_DOWN["PEFT" if "magnitude" in end else "kohya"]
            tensors = dict(zip(names, (up, down), strict=True))
            merged = _weight(module) + _product(up, down)
        rows = merged.transpose(0, axis)
        magnitude = _random(len(rows), seed=5).abs() + 0.1
        scaled = torch.stack(
            [row * m / row.pow(2).sum().sqrt() for row, m in zip(rows, magnitude, strict=True)]
        )
        ones = [1] * (merged.ndim - 1)
        shape = ([1, -1, *ones[1:]] if axis else [-1, *ones]) if end == ".dora_scale" else [-1]
        return {**tensors, end: magnitude.reshape(shape)}, {"weight": scaled.transpose(0, axis)}

    return make


def peft_bias(module: str) -> tuple[Tensors, Tensors]:
    up, down = _pair(module)
    bias = _random(len(up), seed=4)
    new = {"weight": _weight(module) + _product(up, down)}
    new["bias"] = WEIGHTS[f"{module}.bias"].double() + bias
    return {".lora_B.weight": up, ".lora_A.weight": down, ".lora_B.bias": bias}, new


def junk(**shapes: tuple[int, ...]) -> Made:
    """Make tensors that lead to no change."""
    return Made({name.replace("__", "."): _random(*shape) for name, shape in shapes.items()})


def adapter_metadata(**values: object) -> dict[str, str]:
    """Return the metadata that diffusers writes."""
    packed = {name.replace("__", "."): value for name, value in values.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(packed)}


SMALL = (Q, K)
EMBEDDING = {
    "bundle_emb.my_word.string_to_param.*": _random(2, 6),
    "bundle_emb.my_word.x": _random(1),
}
LOKR = [(first, second) for first in ("whole", "low") for second in ("whole", "low")]
LAYOUTS = [
    # low-rank pairs under every name
    Layout("kohya LoRA, diffusers names", lambda: lora(ATTENTION, KOHYA, alpha=1, scale=0.5)),
    Layout("kohya LoRA, LDM names", lambda: lora(ATTENTION, KOHYA_LDM, alpha=1, scale=0.5)),
    Layout("kohya LoRA without alpha", lambda: lora(ATTENTION, KOHYA_LDM)),
    Layout(
        "kohya LoRA, text encoders lora_te1_ and lora_te2_",
        lambda: (
            lora(ATTENTION, KOHYA_LDM, alpha=4, scale=2) | lora(TEXT, KOHYA_TEXT, alpha=4, scale=2)
        ),
    ),
    Layout("kohya LoRA of the text encoders alone", lambda: lora(TEXT, KOHYA_TEXT, alpha=2)),
    Layout(
        "kohya LoRA, text encoder lora_te_ without number",
        lambda: lora(SMALL, KOHYA) | lora((L, L_FC), _text("lora_te_", "-", "_")),
    ),
    Layout(
        "kohya LoRA-C3Lier (3x3 convolutions), LDM names",
        lambda: lora(UNET, KOHYA_LDM, alpha=1, scale=0.5),
    ),
    Layout(
        "kohya LoRA-C3Lier (3x3 convolutions), diffusers names",
        lambda: lora(UNET, KOHYA, alpha=1, scale=0.5),
    ),
    Layout("kohya DyLoRA as it is saved", lambda: lora(ATTENTION, KOHYA_LDM, alpha=2)),
    Layout("kohya LoRA-FA", lambda: lora(ATTENTION, KOHYA_LDM, alpha=1, scale=0.5)),
    Layout(
        "kohya extract_lora_from_models",
        lambda: lora(UNET, KOHYA_LDM, alpha=2) | lora(TEXT, KOHYA_TEXT, alpha=2),
    ),
    Layout(
        "kohya LoRA after resize (rank by layer)",
        lambda: lora((Q,), KOHYA_LDM, alpha=1, scale=0.5) | lora((K,), KOHYA_LDM, alpha=2),
    ),
    Layout(
        "kohya LoRA with a 1x1 convolution for proj_in",
        lambda: _with_ones(lora((PROJ, Q), KOHYA_LDM)),
    ),
    Layout("kohya LoRA in float16", lambda: _cast(lora(ATTENTION, KOHYA_LDM), torch.float16)),
    Layout("kohya LoRA in bfloat16", lambda: _cast(lora(ATTENTION, KOHYA_LDM), torch.bfloat16)),
    Layout("kohya LoRA in fp8", lambda: _cast(lora(ATTENTION, KOHYA_LDM), torch.float8_e4m3fn)),
    Layout(
        "OneTrainer LoRA",
        lambda: lora(UNET, KOHYA, alpha=1, scale=0.5) | lora(TEXT, KOHYA_TEXT, alpha=1, scale=0.5),
    ),
    Layout(
        "OneTrainer LoRA (OMI names clip_l, clip_g)",
        lambda: (
            lora(SMALL, DIFFUSERS, alpha=1, scale=0.5)
            | lora(TEXT, _text("clip_l.", "clip_g."), alpha=1, scale=0.5)
        ),
    ),
    Layout("PEFT LoRA, unet. names", lambda: lora(ATTENTION, DIFFUSERS, "PEFT")),
    Layout(
        "PEFT LoRA, text encoders",
        lambda: lora(SMALL, DIFFUSERS, "PEFT") | lora(TEXT, DIFFUSERS_TEXT, "PEFT"),
    ),
    Layout("PEFT LoRA without prefix", lambda: lora(ATTENTION, str, "PEFT")),
    Layout(
        "PEFT save_pretrained (base_model.model.)",
        lambda: lora(ATTENTION, _dotted("base_model.model."), "PEFT"),
    ),
    Layout(
        "PEFT with base_model.model.unet.",
        lambda: lora(ATTENTION, _dotted("base_model.model.unet."), "PEFT"),
    ),
    Layout("PEFT with the adapter name default", lambda: lora(ATTENTION, DIFFUSERS, "default")),
    Layout("PEFT with another adapter name", lambda: lora(ATTENTION, DIFFUSERS, "adapter")),
    Layout(
        "PEFT LoRA with alpha tensors",
        lambda: lora(ATTENTION, DIFFUSERS, "PEFT", alpha=1, scale=0.5),
    ),
    Layout("PEFT LoRA with lora_bias", lambda: other((OUT, PROJ), DIFFUSERS, peft_bias)),
    Layout(
        "PEFT LoRA of a text encoder (text_model.)",
        lambda: lora(SMALL, DIFFUSERS, "PEFT") | lora((L, L_FC), _text("", "-"), "PEFT"),
    ),
    Layout(
        "diffusers save_lora_weights, lora.up names",
        lambda: lora(ATTENTION, DIFFUSERS, "diffusers"),
    ),
    Layout(
        "diffusers save_lora_weights, lora.up names, text encoders",
        lambda: lora(SMALL, DIFFUSERS, "diffusers") | lora(TEXT, DIFFUSERS_TEXT, "diffusers"),
    ),
    Layout(
        "diffusers lora_linear_layer names",
        lambda: (
            lora(SMALL, DIFFUSERS, "linear_layer") | lora((L, G), DIFFUSERS_TEXT, "linear_layer")
        ),
    ),
    Layout(
        "diffusers attention processors (0.14)", lambda: lora((Q, OUT, K), _processor, "processor")
    ),
    Layout(
        "diffusers attention processors without unet.",
        lambda: lora((Q, OUT, K), lambda m: _processor(m).removeprefix("unet."), "processor"),
    ),
    Layout(
        "diffusers DreamBooth LoRA, alpha in the header",
        lambda: lora(
            ATTENTION,
            DIFFUSERS,
            "PEFT",
            scale=0.5,
            metadata=adapter_metadata(unet__r=2, unet__lora_alpha=1),
        ),
    ),
    Layout(
        "diffusers DreamBooth LoRA, alpha of text encoders in the header",
        lambda: (
            lora(
                SMALL,
                DIFFUSERS,
                "PEFT",
                scale=0.5,
                metadata=adapter_metadata(
                    unet__lora_alpha=1, text_encoder__lora_alpha=4, text_encoder_2__lora_alpha=6
                ),
            )
            | lora((L,), DIFFUSERS_TEXT, "PEFT", scale=2)
            | lora((G,), DIFFUSERS_TEXT, "PEFT", scale=3)
        ),
    ),
    Layout(
        "diffusers LoRA, alpha_pattern in the header",
        lambda: (
            lora(
                (Q,),
                DIFFUSERS,
                "PEFT",
                scale=2,
                metadata=adapter_metadata(
                    unet__lora_alpha=1, unet__alpha_pattern={Q: 4}, unet__rank_pattern={Q: 2}
                ),
            )
            | lora((K,), DIFFUSERS, "PEFT", scale=0.5)
        ),
    ),
    Layout(
        "diffusers LoRA, use_rslora in the header",
        lambda: lora(
            ATTENTION,
            DIFFUSERS,
            "PEFT",
            scale=3 / 2**0.5,
            metadata=adapter_metadata(unet__lora_alpha=3, unet__use_rslora=True),
        ),
    ),
    Layout(
        "diffusers save_lora_adapter, header without unet.",
        lambda: lora(
            ATTENTION, DIFFUSERS, "PEFT", scale=0.5, metadata=adapter_metadata(r=2, lora_alpha=1)
        ),
    ),
    Layout(
        "LoRA with lora_alpha and r as plain header keys",
        lambda: lora(
            ATTENTION, DIFFUSERS, "PEFT", scale=0.5, metadata={"lora_alpha": "1", "r": "2"}
        ),
    ),
    Layout(
        "LoRA with alpha tensors and another alpha in the header",
        lambda: lora(
            ATTENTION,
            DIFFUSERS,
            "PEFT",
            alpha=1,
            scale=0.5,
            metadata=adapter_metadata(unet__lora_alpha=8),
        ),
    ),
    Layout(
        "LoRA with a damaged header alpha",
        lambda: lora(
            ATTENTION,
            DIFFUSERS,
            "PEFT",
            metadata={"lora_adapter_metadata": "{oops", "lora_alpha": "x"},
        ),
    ),
    Layout("ComfyUI LoRA (diffusion_model.)", lambda: lora(UNET, COMFY)),
    Layout(
        "ComfyUI LoRA with its text encoder names",
        lambda: lora(SMALL, COMFY) | lora(TEXT, COMFY_TEXT),
    ),
    Layout(
        "ComfyUI LoRA extraction with bias differences",
        lambda: lora(SMALL, COMFY) | other((NORM, GROUP), COMFY, difference(".diff", ".diff_b")),
    ),
    Layout(
        "ComfyUI LoRA extraction with diff_b beside LoRA",
        lambda: lora((OUT,), COMFY) | _bias(OUT, COMFY),
    ),
    Layout("ComfyUI set_weight", lambda: other((Q, CONV), COMFY, replacement)),
    Layout(
        "LDM names with model.diffusion_model.",
        lambda: lora(UNET, _dotted("model.diffusion_model.", _ldm)),
    ),
    Layout(
        "LDM names of text encoder 1 (conditioner.)",
        lambda: (
            lora(SMALL, COMFY) | lora((L, L_FC), _text("conditioner.embedders.0.transformer.", "-"))
        ),
    ),
    Layout(
        "SimpleTuner LoRA",
        lambda: lora(
            ATTENTION, DIFFUSERS, "PEFT", scale=0.5, metadata=adapter_metadata(unet__lora_alpha=1)
        ),
    ),
    Layout(
        "SimpleTuner LyCORIS LoKr (lycoris_)",
        lambda: other(UNET, _flat("lycoris_"), lokr("whole", "low")),
    ),
    Layout(
        "SimpleTuner LyCORIS full (lycoris_)",
        lambda: other(SMALL, _flat("lycoris_"), difference(".diff")),
    ),
    Layout(
        "ai-toolkit LoRA", lambda: lora(ATTENTION, KOHYA, alpha=2) | lora(TEXT, KOHYA_TEXT, alpha=2)
    ),
    Layout("ai-toolkit LoRA, diffusers names", lambda: lora(ATTENTION, DIFFUSERS, "PEFT")),
    Layout("Concept slider (LECO)", lambda: lora(ATTENTION, KOHYA, alpha=1, scale=0.5)),
    Layout("LCM-LoRA", lambda: lora(UNET, KOHYA, alpha=1, scale=0.5)),
    Layout("Lightning-LoRA", lambda: lora(UNET, KOHYA_LDM, alpha=2)),
    Layout("Hyper-SD LoRA", lambda: lora(UNET, KOHYA, alpha=2)),
    Layout("DMD2 LoRA", lambda: lora(UNET, DIFFUSERS, "PEFT")),
    Layout("Turbo LoRA (sd_xl_turbo extract)", lambda: lora(UNET, KOHYA_LDM, alpha=2)),
    Layout("SPO and DPO LoRA", lambda: lora(ATTENTION, DIFFUSERS, "PEFT")),
    Layout("B-LoRA", lambda: lora(SMALL, DIFFUSERS, "diffusers")),
    Layout(
        "offset noise LoRA of Stability", lambda: lora(ATTENTION, KOHYA_LDM, alpha=1, scale=0.5)
    ),
    # LyCORIS
    Layout("LyCORIS LoCon", lambda: lora(UNET, KOHYA_LDM, alpha=1, scale=0.5)),
    Layout("LyCORIS LoCon in three parts (lora_mid)", lambda: other(CONVS, KOHYA_LDM, locon_mid)),
    Layout("LyCORIS LoHa, LDM names", lambda: other(UNET, KOHYA_LDM, loha)),
    Layout("LyCORIS LoHa, diffusers names", lambda: other(UNET, KOHYA, loha)),
    Layout(
        "LyCORIS LoHa, text encoders",
        lambda: other(SMALL, KOHYA, loha) | other(TEXT, KOHYA_TEXT, loha),
    ),
    Layout("LyCORIS LoHa with tucker", lambda: other(CONVS, KOHYA_LDM, loha_tucker)),
    Layout("OneTrainer LoHa", lambda: other(ATTENTION, KOHYA, loha)),
    Layout("PEFT LoHa", lambda: other(ATTENTION, DIFFUSERS, loha)),
    *(
        Layout(
            f"LyCORIS LoKr, w1 {first}, w2 {second}",
            lambda first=first, second=second: other(UNET, KOHYA_LDM, lokr(first, second)),
        )
        for first, second in LOKR
    ),
    Layout("LyCORIS LoKr with tucker", lambda: other(CONVS, KOHYA_LDM, lokr("whole", "tucker"))),
    Layout(
        "LyCORIS LoKr, w1 low and tucker", lambda: other(CONVS, KOHYA_LDM, lokr("low", "tucker"))
    ),
    Layout(
        "LyCORIS LoKr, text encoders",
        lambda: (
            other(SMALL, KOHYA, lokr("whole", "low"))
            | other(TEXT, KOHYA_TEXT, lokr("whole", "low"))
        ),
    ),
    Layout("PEFT LoKr", lambda: other(ATTENTION, DIFFUSERS, lokr("low", "low"))),
    Layout("LyCORIS full (diff)", lambda: other(UNET, KOHYA_LDM, difference(".diff"))),
    Layout(
        "LyCORIS full with bias (diff_b)",
        lambda: other((OUT, PROJ, CONV), KOHYA_LDM, difference(".diff", ".diff_b")),
    ),
    Layout(
        "LyCORIS norms (w_norm, b_norm)",
        lambda: (
            lora(SMALL, KOHYA_LDM)
            | other((NORM, GROUP), KOHYA_LDM, difference(".w_norm", ".b_norm"))
        ),
    ),
    Layout(
        "LyCORIS norms, diffusers names",
        lambda: lora(SMALL, KOHYA) | other((NORM, GROUP), KOHYA, difference(".w_norm", ".b_norm")),
    ),
    Layout("LyCORIS GLoRA", lambda: other((*ATTENTION, EMB), KOHYA_LDM, glora(is_old=False))),
    Layout(
        "LyCORIS GLoRA of earlier versions",
        lambda: other((*ATTENTION, EMB), KOHYA_LDM, glora(is_old=True)),
    ),
    Layout("LyCORIS IA3 on outputs", lambda: other(UNET, KOHYA_LDM, ia3(on_input=False))),
    Layout("LyCORIS IA3 on inputs", lambda: other(UNET, KOHYA_LDM, ia3(on_input=True))),
    Layout("PEFT IA3", lambda: other(SMALL, DIFFUSERS, peft_ia3)),
    Layout("LyCORIS DyLoRA", lambda: lora(ATTENTION, KOHYA_LDM, alpha=1, scale=0.5)),
    # DoRA
    Layout(
        "LyCORIS DoRA on inputs (dora_scale)",
        lambda: other((Q, K, CONV), KOHYA_LDM, dora(".dora_scale", 1)),
    ),
    Layout(
        "LyCORIS DoRA on outputs (dora_scale)",
        lambda: other((Q, K, CONV), KOHYA_LDM, dora(".dora_scale", 0)),
    ),
    Layout("OneTrainer DoRA (dora_scale)", lambda: other((Q, K), KOHYA, dora(".dora_scale", 0))),
    Layout("LyCORIS DoRA over LoHa", lambda: other((Q, K), KOHYA, dora(".dora_scale", 0, loha))),
    Layout(
        "LyCORIS DoRA over LoKr",
        lambda: other((Q, K), KOHYA, dora(".dora_scale", 1, lokr("whole", "low"))),
    ),
    Layout(
        "PEFT DoRA (lora_magnitude_vector)",
        lambda: other((Q, K), DIFFUSERS, dora(".lora_magnitude_vector", 0)),
    ),
    Layout(
        "PEFT DoRA (lora_magnitude_vector.default.weight)",
        lambda: other((Q, K), DIFFUSERS, dora(".lora_magnitude_vector.default.weight", 0)),
    ),
    # full offsets
    Layout(
        "full differences with diffusers names",
        lambda: other(UNET, DIFFUSERS, difference(".weight")),
    ),
    Layout("full differences with LDM names", lambda: other(UNET, COMFY, difference(".weight"))),
    # partly
    Layout(
        "Civitai bundle: LoRA with embeddings",
        lambda: lora(ATTENTION, KOHYA_LDM) | Made(EMBEDDING),
        "partly: bundled embeddings: 1 (my_word)",
    ),
    Layout(
        "LoRA whose last pair lacks its down",
        lambda: (
            lora(ATTENTION, KOHYA_LDM) | Made({f"{KOHYA_LDM(EMB)}.lora_up.weight": _random(4, 2)})
        ),
        "partly: changes that lack a part: 1",
    ),
    Layout(
        "LoRA with a layer that SDXL lacks",
        lambda: (
            lora(ATTENTION, KOHYA)
            | junk(lora_unet_x_y__lora_up__weight=(4, 2), lora_unet_x_y__lora_down__weight=(2, 4))
        ),
        "partly: changes of layers that the model lacks: 1",
    ),
    Layout(
        "LoRA with one layer of another width",
        lambda: (
            lora(ATTENTION, DIFFUSERS, "PEFT")
            | Made(
                {
                    f"unet.{EMB}.lora_B.weight": _random(4, 2),
                    f"unet.{EMB}.lora_A.weight": _random(2, 9),
                }
            )
        ),
        "partly: changes of another shape than the weight: 1",
    ),
    Layout(
        "LoRA with some OFT layers",
        lambda: lora(ATTENTION, KOHYA) | junk(lora_unet_x__oft_blocks=(2, 2, 2)),
        "partly: OFT: 1",
    ),
    Layout(
        "LoRA with unknown tensors",
        lambda: lora(ATTENTION, KOHYA) | junk(vera__lambda_b=(2,)),
        "partly: tensors of an unknown kind: 1 (vera.lambda_b)",
    ),
    Layout(
        "LoRA with OpenCLIP names of text encoder 2",
        lambda: (
            lora(ATTENTION, COMFY)
            | junk(
                conditioner__embedders__1__model__x__lora_up__weight=(4, 2),
                conditioner__embedders__1__model__x__lora_down__weight=(2, 4),
            )
        ),
        "partly: changes of layers that the model lacks: 1",
    ),
    # refused
    Layout(
        "LyCORIS Diag-OFT",
        lambda: junk(lora_unet_x__oft_blocks=(2, 2, 2), lora_unet_y__oft_blocks=(2, 2, 2)),
        "refused: OFT",
        "is an OFT or BOFT",
    ),
    Layout(
        "LyCORIS BOFT",
        lambda: junk(lora_unet_x__boft_blocks=(2, 2, 2)),
        "refused: BOFT",
        "is an OFT or BOFT",
    ),
    Layout(
        "kohya OFT",
        lambda: junk(
            lora_unet_x__oft_blocks=(2, 2, 2), lora_unet_x__rescale=(2, 1), lora_unet_x__alpha=()
        ),
        "refused: OFT",
        "is an OFT or BOFT",
    ),
    Layout(
        "PEFT OFT",
        lambda: junk(unet__x__oft_R__default__weight=(2, 2, 2)),
        "refused: OFT",
        "is an OFT or BOFT",
    ),
    Layout(
        "PEFT VeRA",
        lambda: junk(
            base_model__model__x__vera_lambda_b=(2,), base_model__model__x__vera_lambda_d=(2,)
        ),
        "refused: no known kind",
        "no change of a known kind",
    ),
    Layout(
        "SD 1.5 LoRA",
        lambda: Made(_narrow(768)),
        "refused: made for Stable Diffusion 1.5",
        "made for Stable Diffusion 1.5",
    ),
    Layout(
        "SD 2 LoRA",
        lambda: Made(_narrow(1024)),
        "refused: made for Stable Diffusion 2",
        "made for Stable Diffusion 2",
    ),
    Layout(
        "Flux LoRA, kohya names",
        lambda: junk(
            lora_unet_double_blocks_0_img_attn_qkv__lora_up__weight=(4, 2),
            lora_unet_double_blocks_0_img_attn_qkv__lora_down__weight=(2, 4),
        ),
        "refused: made for Flux",
        "made for Flux",
    ),
    Layout(
        "Flux LoRA, diffusers names",
        lambda: junk(
            transformer__single_transformer_blocks__0__attn__to_q__lora_B__weight=(4, 2),
            transformer__single_transformer_blocks__0__attn__to_q__lora_A__weight=(2, 4),
        ),
        "refused: made for Flux",
        "made for Flux",
    ),
    Layout(
        "SD 3 LoRA",
        lambda: junk(
            lora_unet_joint_blocks_0_x_block_attn_qkv__lora_up__weight=(4, 2),
            lora_unet_joint_blocks_0_x_block_attn_qkv__lora_down__weight=(2, 4),
        ),
        "refused: made for a diffusion transformer",
        "made for a diffusion transformer",
    ),
    Layout(
        "LoRA with up tensors alone",
        lambda: Made({f"{KOHYA(Q)}.lora_up.weight": _random(6, 2)}),
        "refused: a part is missing",
        "lack a part",
    ),
    Layout(
        "file of embeddings alone",
        lambda: Made(EMBEDDING),
        "refused: no change of a weight",
        "holds no change",
    ),
]


def _with_ones(made: Made) -> Made:
    tensors = {name: t[..., None, None] for name, t in made.tensors.items()}
    return Made(tensors, made.expected)


def _cast(made: Made, dtype: torch.dtype) -> Made:
    """Return the same pairs in another number format, and what their rounded values lead to."""
    tensors = {name: tensor.to(dtype) for name, tensor in made.tensors.items()}
    expected = {}
    for module in ATTENTION:
        up, down = (tensors[KOHYA_LDM(module) + end].float() for end in UP_DOWN["kohya"])
        expected[f"{module}.weight"] = _weight(module) + _product(up, down)
    return Made(tensors, expected)


def _bias(module: str, name: Name) -> Made:
    offset = _random(len(WEIGHTS[f"{module}.bias"]), seed=9)
    new = WEIGHTS[f"{module}.bias"].double() + offset
    return Made({f"{name(module)}.diff_b": offset}, {f"{module}.bias": new})


def _narrow(context: int) -> Tensors:
    return {
        f"{KOHYA(K)}.lora_up.weight": _random(320, 2),
        f"{KOHYA(K)}.lora_down.weight": _random(2, context),
    }


# --- tests


def _rows() -> dict[str, str]:
    """Return the rows of the page's table of LoRA files."""
    section = TABLES.read_text(encoding="utf-8").partition("## LoRA layouts\n")[2]
    return dict(re.findall(r"^\| (?!layout|---)(.+?) \| (.+?) \|$", section, re.MULTILINE))


def test_page_lists_every_layout_with_its_result():
    assert _rows() == {layout.name: layout.result for layout in LAYOUTS}
    assert len(LAYOUTS) >= 100


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_is_merged_by_its_formula_or_named(tmp_path: Path, layout: Layout):
    made, file = layout.make(), tmp_path / "style.safetensors"
    save_file({name: t.contiguous() for name, t in made.tensors.items()}, file, made.metadata)
    if layout.error:
        with pytest.raises(ModelUnusable) as error:
            read_patch(file, WEIGHTS)
        assert layout.error in f"{error.value}"
        return
    patch = read_patch(file, WEIGHTS)
    assert layout.result == ("partly: " + "; ".join(patch.left_out) if patch.left_out else "merged")
    _check_merge(patch, made.expected)


@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)]
)
def test_every_layout_is_merged_into_weights_of_another_dtype(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
):
    weights = {name: weight.to(dtype) for name, weight in WEIGHTS.items()}
    file = tmp_path / "style.safetensors"
    for made in [layout.make() for layout in LAYOUTS if not layout.error]:
        tensors = {
            name: t.contiguous().to(stored if t.is_floating_point() else t.dtype)
            for name, t in made.tensors.items()
        }
        save_file(tensors, file, made.metadata)
        patch = read_patch(file, weights)
        assert patch.deltas.keys() == made.expected.keys()
        for name, change in patch.deltas.items():
            merged = change.apply(weights[name].float(), 1.0)
            # file or weight have eleven bits
            torch.testing.assert_close(merged.double(), made.expected[name], rtol=2**-6, atol=2**-6)


FACTORS = [f"{kind}_{part}" for kind in ("hada", "lokr") for part in ("w1", "w2", "t1", "t2")]
ENDS = [
    "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "lora_B.bias", "dora_scale",
    "lora_magnitude_vector", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "on_input",
    "weight", "ia3_l", "diff", "diff_b", "set_weight", *FACTORS,
    *(f"{kind}_{w}_{end}" for kind in ("hada", "lokr") for w in ("w1", "w2") for end in "ab"),
]  # fmt: skip
GROUPS = [
    ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "dora_scale", "alpha"),
    ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"),
    ("weight", "on_input"),
    ("ia3_l",),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
]
DTYPES = [
    torch.float32, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.int64, torch.uint8, torch.uint16, torch.uint64,
]  # fmt: skip
odd_tensors = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    st.lists(st.sampled_from([0, 1, 2, 4, 6]), max_size=4),
    st.sampled_from(DTYPES),
)
odd_metadata = st.sampled_from(
    [{}, {"lora_alpha": "1e999"}, {"lora_adapter_metadata": f'{{"unet.lora_alpha": {10**400}}}'}]
)


@settings(max_examples=400, deadline=None)
@given(
    module=st.sampled_from([Q, CONV, NORM]),
    ends=st.sampled_from(GROUPS) | st.lists(st.sampled_from(ENDS), max_size=6),
    metadata=odd_metadata,
    data=st.data(),
)
def test_tensors_of_any_shape_and_dtype_are_merged_or_refused(module, ends, metadata, data):
    tensors = {f"unet.{module}.{end}": data.draw(odd_tensors, end) for end in ends}
    try:
        content = read_lora(tensors, metadata, WEIGHTS)
    except ValueError:
        return
    for name, change in content.changes.items():
        if (weight := WEIGHTS.get(name)) is not None and change.fits(weight):
            assert change.apply(weight, 1.0).shape == weight.shape


@pytest.mark.parametrize(
    "tensors",
    [
        {"ia3_l": torch.tensor(2.0)},
        {"ia3_l": torch.ones(4, 1, dtype=torch.bool)},
        {"ia3_l": torch.ones(4, 1).to(torch.float8_e4m3fn)},
        {f"{part}.weight": torch.ones(4) for part in ("a1", "a2", "b1", "b2")},
        {"lora_up.weight": torch.ones(4, 2), "lora_down.weight": torch.ones(2, 9)},
    ],
    ids=["scalar", "bool", "fp8", "vectors", "shape"],
)
def test_tensors_of_a_wrong_kind_are_refused_and_end_nothing(tmp_path: Path, tensors: Tensors):
    file = tmp_path / "style.safetensors"
    metadata = adapter_metadata(unet__lora_alpha=10**400)
    save_file({f"unet.{Q}.{end}": tensor for end, tensor in tensors.items()}, file, metadata)
    with pytest.raises(ModelUnusable):
        read_patch(file, WEIGHTS)


def test_long_metadata_of_an_adapter_counts(tmp_path: Path):
    file, ends = tmp_path / "style.safetensors", UP_DOWN["PEFT"]
    up, down = _pair(Q)
    metadata = adapter_metadata(unet__lora_alpha=1, unet__modules=["x" * 1000] * 200)
    save_file({f"unet.{Q}{ends[0]}": up, f"unet.{Q}{ends[1]}": down}, file, metadata)
    change = read_patch(file, WEIGHTS).deltas[f"{Q}.weight"]
    assert isinstance(change, Delta)
    assert change.scale == 1 / RANK


def test_core_of_more_ranks_than_rows_is_refused():
    rows, inputs, *kernel = SHAPES[CONV]
    for ranks, fits in ((rows, True), (inputs + 1, False)):
        core, left = torch.ones(1, ranks, *kernel), torch.ones(1, rows)
        tensors: Tensors = {}
        for i in (1, 2):
            tensors |= {f"hada_t{i}": core, f"hada_w{i}_a": left}
            tensors[f"hada_w{i}_b"] = torch.ones(ranks, inputs)
        named = {f"unet.{CONV}.{name}": tensor for name, tensor in tensors.items()}
        (change,) = read_lora(named, {}, WEIGHTS).changes.values()
        assert change.fits(WEIGHTS[f"{CONV}.weight"]) is fits


def test_long_tensor_name_is_matched_in_linear_time():
    start = time.process_time()
    content = read_lora({"x" + ".oft_a" * 20_000 + "!": torch.ones(1)}, {}, {})
    assert len(content.unknown) == 1
    # a quadratic search takes minutes
    assert time.process_time() - start < 2


def test_changed_adapter_config_changes_the_stamp_of_its_lora(tmp_path: Path):
    other, file = tmp_path / "style.safetensors", tmp_path / "adapter_model.safetensors"
    config = tmp_path / "adapter_config.json"
    file.touch()
    stamps = [PatchFile.at(file)]
    for text in ("{}", '{"lora_alpha": 1}'):
        config.write_text(text)
        stamps.append(PatchFile.at(file))
    assert len({*stamps}) == 3
    assert len(PatchFile.at(other).stamp) == 2


def _check_merge(patch: Patch, expected: Tensors) -> None:
    weights = {name: weight.clone() for name, weight in WEIGHTS.items()}
    patcher = WeightPatcher(weights, lambda _: patch)
    assert patch.deltas.keys() == expected.keys()
    for strength in (1.0, 0.5):
        patcher.apply([(patch, strength)])
        for name, weight in weights.items():
            old = WEIGHTS[name].double()
            new = expected.get(name, old)
            is_set = getattr(patch.deltas.get(name), "replaces", False)
            mixed = new if is_set else old + strength * (new - old)
            # float32 sums of a few products
            torch.testing.assert_close(weight.double(), mixed, rtol=1e-5, atol=1e-6)
        patcher.remove()
        assert all(torch.equal(weight, WEIGHTS[name]) for name, weight in weights.items())


if __name__ == "__main__":
    for row in LAYOUTS:
        print(f"| {row.name} | {row.result} |")
