"""Layouts of LoRA files: which tensors make which change of which weight.

The names are those of kohya's sd-scripts, LyCORIS, diffusers, PEFT, OneTrainer and ComfyUI. See
docs/reference/file-layouts.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alphalayer.catalog.files import parse_json
from alphalayer.engine.parameter_names import flat_names, ldm_to_diffusers, unflatten
from alphalayer.engine.transparency.changes import (
    Change,
    Delta,
    Factored,
    generalized,
    hadamard,
    kronecker,
    low_rank,
    per_input,
    per_output,
)

TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.")
Weights = Mapping[str, Tensor]
"""Parameters by name. Those of the text encoders have the prefixes of `TEXT_ENCODERS`."""

_PREFIXES = {
    "base_model.model.": "",
    "model.diffusion_model.": "",
    "diffusion_model.": "",
    "unet.": "",
    "lora_unet_": "",
    "lycoris_": "",
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
    "lora_te_": "text_encoder.",
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_g.transformer.": "text_encoder_2.",
    "conditioner.embedders.0.transformer.": "text_encoder.",
    "clip_l.": "text_encoder.",
    "clip_g.": "text_encoder_2.",
    "text_model.": "text_encoder.",
}
"""Prefixes of modules, and their own prefix for those of a text encoder."""

# PEFT writes the name of the adapter between a matrix and ".weight"
_SLOTS = {
    "up": r"\.lora_up\.weight|\.lora_B(\.\w+)?\.weight"
    r"|[._]lora\.up\.weight|\.lora_(linear_)?layer\.up\.weight",
    "down": r"\.lora_down\.weight|\.lora_A(\.\w+)?\.weight"
    r"|[._]lora\.down\.weight|\.lora_(linear_)?layer\.down\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"(\.lora|\.lora\.down\.weight)?\.alpha",
    "up_bias": r"\.lora_B(\.\w+)?\.bias|\.lora_up\.bias",
    "dora_scale": r"\.dora_scale",
    "magnitude": r"\.lora_magnitude_vector(\.\w+){0,2}",
    "factor": r"\.(hada|lokr)_(w1|w2|w1_a|w1_b|w2_a|w2_b|t1|t2)(\.default)?",
    "general": r"\.[ab][12]\.weight",
    "on_input": r"\.on_input",
    "ia3": r"\.ia3_l(\.\w+)?",
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
    "set": r"\.set_weight",
    "set_b": r"\.set_bias",
    "oft": r"\.b?oft_\w+(\.\w+){0,2}|\.rescale",
}
"""What follows a module's name, by what the tensor is of the module's change.

