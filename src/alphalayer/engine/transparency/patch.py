"""Weight patches of LayerDiffuse and LoRA files, merged in float32 and removed bit for bit.

Supported forms:

- LayerDiffuse as published: `<LDM name>::lora|diff|set::<index>`.
- Full offsets with diffusers' names.
- LoRA with the names of PEFT, diffusers or kohya.

Other kinds of files that are called LoRA (DoRA, LoHa, LoKr) are refused.

Source: Zhang and Agrawala 2024, "LayerDiffuse", arXiv 2402.17113. Hu et al. 2021, "LoRA", arXiv
2106.09685.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from alphalayer.catalog import file_stamp
from alphalayer.core.errors import CommandHint, LayerDiffuseMissing, ModelUnusable
from alphalayer.engine.networks.weights import NamedWeights
from alphalayer.engine.parameter_names import flat_names, ldm_to_diffusers, unflatten
from alphalayer.engine.tensors import read_tensors

logger = logging.getLogger(__name__)

_UP_DOWN = (
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_up.weight", ".lora_down.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
)
TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.")
_KOHYA_TEXT_ENCODERS = ("lora_te1_", "lora_te2_")
_PUBLISHED = re.compile("(.+)::(.+)::([0-9]{1,3})")
_PREFIXES = ("base_model.model.", "diffusion_model.", "unet.", "lora_unet_")
_OTHER_KINDS = (
    (".dora_scale", "DoRA"),
    (".lora_magnitude_vector", "DoRA"),
    (".hada_w", "LoHa"),
    (".lokr_w", "LoKr"),
    (".oft_", "OFT"),
    (".lora_mid.", "LoCon in three parts"),
)
"""Part of a tensor's name, and the kind of file that has it."""


