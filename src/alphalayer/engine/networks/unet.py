"""UNet of Stable Diffusion: the denoiser of SDXL and of SD 1.5, in any width and depth.

Parameter names are those of diffusers.

Source: Rombach et al. 2022, arXiv 2112.10752. Podell et al. 2023, "SDXL", arXiv 2307.01952.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphalayer.engine.networks.blocks import Downsample, ResnetBlock, Upsample
from alphalayer.engine.networks.weights import FusedLinear

MAX_PERIOD = 10_000


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet. Tuples have one entry for each level, the finest first."""

    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    resnets: int
    """Residual blocks of a level on the way down. There is one more on the way up."""
    depths: tuple[int, ...]
    """Transformer blocks after each residual block. 0: a level without attention."""
    middle_depth: int
    heads: tuple[int, ...]
    context: int
    """Width of the encoded text."""
    groups: int = 32
    pooled: int = 0
    """Width of the pooled text. 0: the network is conditioned on neither it nor sizes."""
    size_width: int = 0
    """Width of the embedding of each of the six sizes."""
    conv_projections: bool = False
    """Whether 1x1 convolutions surround the transformer blocks. Otherwise linear layers do."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read the sizes from a config of diffusers' `UNet2DConditionModel`."""
        widths = tuple(config["block_out_channels"])
        depths = _by_level(config.get("transformer_layers_per_block", 1), len(widths))
        size_width = config.get("addition_time_embed_dim") or 0
        added = config.get("projection_class_embeddings_input_dim") or 0
        return cls(
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            widths=widths,
            resnets=config["layers_per_block"],
            depths=tuple(
                depth if kind.startswith("CrossAttn") else 0
                for depth, kind in zip(depths, config["down_block_types"], strict=True)
            ),
            middle_depth=depths[-1],
            # despite its name, this entry of diffusers' configs is the number of heads
            heads=_by_level(config["attention_head_dim"], len(widths)),
            context=config["cross_attention_dim"],
            groups=config.get("norm_num_groups", 32),
            pooled=added - SIZES * size_width if added else 0,
            size_width=size_width,
            conv_projections=not config.get("use_linear_projection", False),
        )


SIZES = 6
"""Height and width of the original, top and left of the crop, height and width of the image."""


def _by_level(value: int | Sequence[int], levels: int) -> tuple[int, ...]:
    return (value,) * levels if isinstance(value, int) else tuple(value)


@dataclass(frozen=True)
class Prepared:
    """Values that the network derives from text and sizes. They are the same at all steps."""

    keys_values: tuple[Tensor, ...]
    """Keys and values of each cross-attention (2, B, heads, tokens, head width)."""
    added: Tensor | None
    """Embedding of pooled text and sizes (B, time width)."""
    frequencies: Tensor
    """Frequencies of the time embedding (widths[0] / 2,), float32."""

    def rows(self, rows: slice) -> Prepared:
        """Return some of the rows."""
        return Prepared(
            tuple(pair[:, rows] for pair in self.keys_values),
            None if self.added is None else self.added[rows],
            self.frequencies,
        )

    def clone(self) -> Prepared:
        """Return a copy in memory of its own."""
        added = None if self.added is None else self.added.clone()
        return Prepared(
            tuple(pair.clone() for pair in self.keys_values), added, self.frequencies.clone()
        )

    def copy_(self, other: Prepared) -> None:
        """Overwrite the values by those of another instance of the same shapes."""
        for pair, values in zip(self.keys_values, other.keys_values, strict=True):
            pair.copy_(values)
        if self.added is not None and other.added is not None:
            self.added.copy_(other.added)