No part may repeat without a limit: the time would be quadratic in the length of a name.
"""
_TENSOR = re.compile(
    "(?P<stem>.+?)(" + "|".join(f"(?P<{slot}>{ends})" for slot, ends in _SLOTS.items()) + ")"
)
_BUNDLED = re.compile(r"bundle_emb\.([^.]+)\.")
_FAMILIES = (
    (re.compile(r"double_blocks|single_blocks|single_transformer_blocks"), "Flux"),
    (re.compile(r"joint_blocks|^(lora_)?transformer[._]"), "a diffusion transformer"),
)
_CONTEXT = re.compile(r"attn2[._]to_[kv]$")
_CONTEXT_FAMILIES = {
    768: "Stable Diffusion 1.5",
    1024: "Stable Diffusion 2",
    2048: "Stable Diffusion XL",
}

Slots = dict[str, Tensor]
Scale = Callable[[str, int], float]
"""Strength that a header gives a change, by parameter name and rank."""


@dataclass
class LoraChanges:
    """Changes of a LoRA file by parameter name, and what of the file makes none.

    Attributes:
        changes: Changes by parameter name, whether the model has that parameter or not.
        halves: Names of modules whose tensors are not complete.
        unsupported: Names of modules with OFT or BOFT.
        unknown: Names of tensors of no known kind.
        embeddings: Names of embeddings in the file.
        family: Family that the file was made for, as far as its names show; "": not another.
    """

    changes: dict[str, Change] = field(default_factory=dict[str, Change])
    halves: list[str] = field(default_factory=list[str])
    unsupported: list[str] = field(default_factory=list[str])
    unknown: list[str] = field(default_factory=list[str])
    embeddings: list[str] = field(default_factory=list[str])
    family: str = ""


def read_lora(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], weights: Weights
) -> LoraChanges:
    """Return the changes of a LoRA file.

    Args:
        tensors: Tensors of the file by name.
        metadata: Metadata of its header. Text, except for values of an adapter_config.json.
        weights: Parameters of the model.

    Raises:
        ValueError: An alpha is not one finite number.
    """
    content, known = LoraChanges(), flat_names(name.removesuffix(".weight") for name in weights)
    groups: dict[str, Slots] = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if bundled := _BUNDLED.match(key):
            content.embeddings.append(bundled[1])
        elif match:
            groups.setdefault(match["stem"], {})[_slot(match)] = tensor
        elif f"{key.removesuffix('.weight')}.on_input" in tensors:
            groups.setdefault(key.removesuffix(".weight"), {})["vector"] = tensor
        elif (name := ldm_to_diffusers(_remove_prefixes(key))) in weights:
            content.changes[name] = Delta(tensor)
        else:
            content.unknown.append(key)
    scale = _header_scale(metadata)
    for stem, slots in groups.items():
        module = _find_module(stem, known)
        if "oft" in slots:
            content.unsupported.append(stem)
            continue
        changes = dict(_changes(slots, lambda rank, module=module: scale(module, rank)))
        if not changes:
            content.halves.append(stem)
        for parameter, change in changes.items():
            content.changes[f"{module}.{parameter}"] = change
    content.embeddings = [*dict.fromkeys(content.embeddings)]
    content.family = _other_family(groups)
    return content


def _slot(match: re.Match[str]) -> str:
    """Return what a tensor is, with the name of the factor where there are several."""
    slot = next(slot for slot in _SLOTS if match[slot])
    if slot == "factor":
        return match[slot].removesuffix(".default").removeprefix(".")
    return match[slot][1:3] if slot == "general" else slot


def alpha_scale(alpha: Tensor, rank: int) -> float:
    """Return the strength alpha / rank, 1 without a rank.

    Raises:
        ValueError: alpha is not one finite number.
    """
    if alpha.numel() != 1 or not math.isfinite(float(alpha)):
        raise ValueError("an alpha is not one finite number")
    return float(alpha) / rank if rank else 1.0


def _changes(slots: Slots, header: Callable[[int], float]) -> Iterator[tuple[str, Change]]:
    """Yield the changes of a module: "weight" or "bias", and the change."""

    def scale(rank: int) -> float:
        alpha = slots.get("alpha")
        if alpha is None:
            return header(rank) if rank else 1.0
        return alpha_scale(alpha, rank)

    if change := _low_rank_change(slots, scale) or _factored_change(slots, scale):
        yield "weight", change
    if "up_bias" in slots and "down" in slots:
        yield "bias", Delta(slots["up_bias"], scale=scale(_rank(slots["down"])))
    for slot, parameter in (("diff", "weight"), ("diff_b", "bias")):
        if slot in slots:
            yield parameter, Delta(slots[slot])
    for slot, parameter in (("set", "weight"), ("set_b", "bias")):
        if slot in slots:
            yield parameter, Delta(slots[slot], replaces=True)


def _low_rank_change(slots: Slots, scale: Callable[[int], float]) -> Change | None:
    if not {"up", "down"} <= slots.keys():
        return None
    up, down = slots["up"], slots["down"]
    if "mid" in slots or not slots.keys().isdisjoint(("dora_scale", "magnitude")):
        return _factored(slots, ("up", "down", "mid"), low_rank, scale(_rank(down)))
    return Delta(up, down, scale(_rank(down)))


def _factored_change(slots: Slots, scale: Callable[[int], float]) -> Change | None:
    """Return a change in a form of LyCORIS or IA3, None if the tensors make none."""
    parts = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")
    hada, lokr = (
        {part: slots[f"{kind}_{part}"] for part in parts if f"{kind}_{part}" in slots}
        for kind in ("hada", "lokr")
    )
    if hada.keys() >= {"w1_a", "w1_b", "w2_a", "w2_b"}:
        return _factored(slots | hada, parts, hadamard, scale(_rank(hada["w1_b"])))
    has_first, has_second = (
        f"w{i}" in lokr or {f"w{i}_a", f"w{i}_b"} <= lokr.keys() for i in (1, 2)
    )
    if has_first and has_second:
        # without a low-rank matrix there is no rank, and the change is as it is
        inner = next((lokr[part] for part in ("w2_b", "w1_b") if part in lokr), None)
        rank = 0 if inner is None else _rank(inner)
        return _factored(slots | lokr, parts, kronecker, scale(rank))
    if slots.keys() >= {"a1", "a2", "b1", "b2"}:
        rank = min(_rank(slots["b1"]), _rank(slots["b2"]))
        return _factored(slots, ("a1", "a2", "b1", "b2"), generalized, scale(rank))
    if {"vector", "on_input"} <= slots.keys() and slots["on_input"].numel() == 1:
        return Factored(
            {"vector": slots["vector"]}, per_input if slots["on_input"].float() else per_output
        )
    if "ia3" in slots and slots["ia3"].ndim:
        vector = slots["ia3"].float()
        # PEFT's vector is the factor itself: (outputs, 1), or (1, inputs)
        return Factored({"vector": vector - 1}, per_output if len(vector) > 1 else per_input)
    return None


def _factored(
    slots: Slots,
    names: tuple[str, ...],
    formula: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    scale: float,
) -> Factored:
    """Return a change of the tensors of these names, with the magnitude of DoRA."""
    factors = {name: slots[name] for name in names if name in slots}
    magnitude, axis = slots.get("magnitude"), 0
    if magnitude is None and (magnitude := slots.get("dora_scale")) is not None:
        axis = int(magnitude.ndim > 1 and len(magnitude) == 1)
    return Factored(factors, formula, scale, magnitude, axis)


def _rank(matrix: Tensor) -> int:
    return len(matrix) if matrix.ndim else 0


def _find_module(stem: str, known: Mapping[str, str]) -> str:
    """Return the module that a name of a LoRA file means."""
    name = _remove_prefixes(stem).replace(".processor.", ".")
    if name.endswith(".to_out"):
        name += ".0"
    flat = name.replace(".", "_")
    # some versions of transformers have no level `text_model`
    return unflatten(flat, known) or unflatten(flat.replace("_text_model_", "_", 1), known) or name


def _pattern_end(pattern: str) -> str:
    return pattern.removeprefix("^").removeprefix("text_model.")


def _remove_prefixes(name: str) -> str:
    """Remove the UNet's prefixes. Replace those of text encoders."""
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            name = own + name.removeprefix(prefix)
            if own:
                break
    return name


