"""Attention sharing: images of a set are generated together and attend to each other.

A file has a unit for each attention of SD 1.5's UNet. A unit gives each image of a set low-rank
changes of its own, and lets each position attend to the same position of the other images. A file
for an input image also has an encoder, whose output each unit adds to its input.

Source: the SD 1.5 modes of LayerDiffuse. Zhang and Agrawala 2024, arXiv 2402.17113.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from typing import cast

import torch
from torch import Tensor, nn

from alphalayer.core.errors import ModelUnusable
from alphalayer.engine.networks.unet import CrossAttention, SelfAttention, TransformerBlock, UNet
from alphalayer.engine.networks.weights import NamedWeights, build
from alphalayer.engine.tensors import read_tensors
from alphalayer.engine.transparency.patch import PatchFile, PatchSpec

Attention = SelfAttention | CrossAttention
_FIRST = "hookers.layers.0."
_ENCODER = "kwargs_encoder."
_STRIDED = (2, 4, 6)
"""Convolutions of the encoder's first block that halve the size."""


@dataclass(frozen=True)
class Sharing:
    """What replaces the attentions of a UNet."""

    file: PatchFile
    images: int
    """Images of a set."""
    loras: tuple[PatchSpec, ...] = ()
    """LoRAs that are merged into the UNet. The units take its weights with them."""
    control: Tensor | None = field(default=None, compare=False)
    """Input image (1, 3, H, W) in [-1, 1]."""


@dataclass(frozen=True)
class UnitSizes:
    """Sizes of the units of a file. An attention has its own width, text width and heads."""

    images: int
    rank: int
    control: tuple[int, ...] = ()
    """Widths of the encoder's first block. Empty: the file is for no input image."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> UnitSizes:
        """Read the sizes from the tensors of a file. Raises `KeyError` for another file."""
        downs = [f"{_FIRST}to_q_lora.{i}.down.weight" for i in range(len(tensors))]
        widths = [
            len(tensors[name])
            for i in range(0, 16, 2)
            if (name := f"{_ENCODER}blocks_0.{i}.weight") in tensors
        ]
        return cls(sum(name in tensors for name in downs), len(tensors[downs[0]]), tuple(widths))


class FrameLinear(nn.Module):
    """Linear layer with a weight of its own for each image of a set.

    Args:
        base: The layer of the model, whose bias all images have. It stays the owner of its weights.
        loras: Low-rank changes of each part of the layer, one an image of the set.
    """

    def __init__(self, base: nn.Linear, loras: Sequence[nn.ModuleList]):
        super().__init__()
        self.base = base
        weights = [
            base.weight + torch.cat([cast(_Lora, part).product(base.weight) for part in parts])
            for parts in zip(*loras, strict=True)
        ]
        merged = torch.stack([weight.to(base.weight.dtype) for weight in weights])
        self.weight = nn.Parameter(merged, requires_grad=False)  # (images, outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, tokens, outputs) of x (B, tokens, inputs), whose rows are sets."""
        images, tokens = len(self.weight), x.shape[1]
        by_image = x.unflatten(0, (-1, images)).transpose(0, 1).flatten(1, 2)
        y = torch.bmm(by_image, self.weight.mT)
        y = y.unflatten(1, (-1, tokens)).transpose(0, 1).flatten(0, 1)
        bias = cast("Tensor | None", self.base.bias)
        return y if bias is None else y + bias


class _Lora(nn.Module):
    """Low-rank change of a weight, at strength 1."""

    def __init__(self, entering: int, width: int, rank: int):
        super().__init__()
        self.down, self.up = _Matrix(rank, entering), _Matrix(width, rank)

    def product(self, like: Tensor) -> Tensor:
        """Return the change, float32 on the device of another tensor."""
        up, down = (layer.weight.to(like.device).float() for layer in (self.up, self.down))
        return up @ down


class _Matrix(nn.Module):
    """Weight of a linear layer. Without random numbers a thousand of them take no time."""

    def __init__(self, outputs: int, entering: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, entering), requires_grad=False)