class UNet(nn.Module):
    """Network from noisy latents, noise level and text to what the model predicts."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        first, time_width = config.widths[0], 4 * config.widths[0]
        self.config = config
        self.sharing: nn.Module | None = None
        """What replaces its attentions, see `engine.transparency.attention_sharing`."""
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = _Embedding(first, time_width)
        if config.pooled:
            added = config.pooled + SIZES * config.size_width
            self.add_embedding = _Embedding(added, time_width)
        width, skips, last = first, [first], len(config.widths) - 1
        self.down_blocks = nn.ModuleList()
        for i, out in enumerate(config.widths):
            entering = [width, *[out] * (config.resnets - 1)]
            self.down_blocks.append(_Level(config, i, entering, [config.depths[i]] * len(entering)))
            skips += [out] * config.resnets
            if i < last:
                self.down_blocks[i].downsamplers = nn.ModuleList([Downsample(out)])
                skips.append(out)
            width = out
        self.mid_block = _Level(config, last, [width, width], [config.middle_depth])
        self.up_blocks = nn.ModuleList()
        for i, out in reversed(list(enumerate(config.widths))):
            entering = [own + skips.pop() for own in (width, *[out] * config.resnets)]
            self.up_blocks.append(_Level(config, i, entering, [config.depths[i]] * len(entering)))
            if i > 0:
                self.up_blocks[-1].upsamplers = nn.ModuleList([Upsample(out)])
            width = out
        self.conv_norm_out = nn.GroupNorm(config.groups, first, 1e-5)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)
        # the shifts of all residual blocks depend on the time embedding alone: one product
        self.time_projections = FusedLinear(
            time_width,
            {
                f"{path}.time_emb_proj": module.conv1.out_channels
                for path, module in self.named_modules()
                if isinstance(module, ResnetBlock)
            },
        )

    def prepare(self, context: Tensor, pooled: Tensor, sizes: Sequence[int]) -> Prepared:
        """Compute what is the same at all steps.

        Args:
            context: Encoded text (B, tokens, context width).
            pooled: Pooled text (B, pooled width). A network without this condition ignores it.
            sizes: The six sizes in pixels, see `SIZES`.
        """
        added = None
        if self.config.pooled:
            numbers = torch.tensor(sizes, dtype=torch.float32, device=context.device)
            frequencies = _frequencies(self.config.size_width, context.device)
            embedded = _sinusoids(numbers, frequencies).flatten().to(pooled.dtype)
            added = self.add_embedding(torch.cat([pooled, embedded.expand(len(pooled), -1)], -1))
        return Prepared(
            tuple(
                block.attn2.keys_values(context)
                for block in self.modules()
                if isinstance(block, TransformerBlock)
            ),
            added,
            _frequencies(self.config.widths[0], context.device),
        )

    def forward(
        self, x: Tensor, timestep: Tensor, prepared: Prepared, condition: Tensor | None = None
    ) -> Tensor:
        """Run the network.

        Args:
            x: Scaled noisy latents (B, in_channels, h, w).
            timestep: Training step (1,), float32.
            prepared: Text and sizes of the rows.
            condition: Values to add to the output of the first convolution (B, widths[0], h, w).

        Returns:
            Output (B, out_channels, h, w).
        """
        time = self.time_embedding(_sinusoids(timestep, prepared.frequencies).to(x.dtype))
        if prepared.added is not None:
            time = time + prepared.added
        projected = self.time_projections(F.silu(time))[..., None, None]
        shifts = iter(projected.split(list(self.time_projections.parts.values()), dim=1))
        texts = iter(prepared.keys_values)

        h = self.conv_in(x)
        if condition is not None:
            h = h + condition
        skips = [h]
        for level in _levels(self.down_blocks):
            for resnet, attention in level.layers():
                h = resnet(h, next(shifts))
                h = attention(h, texts) if attention else h
                skips.append(h)
            for downsample in level.downsamplers:
                h = downsample(h)
                skips.append(h)
        for resnet, attention in self.mid_block.layers():
            h = resnet(h, next(shifts))
            h = attention(h, texts) if attention else h
        for level in _levels(self.up_blocks):
            for resnet, attention in level.layers():
                h = resnet(torch.cat([h, skips.pop()], dim=1), next(shifts))
                h = attention(h, texts) if attention else h
            for upsample in level.upsamplers:
                h = upsample(h, skips[-1].shape[-2:])
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class _Level(nn.Module):
    """Blocks of one resolution: residual blocks, with transformers after all or the first ones."""

    def __init__(self, config: UNetConfig, i: int, entering: Sequence[int], depths: Sequence[int]):
        super().__init__()
        width, groups = config.widths[i], config.groups
        self.resnets = nn.ModuleList(ResnetBlock(own, width, groups) for own in entering)
        self.attentions = nn.ModuleList(
            _Transformer(config, width, config.heads[i], depth) for depth in depths if depth
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def layers(self) -> Iterator[tuple[ResnetBlock, _Transformer | None]]:
        """Iterate over the residual blocks, each with its transformer or None."""
        yield from cast(Any, zip_longest(self.resnets, self.attentions))


def _levels(blocks: nn.ModuleList) -> Iterator[_Level]:
    yield from cast(Any, blocks)


class _Embedding(nn.Module):
    """Two linear layers that embed the time, or pooled text with sizes."""

    def __init__(self, entering: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(entering, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class _Transformer(nn.Module):
    """Transformer blocks over the positions of an image, added to their input."""

    def __init__(self, config: UNetConfig, width: int, heads: int, depth: int):
        super().__init__()
        project = partial(nn.Conv2d, kernel_size=1) if config.conv_projections else nn.Linear
        self.norm = nn.GroupNorm(config.groups, width, 1e-6)
        self.proj_in = project(width, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, config.context) for _ in range(depth)
        )
        self.proj_out = project(width, width)

    def forward(self, x: Tensor, texts: Iterator[Tensor]) -> Tensor:
        b, c, h, w = x.shape
        tokens = _project(self.proj_in, self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c))
        for block in self.transformer_blocks:
            tokens = block(tokens, next(texts))
        return x + _project(self.proj_out, tokens).reshape(b, h, w, c).permute(0, 3, 1, 2)


def _project(layer: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
    """Apply a linear layer, or a 1x1 convolution as one, to (B, tokens, width)."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, and a gated feed-forward network."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = CrossAttention(width, heads, context)
        self.norm3 = nn.LayerNorm(width)
        self.ff = _FeedForward(width)

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """Return tokens (B, positions, width) of x, with keys and values of the text."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), keys_values)
        return x + self.ff(self.norm3(x))


class SelfAttention(nn.Module):
    """Attention between the positions of an image."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = FusedLinear(width, dict.fromkeys(("to_q", "to_k", "to_v"), width), bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, positions, width), shaped like x."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, positions, 3, heads, width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, positions, width)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of the positions of an image to the tokens of a text."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = FusedLinear(context, dict.fromkeys(("to_k", "to_v"), width), bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def keys_values(self, context: Tensor) -> Tensor:
        """Return the keys and values of a text (B, tokens, width).

        Their shape is (2, B, heads, tokens, head width).
        """
        pair = self.to_kv(context).unflatten(-1, (2, self.heads, -1))
        return pair.permute(2, 0, 3, 1, 4).contiguous()

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """Return tokens (B, positions, width) of x, with what `keys_values` returned."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = keys_values.unbind()
        attended = F.scaled_dot_product_attention(q, keys, values)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """Gated linear layer to four times the width, and one back. `Identity` keeps file names."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            _GatedGelu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _GatedGelu(nn.Module):
    """Linear layer, multiplied by the GELU of another one."""

    def __init__(self, entering: int, width: int):
        super().__init__()
        self.proj = nn.Linear(entering, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * F.gelu(gate)


def _frequencies(width: int, device: torch.device) -> Tensor:
    half = width // 2
    exponents = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=device)
    return (exponents / half).exp()


def _sinusoids(numbers: Tensor, frequencies: Tensor) -> Tensor:
    """Embed numbers (n,) as cosines and sines (n, width), float32."""
    angles = numbers[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