def _other_family(groups: Mapping[str, Slots]) -> str:
    for stem, slots in groups.items():
        for mark, family in _FAMILIES:
            if mark.search(stem):
                return family
        if _CONTEXT.search(stem) and (down := slots.get("down")) is not None and down.ndim > 1:
            return _CONTEXT_FAMILIES.get(down.shape[1], "")
    return ""


def _header_scale(metadata: Mapping[str, Any]) -> Scale:
    """Return the strengths in a header. Files of kohya have them as tensors instead.

    Source: diffusers' `lora_adapter_metadata`, which holds PEFT's `LoraConfig` of each network:
    lora_alpha / rank, or lora_alpha / sqrt(rank) with `use_rslora`.
    """
    config = dict(metadata)
    try:
        packed = parse_json(str(metadata.get("lora_adapter_metadata", "{}")).encode())
        config |= packed if isinstance(packed, dict) else {}
    except ValueError:
        pass

    def scale(module: str, rank: int) -> float:
        part = next((name for name in TEXT_ENCODERS if module.startswith(name)), "unet.")
        inner = module.removeprefix(part)

        def value(key: str) -> Any:
            return config.get(part + key, config.get(key))

        patterns = value("alpha_pattern")
        alpha = next(
            (
                own
                for pattern, own in (patterns.items() if isinstance(patterns, dict) else ())
                if f".{inner}".endswith(f".{_pattern_end(pattern)}")
            ),
            value("lora_alpha"),
        )
        try:
            number = float(alpha)
        except (OverflowError, TypeError, ValueError):
            return 1.0
        divisor = math.sqrt(rank) if value("use_rslora") in (True, "true", "True") else rank
        return number / divisor if math.isfinite(number) else 1.0

    return scale
