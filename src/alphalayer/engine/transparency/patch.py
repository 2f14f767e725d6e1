"""Weight patches: the LayerDiffuse files and LoRAs, read in every published form, merged in float32 and taken off bit for bit.

Forms: `<LDM name>::lora|diff|set::<index>` (LayerDiffuse as published); diffusers-named full offsets; LoRA in PEFT, diffusers
or kohya names. What else is called a LoRA (DoRA, LoHa, LoKr ...) is refused by its name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from alphalayer.catalog import file_stamp
from alphalayer.core.errors import CommandHint, CorruptFile, LayerDiffuseMissing, ModelUnusable
from alphalayer.engine.parameter_names import flat_names, ldm_to_diffusers, unflatten

logger = logging.getLogger(__name__)

_UP_DOWN = (
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_up.weight", ".lora_down.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
)
TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.")
_KOHYA_TEXT_ENCODERS = ("lora_te1_", "lora_te2_")
_PREFIXES = ("base_model.model.", "diffusion_model.", "unet.", "lora_unet_")
_OTHER_KINDS = (
    (".dora_scale", "DoRA"),
    (".lora_magnitude_vector", "DoRA"),
    (".hada_w", "LoHa"),
    (".lokr_w", "LoKr"),
    (".oft_", "OFT"),
    (".lora_mid.", "LoCon in three parts"),
)
"""What a part of a tensor's name gives away."""


@dataclass(frozen=True)
class Delta:
    """A change of one parameter W: `scale * up @ down` where `down` is given, else `up` added, or put in its place."""

    up: Tensor
    down: Tensor | None = None
    scale: float = 1.0
    replaces: bool = False

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """The changed weight, float32, from a float32 weight."""
        up = self.up.to(weight.device, torch.float32)
        if self.is_wider_than(weight):
            up = up[:, : weight.shape[1]]
        if self.replaces:
            return up.clone()
        if self.down is not None:
            up = up.flatten(1) @ self.down.to(weight.device, torch.float32).flatten(1)
        return weight + strength * self.scale * up.reshape(weight.shape)

    def fits(self, weight: Tensor) -> bool:
        """Whether the shapes agree."""
        if self.down is None:
            return self.up.shape == weight.shape or self.is_wider_than(weight)
        return (
            self.up.shape[0] == weight.shape[0]
            and self.down[0].numel() * weight.shape[0] == weight.numel()
        )

    def is_wider_than(self, weight: Tensor) -> bool:
        """Return whether a convolution of this change has more input channels.

        The channels beyond those of `weight` read a condition; see `WeightPatcher.condition_weight`.
        """
        if self.down is not None or self.up.ndim != 4 or weight.ndim != 4:
            return False
        (outputs, channels, *kernel), own = self.up.shape, weight.shape
        return channels > own[1] and (outputs, *kernel) == (own[0], *own[2:])


@dataclass(frozen=True)
class PatchFile:
    """A patch file as it stands: one that is written anew under its old name is another."""

    path: Path
    stamp: tuple[int, int]

    @classmethod
    def at(cls, path: Path) -> PatchFile:
        """The file of a path; one that is not there is told when it is read."""
        return cls(path, file_stamp(path))


PatchSpec = tuple[PatchFile, float]
"""What is merged, and how strongly."""


@dataclass
class Patch:
    """The changes of one file by parameter name (diffusers), and how many of its names the model does not have."""

    deltas: dict[str, Delta] = field(default_factory=dict[str, Delta])
    ignored: int = 0


Weights = Mapping[str, Tensor]
"""Parameters by name: the UNet's as they are, those of the text encoders behind `TEXT_ENCODERS`."""


def read_patch(path: Path, weights: Weights) -> Patch:
    """Read a patch file for a model.

    Raises:
        LayerDiffuseMissing: there is no such file.
        CorruptFile: it cannot be read.
        ModelUnusable: less than half of it fits this model, or it is of a kind that is not merged here.
    """
    if not path.is_file():
        raise LayerDiffuseMissing(
            f"{path} is not there.", hint=CommandHint("Run:", "models pull layerdiffuse")
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}.", hint="Download it again.") from None
    for mark, kind in _OTHER_KINDS:
        if any(mark in key for key in tensors):
            raise ModelUnusable(
                f"{path} is a {kind}; this version merges plain LoRA only.",
                hint="Use a plain LoRA.",
            )
    try:
        found = (
            _published(tensors)
            if any("::" in key for key in tensors)
            else _converted(tensors, weights)
        )
    except ValueError:
        raise ModelUnusable(
            f"{path} is not a LayerDiffuse patch: its names are not <parameter>::<type>::<number>.",
            hint="Download it again.",
        ) from None
    fitting = {
        name: delta
        for name, delta in found.items()
        if name in weights and delta.fits(weights[name])
    }
    patch = Patch(fitting, len(found) - len(fitting))
    if not fitting or patch.ignored > len(fitting):
        raise ModelUnusable(
            f"{path} does not fit this model: {len(fitting)} of its {len(found)} changes name a weight of the same shape.",
            hint="Use the file that was made for this model family.",
        )
    if patch.ignored:
        logger.warning(
            "%s: %d of %d changes do not fit this model and are left out.",
            path,
            patch.ignored,
            len(found),
        )
    return patch


