"""Memory of an image, counted from the shapes of a model's networks.

The networks run on the meta device, which computes shapes only. A count includes the weights and
the activations of each stage. It does not include the context of the device, workspaces of
libraries or fragmentation. `memory.MARGIN_GIB` is for these.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alphalayer.engine.canvas import Canvas
from alphalayer.engine.families.base import DiffusionModel
from alphalayer.engine.families.vae import Vae
from alphalayer.engine.memory import MemoryMode
from alphalayer.engine.networks.clip import ClipTextModel
from alphalayer.engine.networks.transparent import TransparentDecoder
from alphalayer.engine.networks.unet import SIZES, UNet
from alphalayer.engine.transparency.decode import (
    choose_passes,
    decode_transparent,
    decoder_inputs,
)

Stage = Literal["text", "inputs", "sample", "vae", "decode"]
LAYER = 2
"""Layer of the text encoders that SDXL reads, counted from the last."""
TOKENS = 77
"""Tokens of a text of one chunk."""
CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.conv2d)
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Networks:
    """Networks of a model on any device. Only shapes and dtypes are read."""

    text: Sequence[ClipTextModel]
    denoiser: UNet
    vae: Vae
    decoder: TransparentDecoder | None
    """None: the images are opaque."""

    @classmethod
    def of(cls, model: DiffusionModel, transparent: bool) -> Networks:
        """Return the networks of a model. Raises what reading the decoder raises."""
        return cls(
            cast(Sequence[ClipTextModel], model.modules["text"]),
            cast(UNet, model.modules["denoiser"]),
            cast(Vae, model.modules["vae"]),
            model.decoder if transparent else None,
        )


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the device in one stage: weights, and activations at their peak."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        """Return the sum in bytes."""
        return self.weights + self.activations


def count_memory(
    networks: Networks,
    width: int,
    height: int,
    images: int,
    mode: MemoryMode,
    device: torch.device,
    together: int = 1,
) -> dict[Stage, StageMemory]:
    """Count the memory of each stage of a request with guidance.

    Counts are those of a later image: the weights that the mode keeps are on the device already.

    Args:
        networks: Networks of the model.
        width: Width of an image in pixels.
        height: Height of an image in pixels.
        images: Images that are generated together. Guidance doubles the rows.
        mode: Memory mode.
        device: Where the stages run. A CPU holds all weights in every mode.
        together: Images that attend to each other.
    """
    canvas = Canvas.of(width, height)
    activations = _activations(networks, canvas, images, mode, device, together)
    decoders = [networks.vae, *([networks.decoder] if networks.decoder else [])]
    used: Mapping[Stage, Sequence[nn.Module]] = {
        "text": networks.text,
        "inputs": [networks.vae],
        "sample": [networks.denoiser],
        "vae": decoders,
        "decode": decoders,
    }
    on_cpu = device.type == "cpu"
    kept: list[nn.Module] = [
        *(networks.text if mode.keep_text or on_cpu else ()),
        *([networks.denoiser, *decoders] if mode.keep_unet or on_cpu else ()),
    ]
    return {
        stage: StageMemory(sum(map(_weight_bytes, {*kept, *used[stage]})), peak)
        for stage, peak in activations.items()
    }


def _activations(
    networks: Networks,
    canvas: Canvas,
    images: int,
    mode: MemoryMode,
    device: torch.device,
    together: int,
) -> dict[Stage, int]:
    """Return the bytes of activations by stage. They include the inputs of the stage."""
    width, height = canvas.full_width, canvas.full_height
    text = [_on_meta(encoder) for encoder in networks.text]
    unet, vae = _on_meta(networks.denoiser), _on_meta(networks.vae)
    rgb, latent = (3, height, width), (vae.latent_channels, height // vae.cell, width // vae.cell)
    at_once = mode.rows_at_once(width, height, together)
    dtype = next(vae.parameters()).dtype
    peaks: dict[Stage, int] = {
        "text": _peak(lambda: _encode_text(text)),
        "inputs": _peak(lambda: vae.encode(torch.empty(1, *rgb, dtype=dtype))),
        "sample": _peak(lambda: _denoise(unet, latent, 2 * images, at_once)),
        "vae": _peak(lambda: vae.decode(torch.empty(1, *latent, dtype=dtype)).float()),
    }
    if networks.decoder:
        passes = mode.passes_at_once
        if device.type == "cpu":
            passes = choose_passes(networks.decoder, torch.empty(1, *rgb, device="meta"), passes)
        decoder = _on_meta(networks.decoder)
        peaks["decode"] = _peak(lambda: _decode(decoder, rgb, latent, passes))
    return peaks


def _encode_text(encoders: Sequence[ClipTextModel]) -> None:
    """Encode a text of one chunk and an empty negative prompt.

    See `TextEncoders`.
    """
    ids = torch.zeros(1, len(encoders[0].embeddings.position_embedding.weight)).long()
    hidden = [encoder(ids, LAYER) for encoder in encoders]
    pooled = encoders[-1].pool(hidden[-1], ids, LAYER)
    context = torch.cat(hidden, dim=-1)
    _empty = torch.zeros_like(context), torch.zeros_like(pooled)


def _denoise(unet: UNet, latent: Sequence[int], rows: int, at_once: int) -> None:
    """Evaluate the denoiser once, with the prepared text of all rows.

    See `Denoiser`.
    """
    dtype, config = unet.conv_in.weight.dtype, unet.config
    prepared = unet.prepare(
        torch.empty(rows, TOKENS, config.context, dtype=dtype),
        torch.empty(rows, config.pooled, dtype=dtype),
        (0,) * SIZES,
    )
    x = torch.empty(rows, *latent)[:at_once].to(dtype)
    unet(x, torch.empty(1), prepared.rows(slice(at_once))).float()


def _decode(
    decoder: TransparentDecoder, rgb: Sequence[int], latent: Sequence[int], passes: int
) -> None:
    """Decode one image, see `compose_transparent`."""
    pixel, own = decoder_inputs(torch.empty(1, *rgb), torch.empty(1, *latent), 1.0, "official")
    decode_transparent(decoder, pixel, own, passes)


def _on_meta(network: N) -> N:
    """Return a copy of a network whose weights are on the meta device."""
    weights = chain(network.parameters(), network.buffers())
    shapes = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        for weight in weights
    }
    return copy.deepcopy(network, cast(dict[int, Any], shapes))


def _weight_bytes(network: nn.Module) -> int:
    return sum(weight.nbytes for weight in network.parameters())


def _peak(call: Callable[[], object]) -> int:
    """Return the peak of live bytes that a call allocates on the meta device."""
    with torch.no_grad(), torch.device("meta"), _FusedAttention(), _LiveBytes() as live:
        call()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations of a block allocated and that are alive."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        entering = _storages((args, kwargs))
        for key, storage in _storages(result).items():
            if key not in entering and key not in self._storages:
                self._add(key, storage)
        # oneDNN copies the weights of a convolution into another order for each call
        is_convolution = function.overloadpacket in CONVOLUTIONS
        self.peak = max(self.peak, self._now + (args[1].nbytes if is_convolution else 0))
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def release(_: object) -> None:
            del self._storages[key]
            self._now -= size

        self._storages[key] = weakref.ref(storage, release)
        self._now += size


def _storages(values: object) -> dict[int, torch.UntypedStorage]:
    """Return the storages of all tensors in nested values by identity."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return {id(storage): storage for storage in storages}


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels allocate it: no matrix of all pairs of positions.

    The meta device would run the plain form.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, _, v = args
        batch, heads, positions, _ = q.shape
        _sums = q.new_empty(batch, heads, positions, dtype=torch.float32)  # of the softmax
        return q.new_empty(batch, positions, heads, v.shape[-1]).transpose(1, 2)
