"""Weight patches of LayerDiffuse and LoRA files, merged in float32 and removed bit for bit.

Supported forms:

- LayerDiffuse as published: `<LDM name>::lora|diff|set::<index>`.
- Full offsets with diffusers' names.
- The LoRA files of `alphalayer.engine.transparency.lora_files`.

Source: Zhang and Agrawala 2024, "LayerDiffuse", arXiv 2402.17113.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphalayer import catalog
from alphalayer.catalog import file_stamp
from alphalayer.core.errors import CommandHint, LayerDiffuseMissing, ModelUnusable
from alphalayer.engine.networks.weights import NamedWeights
from alphalayer.engine.parameter_names import ldm_to_diffusers
from alphalayer.engine.tensors import read_tensors
from alphalayer.engine.transparency.changes import Change, Delta
from alphalayer.engine.transparency.lora_files import (
    TEXT_ENCODERS,
    LoraChanges,
    Weights,
    alpha_scale,
    read_lora,
)

logger = logging.getLogger(__name__)

_PUBLISHED = re.compile("(.+)::(.+)::([0-9]{1,3})")
_KINDS = "LoRA, LoCon, LoHa, LoKr, GLoRA, IA3, DoRA, or full differences"
_PEFT_FILE = "adapter_model.safetensors"
_NAMED = 3
"""Limit of the names in a message."""


@dataclass(frozen=True)
class PatchFile:
    """Version of a patch file: a file that replaces another has a different stamp."""

    path: Path
    stamp: tuple[int, ...]
    widened: str | None = None
    """Convolution that the patch widens for a condition; None: none."""

    @classmethod
    def at(cls, path: Path, widened: str | None = None) -> PatchFile:
        """Return the current version of a file, which may be missing."""
        files = (path, config) if (config := _peft_config(path)) else (path,)
        return cls(path, tuple(part for file in files for part in file_stamp(file)), widened)


PatchSpec = tuple[PatchFile, float]
"""File to merge, and its strength."""


@dataclass
class Patch:
    """Changes of one file.

    Attributes:
        deltas: Changes by parameter name, as in diffusers.
        left_out: What of the file is not merged, with the number of each kind.
        condition: Weight of the channels that read a condition (outputs, channels, 3, 3), float32.
    """

    deltas: dict[str, Change] = field(default_factory=dict[str, Change])
    left_out: tuple[str, ...] = ()
    condition: Tensor | None = None


def read_patch(path: Path, weights: Weights, widened: str | None = None) -> Patch:
    """Read a patch file for a model.

    A convolution with more input channels is the sum of the model's own and of one that reads the
    other channels, so a change that widens a convolution is read as two.

    Args:
        path: The file.
        weights: Parameters of the model.
        widened: Convolution that the patch has to widen.

    Raises:
        LayerDiffuseMissing: The file does not exist.
        CorruptFile: The file cannot be read.
        ModelUnusable: Less than half of it fits this model, or its kind is not supported.
    """
    if not path.is_file():
        raise LayerDiffuseMissing(
            f"{path} does not exist.", hint=CommandHint("Run:", "models pull layerdiffuse")
        )
    tensors = read_tensors(path)
    try:
        content = (
            LoraChanges(_read_published(tensors))
            if any("::" in key for key in tensors)
            else read_lora(tensors, _metadata(path), weights)
        )
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ModelUnusable(
            f"{path} is not a LayerDiffuse patch or LoRA: {error}.",
            hint="Download it again.",
        ) from None
    condition = _split_condition(path, content.changes, weights, widened) if widened else None
    fitting = {
        name: change
        for name, change in content.changes.items()
        if name in weights and change.fits(weights[name])
    }
    _check_half(path, content, len(fitting))
    left_out = _describe_rest(content, weights, fitting)
    if left_out:
        logger.warning("%s is merged without %s.", path, "; ".join(left_out))
    return Patch(fitting, left_out, condition)


def _metadata(path: Path) -> Mapping[str, Any]:
    """Return the strengths in a LoRA file, or in the file that PEFT writes beside it."""
    if config := _peft_config(path):
        return catalog.read_config(config)
    return catalog.read_header(path).metadata


def _peft_config(path: Path) -> Path | None:
    """Return the file that PEFT writes beside a LoRA, None if there is none."""
    config = path.with_name("adapter_config.json")
    return config if path.name == _PEFT_FILE and config.is_file() else None


def _check_half(path: Path, content: LoraChanges, fitting: int) -> None:
    """Raise `ModelUnusable` if less than half of a file can be merged."""
    unread = {
        "OFT": len(content.unsupported),
        "unknown": len(content.unknown),
        "half": len(content.halves),
        "unfit": len(content.changes) - fitting,
    }
    total = fitting + sum(unread.values())
    if fitting and 2 * fitting >= total:
        return
    if not total:
        raise ModelUnusable(
            f"{path} holds no change of a weight.",
            hint="Put embeddings into the embeddings folder, each as a file of its own."
            if content.embeddings
            else "Get the file again.",
        )
    worst = max(unread, key=lambda kind: unread[kind])
    if worst == "OFT":
        raise ModelUnusable(
            f"{path} is an OFT or BOFT; this version merges {_KINDS}.",
            hint="Use a LoRA of the same style.",
        )
    if worst == "unknown":
        raise ModelUnusable(
            f"{path}: {unread[worst]} of its {total} parts are no change of a known kind, such as "
            f"{catalog.printable(content.unknown[0])[:100]}.",
            hint=f"Use a file with {_KINDS}, with the names of kohya, LyCORIS, diffusers or PEFT.",
        )
    if worst == "half":
        raise ModelUnusable(
            f"{path}: {unread[worst]} of its {total} changes lack a part, such as "
            f"{catalog.printable(content.halves[0])[:100]}.",
            hint="Get the file again.",
        )
    made_for = f"It was made for {content.family}. " if content.family else ""
    raise ModelUnusable(
        f"{path} does not fit this model: "
        f"{fitting} of its {total} changes name a weight of the same shape.",
        hint=f"{made_for}Use the file that was made for this model family.",
    )


def _describe_rest(
    content: LoraChanges, weights: Weights, fitting: Mapping[str, Change]
) -> tuple[str, ...]:
    """Return what of a file is not merged, each kind with its number."""
    unfit = [name for name in content.changes if name not in fitting]
    unmatched = [name for name in unfit if name not in weights]
    kinds = (
        ("changes of another shape than the weight", len(unfit) - len(unmatched), ()),
        ("changes of layers that the model lacks", len(unmatched), ()),
        ("changes that lack a part", len(content.halves), ()),
        ("OFT", len(content.unsupported), ()),
        ("tensors of an unknown kind", len(content.unknown), content.unknown),
        ("bundled embeddings", len(content.embeddings), content.embeddings),
    )
    return tuple(
        f"{kind}: {number}"
        + (f" ({catalog.printable(', '.join(names[:_NAMED]))[:200]})" if names else "")
        for kind, number, names in kinds
        if number
    )


def _split_condition(
    path: Path, deltas: dict[str, Change], weights: Weights, widened: str
) -> Tensor:
    """Cut the channels of a condition off a change, and return them."""
    delta, channels = deltas.get(widened), weights[widened].shape[1]
    if not isinstance(delta, Delta) or delta.up.ndim != 4 or delta.up.shape[1] <= channels:
        raise ModelUnusable(
            f"{path} is not a patch for input images: its {widened} has no more than {channels} "
            "input channels.",
            hint="Get the file again, or use the mode that it was made for.",
        )
    deltas[widened] = replace(delta, up=delta.up[:, :channels])
    return delta.up[:, channels:].float()


def _read_published(tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """Read tensors named `<LDM name>::<type>::<index>`.

    Type "lora" has the indices 0 for up, 1 for down and 2 for alpha. Without alpha the scale is 1.
    Types "diff" and "set" have the index 0.
    """
    slots: dict[str, dict[tuple[str, int], Tensor]] = {}
    for key, tensor in tensors.items():
        match = _PUBLISHED.fullmatch(key)
        if match is None:
            raise ValueError("its names are not <parameter>::<type>::<number>")
        parameter = ldm_to_diffusers(match[1].removeprefix("diffusion_model."))
        slots.setdefault(parameter, {})[match[2], int(match[3])] = tensor
    deltas: dict[str, Change] = {}
    for name, slot in slots.items():
        if ("lora", 0) in slot and ("lora", 1) in slot:
            deltas[name] = _low_rank(slot["lora", 0], slot["lora", 1], slot.get(("lora", 2)))
        elif ("diff", 0) in slot or ("set", 0) in slot:
            replaces = ("set", 0) in slot
            deltas[name] = Delta(slot["set" if replaces else "diff", 0], replaces=replaces)
    return deltas


def _low_rank(up: Tensor, down: Tensor, alpha: Tensor | None) -> Delta:
    if alpha is None:
        return Delta(up, down)
    return Delta(up, down, alpha_scale(alpha, len(down) if down.ndim else 0))


class WeightPatcher:
    """Weights with a list of patches merged into them. The CPU keeps the original weights.

    Args:
        weights: Parameters to change in place.
        read: Reads a patch file. Its changes of other parameters are ignored.

    Attributes:
        applied: Patches that are merged now, in order.
        notes: What of their files is not merged, one sentence each.
    """

    def __init__(
        self,
        weights: Weights,
        read: Callable[[PatchFile], Patch],
    ):
        self._weights = weights
        self._read = read
        self._originals: dict[str, Tensor] = {}
        self.applied: tuple[PatchSpec, ...] = ()
        self.notes: tuple[str, ...] = ()

    def read_condition(self, file: PatchFile) -> Tensor:
        """Return the weight of a patch that reads a condition, see `Patch`.

        Raises:
            LayerDiffuseMissing, CorruptFile, ModelUnusable: See `read_patch`.
        """
        condition = self._read(file).condition
        assert condition is not None, file
        return condition

    def ensure(self, specs: Sequence[PatchSpec]) -> None:
        """Merge exactly these patches, in order. If they are merged already, do nothing.

        Raises:
            LayerDiffuseMissing, CorruptFile, ModelUnusable: See `read_patch`.
        """
        if tuple(specs) == self.applied:
            return
        self.remove()
        patches = {file: self._read(file) for file, strength in specs if strength}
        self.apply([(patches[file], strength) for file, strength in specs if strength])
        self.applied = tuple(specs)
        self.notes = tuple(
            f"{catalog.printable(file.path.stem)} is merged without {'; '.join(patch.left_out)}."
            for file, patch in patches.items()
            if patch.left_out
        )

    def apply(self, patches: Sequence[tuple[Patch, float]]) -> None:
        """Merge patches with their strengths: all of them, or none on an error."""
        try:
            self._merge(patches)
        except BaseException:
            self.remove()
            raise

    @torch.no_grad()
    def _merge(self, patches: Sequence[tuple[Patch, float]]) -> None:
        """Apply all changes of a parameter in float32, then cast once to its own dtype."""
        names = {
            name: None for patch, _ in patches for name in patch.deltas if name in self._weights
        }
        self._originals |= _copies(
            {name: self._weights[name] for name in names if name not in self._originals}
        )
        for name in names:
            weight = self._weights[name]
            merged = weight.detach().float()
            for patch, strength in patches:
                if name in patch.deltas:
                    merged = patch.deltas[name].apply(merged, strength)
            weight.copy_(merged)

    @torch.no_grad()
    def remove(self) -> None:
        """Restore every changed weight bit for bit."""
        for name, original in self._originals.items():
            self._weights[name].copy_(original)
        self._originals.clear()
        self.applied = self.notes = ()


def _copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of weights on the CPU, in float16 where no bit is lost.

    All copies of a dtype share one block: small ones would leave gaps of gigabytes in memory.
    """
    dtypes = {
        name: torch.float16 if torch.equal(weight.half().to(weight.dtype), weight) else weight.dtype
        for name, weight in weights.items()
    }
    copies: dict[str, Tensor] = {}
    for dtype in {*dtypes.values()}:
        group = {name: weight for name, weight in weights.items() if dtypes[name] == dtype}
        block = torch.empty(sum(weight.numel() for weight in group.values()), dtype=dtype)
        parts = block.split([weight.numel() for weight in group.values()])
        for (name, weight), part in zip(group.items(), parts, strict=True):
            copies[name] = part.view(weight.shape).copy_(weight)
    return copies


def patchers(
    unet: nn.Module, text_encoders: Sequence[nn.Module]
) -> tuple[WeightPatcher, WeightPatcher]:
    """Create the patchers of a model's UNet and of its text encoders.

    Both share a cache, so each file is read once.

    Args:
        unet: UNet of the model.
        text_encoders: Its text encoders, in the order of `TEXT_ENCODERS`.
    """
    own = NamedWeights(unet)
    named = zip(TEXT_ENCODERS, text_encoders, strict=False)  # SD 1.5 has one
    text = NamedWeights(nn.ModuleDict({prefix[:-1]: encoder for prefix, encoder in named}))

    @lru_cache(4)
    def read(file: PatchFile) -> Patch:
        return read_patch(file.path, {**own, **text}, file.widened)

    return WeightPatcher(own, read), WeightPatcher(text, read)