def _published(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    """`<name>::<type>::<index>`; lora: 0 up, 1 down, 2 alpha (absent: scale 1)."""
    slots: dict[str, dict[tuple[str, int], Tensor]] = {}
    for key, tensor in tensors.items():
        name, kind, index = key.split("::")
        parameter = ldm_to_diffusers(name.removeprefix("diffusion_model."))
        slots.setdefault(parameter, {})[kind, int(index)] = tensor
    found: dict[str, Delta] = {}
    for name, given in slots.items():
        if ("lora", 0) in given and ("lora", 1) in given:
            found[name] = _low_rank(given["lora", 0], given["lora", 1], given.get(("lora", 2)))
        elif ("diff", 0) in given or ("set", 0) in given:
            replaces = ("set", 0) in given
            found[name] = Delta(given["set" if replaces else "diff", 0], replaces=replaces)
    return found


def _converted(tensors: Mapping[str, Tensor], weights: Weights) -> dict[str, Delta]:
    """LoRA pairs by any of the known endings; every other tensor is a full offset under its parameter's name."""
    known = flat_names(name.removesuffix(".weight") for name in weights)
    found: dict[str, Delta] = {}
    for key, tensor in tensors.items():
        ends = next(((up, down) for up, down in _UP_DOWN if key.endswith(up)), None)
        if ends:
            stem = key.removesuffix(ends[0])
            if stem + ends[1] in tensors:
                alpha = tensors.get(stem + ".alpha")
                found[_lora_target(stem, known)] = _low_rank(tensor, tensors[stem + ends[1]], alpha)
        elif not key.endswith((".alpha", *(down for _, down in _UP_DOWN))):
            found[_without_prefixes(key)] = Delta(tensor)
    return found


def _lora_target(stem: str, known: Mapping[str, str]) -> str:
    """The parameter that a LoRA stem names."""
    name = _without_prefixes(stem).replace(".processor.", ".")
    if name.endswith(".to_out"):
        name += ".0"
    flat = name.replace(".", "_")
    # some versions of transformers have one level less
    return (
        unflatten(flat, known) or unflatten(flat.replace("_text_model_", "_", 1), known) or name
    ) + ".weight"


def _without_prefixes(name: str) -> str:
    """A parameter's name, without what says that it is the UNet's; those of text encoders begin with `TEXT_ENCODERS`."""
    for theirs, ours in zip(_KOHYA_TEXT_ENCODERS, TEXT_ENCODERS, strict=True):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _low_rank(up: Tensor, down: Tensor, alpha: Tensor | None) -> Delta:
    return Delta(up, down, 1.0 if alpha is None else float(alpha) / down.shape[0])


class WeightPatcher:
    """Keeps weights in the state that is asked for; the originals wait on the CPU.

    `read` reads patches; what they change elsewhere is not looked at. Changed weights are rounded to `rounded` where that is less than
    their own dtype.
    """

    def __init__(
        self,
        weights: Weights,
        read: Callable[[PatchFile], Patch],
        rounded: torch.dtype | None = None,
    ):
        self._weights = weights
        self._read = read
        self._rounded = rounded
        self._originals: dict[str, Tensor] = {}
        self.applied: tuple[PatchSpec, ...] = ()

    def condition_weight(self, file: PatchFile, parameter: str) -> Tensor:
        """Return the weight by which a patch widens a convolution for a condition, float32.

        A convolution with more inputs is the sum of the model's own and of this one.

        Returns:
            Weight (outputs, condition channels, 3, 3).

        Raises:
            ModelUnusable: The patch does not widen the convolution.
        """
        delta, own = self._read(file).deltas.get(parameter), self._weights[parameter]
        if delta is None or not delta.is_wider_than(own):
            raise ModelUnusable(
                f"{file.path} is not a patch for input images: {parameter} has no more than "
                f"{own.shape[1]} input channels.",
                hint="Get the file again, or use the mode that it was made for.",
            )
        return delta.up[:, own.shape[1] :].float()

    def ensure(self, wanted: Sequence[PatchSpec]) -> None:
        """Make the weights original + `wanted` patches with their strengths, in order; nothing is done if they are."""
        if tuple(wanted) == self.applied:
            return
        self.remove()
        chosen = [(self._read(file), strength) for file, strength in wanted if strength]
        self.apply(chosen)
        self.applied = tuple(wanted)

    def apply(self, patches: Sequence[tuple[Patch, float]]) -> None:
        """PatchSpec patches, all or, where one raises (out of memory), none."""
        try:
            self._merge(patches)
        except BaseException:
            self.remove()
            raise

    @torch.no_grad()
    def _merge(self, patches: Sequence[tuple[Patch, float]]) -> None:
        """All changes of a parameter in one float32 pass, then one cast to its own dtype."""
        for name in {
            name: None for patch, _ in patches for name in patch.deltas if name in self._weights
        }:
            weight = self._weights[name]
            self._originals.setdefault(name, weight.detach().to("cpu", copy=True))
            merged = weight.detach().float()
            for patch, strength in patches:
                if name in patch.deltas:
                    merged = patch.deltas[name].applied(merged, strength)
            weight.copy_(merged.to(self._rounded or weight.dtype))

    @torch.no_grad()
    def remove(self) -> None:
        """Put every changed weight back as it was, bit for bit."""
        for name, original in self._originals.items():
            self._weights[name].copy_(original)
        self._originals.clear()
        self.applied = ()


def patchers(
    unet: nn.Module, text_encoders: Sequence[nn.Module], text_dtype: torch.dtype
) -> tuple[WeightPatcher, WeightPatcher]:
    """Those of a model's UNet and of its text encoders, whose weights are of the values of `text_dtype`; a file is read once for both."""
    own = dict(unet.named_parameters())
    text = {
        prefix + name: weight
        for prefix, encoder in zip(TEXT_ENCODERS, text_encoders, strict=True)
        for name, weight in encoder.named_parameters()
    }

    @lru_cache(4)
    def read(file: PatchFile) -> Patch:
        return read_patch(file.path, {**own, **text})

    return WeightPatcher(own, read), WeightPatcher(text, read, text_dtype)