@dataclass(frozen=True)
class Delta:
    """Change of one parameter W.

    With `down` it adds `scale * up @ down`, else `scale * up`. With `replaces`, W becomes `up`.
    """

    up: Tensor
    down: Tensor | None = None
    scale: float = 1.0
    replaces: bool = False

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return the changed weight.

        Args:
            weight: float32, of any shape. It does not change.
            strength: Factor of an added change. Replacements ignore it.

        Returns:
            float32, shaped like `weight`.
        """
        up = self.up.to(weight.device, torch.float32)
        if self.replaces:
            return up.clone()
        if self.down is not None:
            up = up.flatten(1) @ self.down.to(weight.device, torch.float32).flatten(1)
        return weight + strength * self.scale * up.reshape(weight.shape)

    def fits(self, weight: Tensor) -> bool:
        """Check whether the shape of a weight matches."""
        if self.down is None:
            return self.up.shape == weight.shape
        if min(self.up.ndim, self.down.ndim, weight.ndim) < 2 or not len(self.down):
            return False
        return (
            self.up.shape[0] == weight.shape[0]
            and self.up[0].numel() == len(self.down)
            and self.down[0].numel() * weight.shape[0] == weight.numel()
        )


@dataclass(frozen=True)
class PatchFile:
    """Version of a patch file: a file that replaces another has a different stamp."""

    path: Path
    stamp: tuple[int, int]
    widened: str | None = None
    """Convolution that the patch widens for a condition; None: none."""

    @classmethod
    def at(cls, path: Path, widened: str | None = None) -> PatchFile:
        """Return the current version of a file, which may be missing."""
        return cls(path, file_stamp(path), widened)


PatchSpec = tuple[PatchFile, float]
"""File to merge, and its strength."""


@dataclass
class Patch:
    """Changes of one file.

    Attributes:
        deltas: Changes by parameter name, as in diffusers.
        ignored: Number of changes that do not fit the model.
        condition: Weight of the channels that read a condition (outputs, channels, 3, 3), float32.
    """

    deltas: dict[str, Delta] = field(default_factory=dict[str, Delta])
    ignored: int = 0
    condition: Tensor | None = None


Weights = Mapping[str, Tensor]
"""Parameters by name. Those of the text encoders have the prefixes of `TEXT_ENCODERS`."""


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
    for mark, kind in _OTHER_KINDS:
        if any(mark in key for key in tensors):
            raise ModelUnusable(
                f"{path} is a {kind}; this version merges plain LoRA only.",
                hint="Use a plain LoRA.",
            )
    try:
        deltas = (
            _read_published(tensors)
            if any("::" in key for key in tensors)
            else _read_converted(tensors, weights)
        )
    except ValueError as error:
        raise ModelUnusable(
            f"{path} is not a LayerDiffuse patch or LoRA: {error}.",
            hint="Download it again.",
        ) from None
    condition = _split_condition(path, deltas, weights, widened) if widened else None
    fitting = {
        name: delta
        for name, delta in deltas.items()
        if name in weights and delta.fits(weights[name])
    }
    patch = Patch(fitting, len(deltas) - len(fitting), condition)
    if not fitting or patch.ignored > len(fitting):
        raise ModelUnusable(
            f"{path} does not fit this model: "
            f"{len(fitting)} of its {len(deltas)} changes name a weight of the same shape.",
            hint="Use the file that was made for this model family.",
        )
    if patch.ignored:
        logger.warning(
            "%s: %d of %d changes do not fit this model and are left out.",
            path,
            patch.ignored,
            len(deltas),
        )
    return patch


def _split_condition(
    path: Path, deltas: dict[str, Delta], weights: Weights, widened: str
) -> Tensor:
    """Cut the channels of a condition off a change, and return them."""
    delta, channels = deltas.get(widened), weights[widened].shape[1]
    if delta is None or delta.up.ndim != 4 or delta.up.shape[1] <= channels:
        raise ModelUnusable(
            f"{path} is not a patch for input images: its {widened} has no more than {channels} "
            "input channels.",
            hint="Get the file again, or use the mode that it was made for.",
        )
    deltas[widened] = replace(delta, up=delta.up[:, :channels])
    return delta.up[:, channels:].float()


def _read_published(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
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
    deltas: dict[str, Delta] = {}
    for name, slot in slots.items():
        if ("lora", 0) in slot and ("lora", 1) in slot:
            deltas[name] = _low_rank(slot["lora", 0], slot["lora", 1], slot.get(("lora", 2)))
        elif ("diff", 0) in slot or ("set", 0) in slot:
            replaces = ("set", 0) in slot
            deltas[name] = Delta(slot["set" if replaces else "diff", 0], replaces=replaces)
    return deltas


def _read_converted(tensors: Mapping[str, Tensor], weights: Weights) -> dict[str, Delta]:
    """Read LoRA pairs by their suffixes, and all other tensors as full offsets."""
    known = flat_names(name.removesuffix(".weight") for name in weights)
    deltas: dict[str, Delta] = {}
    for key, tensor in tensors.items():
        suffixes = next(((up, down) for up, down in _UP_DOWN if key.endswith(up)), None)
        if suffixes:
            stem = key.removesuffix(suffixes[0])
            down = tensors.get(stem + suffixes[1])
            if down is not None:
                alpha = tensors.get(stem + ".alpha")
                deltas[_find_lora_target(stem, known)] = _low_rank(tensor, down, alpha)
        elif not key.endswith((".alpha", *(down for _, down in _UP_DOWN))):
            deltas[_remove_prefixes(key)] = Delta(tensor)
    return deltas


def _find_lora_target(stem: str, known: Mapping[str, str]) -> str:
    """Find the parameter that a LoRA stem names."""
    name = _remove_prefixes(stem).replace(".processor.", ".")
    if name.endswith(".to_out"):
        name += ".0"
    flat = name.replace(".", "_")
    # some versions of transformers have no level `text_model`
    return (
        unflatten(flat, known) or unflatten(flat.replace("_text_model_", "_", 1), known) or name
    ) + ".weight"


def _remove_prefixes(name: str) -> str:
    """Remove the UNet's prefixes. Replace kohya's prefixes of text encoders."""
    for kohya_prefix, prefix in zip(_KOHYA_TEXT_ENCODERS, TEXT_ENCODERS, strict=True):
        if name.startswith(kohya_prefix):
            return prefix + name.removeprefix(kohya_prefix)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _low_rank(up: Tensor, down: Tensor, alpha: Tensor | None) -> Delta:
    if alpha is None or not len(down.shape) or not len(down):
        return Delta(up, down)
    if alpha.numel() != 1:
        raise ValueError("an alpha is not one number")
    return Delta(up, down, float(alpha) / len(down))


class WeightPatcher:
    """Weights with a list of patches merged into them. The CPU keeps the original weights.

    Args:
        weights: Parameters to change in place.
        read: Reads a patch file. Its changes of other parameters are ignored.

    Attributes:
        applied: Patches that are merged now, in order.
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
        patches = [(self._read(file), strength) for file, strength in specs if strength]
        self.apply(patches)
        self.applied = tuple(specs)

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
        self.applied = ()


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
        text_encoders: Text encoders 1 and 2.
    """
    own = NamedWeights(unet)
    named = zip(TEXT_ENCODERS, text_encoders, strict=True)
    text = NamedWeights(nn.ModuleDict({prefix[:-1]: encoder for prefix, encoder in named}))

    @lru_cache(4)
    def read(file: PatchFile) -> Patch:
        return read_patch(file.path, {**own, **text}, file.widened)

    return WeightPatcher(own, read), WeightPatcher(text, read)