class SharedAttention(nn.Module):
    """Unit of a file, and the attention that it replaces. Parameter names are those of the file.

    Rows of its input are sets, one after the other, each with its images in their order.
    """

    control: Tensor | None
    """What an input image adds to the tokens of each image (images, positions, width)."""

    def __init__(self, sizes: UnitSizes, width: int, entering: int, heads: int):
        super().__init__()
        self.images, self.heads = sizes.images, heads
        entries = {"q": width, "k": entering, "v": entering, "out": width}
        for part, own in entries.items():
            loras = (_Lora(own, width, sizes.rank) for _ in range(sizes.images))
            setattr(self, f"to_{part}_lora", nn.ModuleList(loras))
        self.temporal_i = nn.Linear(width, width)
        self.temporal_n = nn.LayerNorm(width, 1e-6)
        self.temporal_q = nn.Linear(width, width)
        self.temporal_k = nn.Linear(width, width)
        self.temporal_v = nn.Linear(width, width)
        self.temporal_o = nn.Linear(width, width)
        if sizes.control:
            inner = sizes.control[-1]
            self.control_convs = nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(inner, inner, 3, padding=1), nn.SiLU(), nn.Conv2d(inner, width, 1)
                )
                for _ in range(sizes.images)
            )
        self.register_buffer("control", None, persistent=False)

    @torch.no_grad()
    def merge(self, attention: Attention) -> None:
        """Merge the changes of each image into the weights of an attention."""
        last = cast(nn.Linear, attention.to_out[0])
        weight = last.weight
        q, k, v, out = (cast(nn.ModuleList, getattr(self, f"to_{part}_lora")) for part in _PARTS)
        if isinstance(attention, SelfAttention):
            layers = {"to_qkv": FrameLinear(attention.to_qkv, [q, k, v])}
        else:
            layers = {
                "to_q": FrameLinear(attention.to_q, [q]),
                "to_kv": FrameLinear(attention.to_kv, [k, v]),
            }
        layers["to_out"] = FrameLinear(last, [out])
        for part in _PARTS:
            delattr(self, f"to_{part}_lora")
        self.to(weight.device, weight.dtype)
        self.attention, self.layers = attention, nn.ModuleDict(layers)

    @torch.no_grad()
    def set_control(self, signal: Tensor) -> bool:
        """Add an input image to the tokens from now on.

        Args:
            signal: Encoded image (1, width, h, w), with as many positions as there are tokens.

        Returns:
            Whether the tokens of an image before it stay in their memory.
        """
        maps = [convs(signal.to(self.temporal_i.weight.dtype)) for convs in self.control_convs]
        tokens = torch.cat(maps).flatten(2).mT.contiguous()
        if self.control is None or self.control.shape != tokens.shape:
            self.control = tokens
            return False
        self.control.copy_(tokens)
        return True

    def replace(self) -> SharedAttention:
        """Return itself, for the place of its attention. `restore` undoes it."""
        self._set_layers({name: cast(FrameLinear, own) for name, own in self.layers.items()})
        return self

    def restore(self) -> Attention:
        """Return the attention with its own layers."""
        self._set_layers({n: cast(FrameLinear, own).base for n, own in self.layers.items()})
        return self.attention

    def _set_layers(self, layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            setattr(self.attention, name, nn.Sequential(layer) if name == "to_out" else layer)

    def keys_values(self, context: Tensor) -> Tensor:
        """Return keys and values of a text, see `CrossAttention.keys_values`."""
        return cast(CrossAttention, self.attention).keys_values(context)

    def forward(self, x: Tensor, *text: Tensor) -> Tensor:
        """Return what the block adds to its tokens.

        Args:
            x: Normalised tokens (B, positions, width).
            text: Keys and values of the text, for cross-attention.
        """
        u = x
        if self.control is not None:
            u = (x.unflatten(0, (-1, self.images)) + self.control).flatten(0, 1)
        u = u + self.attention(u, *text)
        return u + self._exchange(u) - x

    def _exchange(self, u: Tensor) -> Tensor:
        """Let each position attend to the same one of the other images."""
        h = self.temporal_i(self.temporal_n(u))
        values = self.temporal_v(h)
        if self.images > 1:  # one image attends to itself alone
            q, k, v = (
                tokens.unflatten(0, (-1, self.images))
                .unflatten(-1, (self.heads, -1))
                .permute(0, 2, 3, 1, 4)  # (sets, positions, heads, images, head width)
                for tokens in (self.temporal_q(h), self.temporal_k(h), values)
            )
            # fused kernels limit the number of sets and positions
            shares = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
            values = (shares @ v).permute(0, 3, 1, 2, 4).flatten(-2).flatten(0, 1)
        return self.temporal_o(values)


_PARTS = ("q", "k", "v", "out")


class ControlEncoder(nn.Module):
    """Encoder of an input image to signals of each level of the UNet."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        last = widths[-1]
        first: list[nn.Module] = []
        for i, (entering, width) in enumerate(pairwise((3, *widths))):
            stride = 2 if i in _STRIDED else 1
            first += [nn.Conv2d(entering, width, 3, stride, 1), nn.SiLU()]
        self.blocks_0 = nn.Sequential(*first)
        self.blocks_1, self.blocks_2, self.blocks_3 = (
            nn.Sequential(
                nn.Conv2d(last, last, 3, 2, 1), nn.SiLU(), nn.Conv2d(last, last, 3, 1, 1), nn.SiLU()
            )
            for _ in range(3)
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return signals (1, width, h, w) at 1/8, 1/16, 1/32 and 1/64 of the size."""
        signals: list[Tensor] = []
        for block in (self.blocks_0, self.blocks_1, self.blocks_2, self.blocks_3):
            pixels = block(pixels)
            signals.append(pixels)
        return signals


class SharingFile(nn.Module):
    """Contents of a file for a UNet. Parameter names are those of the file."""

    spec: Sharing
    """What they were read for. It is another object if they are in other memory."""

    def __init__(self, sizes: UnitSizes, blocks: Sequence[TransformerBlock]):
        super().__init__()
        self.is_on = False
        self._control: Tensor | None = None
        units: list[SharedAttention] = []
        for block in blocks:
            width, heads = block.attn1.to_qkv.in_features, block.attn1.heads
            for entering in (width, block.attn2.to_kv.in_features):
                units.append(SharedAttention(sizes, width, entering, heads))
        self.hookers = nn.ModuleDict({"layers": nn.ModuleList(units)})
        if sizes.control:
            self.kwargs_encoder = ControlEncoder(sizes.control)

    @property
    def units(self) -> list[SharedAttention]:
        """Return the units: two for each transformer block."""
        return cast("list[SharedAttention]", list(cast(nn.ModuleList, self.hookers["layers"])))

    def install(self, unet: UNet) -> None:
        """Merge the units into the attentions of a UNet. `switch` puts them in place."""
        units = iter(self.units)
        for _, block in transformer_blocks(unet):
            for attention in (block.attn1, block.attn2):
                next(units).merge(attention)
        if hasattr(self, "kwargs_encoder"):
            self.kwargs_encoder.to(unet.conv_in.weight.device).float()
        unet.sharing = self

    def switch(self, unet: UNet, *, is_on: bool) -> None:
        """Replace the attentions of a UNet, or restore them. What was merged stays."""
        if is_on == self.is_on:
            return
        units = iter(self.units)
        for _, block in transformer_blocks(unet):
            for name in ("attn1", "attn2"):
                unit = next(units)
                setattr(block, name, unit.replace() if is_on else unit.restore())
        self.is_on = is_on

    @torch.no_grad()
    def set_control(self, unet: UNet, spec: Sharing) -> None:
        """Add the input image of `spec` to the tokens of all units."""
        if spec.control is None or spec.control is self._control:
            return
        signals = self.kwargs_encoder(spec.control.to(unet.conv_in.weight.device))
        units = iter(self.units)
        for level, _ in transformer_blocks(unet):
            for unit in islice(units, 2):
                if not unit.set_control(signals[level]):
                    self.spec = spec
        self._control = spec.control


def read_sharing(spec: Sharing, unet: UNet) -> SharingFile:
    """Read the units of a file for a UNet.

    Raises:
        CorruptFile: The file cannot be read.
        ModelUnusable: It does not fit the UNet, or it is for another mode.
    """
    tensors = read_tensors(spec.file.path)
    blocks = [block for _, block in transformer_blocks(unet)]
    try:
        sizes = UnitSizes.of(tensors)
        _check_kind(sizes, spec)
        content = build(lambda: SharingFile(sizes, blocks), tensors, unet.conv_in.weight.dtype)
        names = len(NamedWeights(content))
        if len(tensors) != names:
            raise ValueError(f"it has {len(tensors)} tensors, expected {names}")
    except (LookupError, TypeError, ValueError) as error:
        raise ModelUnusable(
            f"{spec.file.path} does not fit this mode and model: {error}.",
            hint="Get the file again, or use the mode that it was made for.",
        ) from None
    return content


def _check_kind(sizes: UnitSizes, spec: Sharing) -> None:
    """Check that a file is for the images of a mode. Raises `ValueError`."""
    if sizes.images != spec.images:
        raise ValueError(f"it is for {sizes.images} images together, expected {spec.images}")
    if bool(sizes.control) != (spec.control is not None):
        kind = "an" if sizes.control else "no"
        raise ValueError(f"it is for {kind} input image")


def transformer_blocks(unet: UNet) -> Iterator[tuple[int, TransformerBlock]]:
    """Iterate over level and block of each attention, in the order of the files.

    The middle comes last. Level 0 has the size of the latent.
    """
    last = len(unet.config.widths) - 1
    levels = chain(
        enumerate(unet.down_blocks),
        ((last - i, level) for i, level in enumerate(unet.up_blocks)),
        [(last, unet.mid_block)],
    )
    for number, level in levels:
        for module in level.modules():
            if isinstance(module, TransformerBlock):
                yield number, module


def share_attention(unet: UNet, spec: Sharing | None, *, is_on: bool = True) -> None:
    """Replace the attentions of a UNet, or restore them with None.

    What was read for an equal `spec` is used again. Weights of patches are merged before.

    Args:
        unet: The UNet.
        spec: What replaces its attentions.
        is_on: Whether they are replaced now. Otherwise what was read waits for the next time.

    Raises:
        CorruptFile, ModelUnusable: See `read_sharing`.
    """
    shared = cast("SharingFile | None", unet.sharing)
    if shared and shared.spec != spec:
        restore_attention(unet)
        shared = None
    if spec is None or not is_on:
        if shared:
            shared.switch(unet, is_on=False)
        return
    try:
        if shared is None:
            shared = read_sharing(spec, unet)
            shared.spec = spec
            shared.install(unet)
        shared.set_control(unet, spec)
        shared.switch(unet, is_on=True)
    except BaseException:
        restore_attention(unet)
        raise


def restore_attention(unet: UNet) -> None:
    """Restore the attentions of a UNet, and release what was read."""
    for _, block in transformer_blocks(unet):
        for name in ("attn1", "attn2"):
            if isinstance(unit := getattr(block, name), SharedAttention):
                setattr(block, name, unit.restore())
    unet.sharing = None
