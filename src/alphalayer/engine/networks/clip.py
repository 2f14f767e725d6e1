"""CLIP's text model: OpenAI's ViT-L, OpenCLIP's ViT-bigG and smaller ones.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision", arXiv 2103.00020. Parameter names are those of transformers' `CLIPTextModel`. The
projection has the name `text_projection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from alphalayer.engine.networks.weights import FusedLinear

Learned = Sequence[tuple[int, int, Tensor]]
"""Vectors that replace token embeddings: row, first position, (n, width)."""


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}


class ClipTextModel(nn.Module):
    """Causal transformer over token ids, optionally with a projection of its pooled output.

    It computes in float32, also with weights in 16 bit. Each layer widens its weights for a call.

    Args:
        vocabulary: Number of token ids.
        positions: Limit of the length of a row.
        width: Width of the hidden states.
        inner_width: Width inside the feed-forward layers.
        layers: Number of layers.
        heads: Attention heads of each layer.
        projection: Width of the pooled output. None: without a projection.
        activation: Key of `ACTIVATIONS`.
        eps: Added to the variance in each LayerNorm.
        end: Token id whose first position is pooled. None pools the position of the largest id,
            which is the end token in CLIP's vocabulary.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        positions: int,
        width: int,
        inner_width: int,
        layers: int,
        heads: int,
        projection: int | None = None,
        activation: str = "quick_gelu",
        eps: float = 1e-5,
        end: int | None = None,
    ):
        super().__init__()
        self.width, self.end = width, end
        self.embeddings = _Embeddings(vocabulary, positions, width)
        self.encoder = _Encoder(
            _Layer(width, inner_width, heads, activation, eps) for _ in range(layers)
        )
        self.final_layer_norm = nn.LayerNorm(width, eps)
        self.text_projection = (
            None if projection is None else nn.Linear(width, projection, bias=False)
        )

    def forward(self, ids: Tensor, layer: int = 1, learned: Learned = ()) -> Tensor:
        """Return the hidden states of a layer, without the final norm: (B, T, width).

        Later layers are not computed.

        Args:
            ids: Token ids (B, T).
            layer: Layer counted from the last, which is 1. A model with fewer layers returns its
                embeddings.
            learned: Vectors that replace token embeddings.
        """
        x = self.embeddings(ids, learned)
        for block in self.encoder.layers[: self._first_after(layer)]:
            x = _in_float32(block, x)
        return x

    def norm(self, hidden: Tensor) -> Tensor:
        """Return hidden states (B, T, width) after the final norm."""
        return _in_float32(self.final_layer_norm, hidden)

    def pool(self, hidden: Tensor, ids: Tensor, layer: int = 1) -> Tensor:
        """Return the pooled output of hidden states: (B, projection width).

        Args:
            hidden: Hidden states (B, T, width) that `forward` returned for this layer.
            ids: Token ids (B, T).
            layer: As in `forward`. The layers after it are computed here.
        """
        for block in self.encoder.layers[self._first_after(layer) :]:
            hidden = _in_float32(block, hidden)
        ends = (ids if self.end is None else (ids == self.end).int()).argmax(dim=-1)
        rows = torch.arange(len(ids), device=ids.device)
        pooled = self.norm(hidden[rows, ends])
        if self.text_projection is None:
            return pooled
        return _in_float32(self.text_projection, pooled)

    def _first_after(self, layer: int) -> int:
        return max(len(self.encoder.layers) + 1 - layer, 0)


def _in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module with its weights in float32. Others are copied for the call."""
    weights = {name: weight.float() for name, weight in module.named_parameters()}
    return functional_call(module, weights, x)


class _Embeddings(nn.Module):
    """Embeddings of tokens plus those of their positions."""

    def __init__(self, vocabulary: int, positions: int, width: int):
        super().__init__()
        self.token_embedding = _Table(vocabulary, width)
        self.position_embedding = _Table(positions, width)

    def forward(self, ids: Tensor, learned: Learned) -> Tensor:
        x = F.embedding(ids, self.token_embedding.weight).float()  # (B, T, width)
        for row, first, vectors in learned:
            x[row, first : first + len(vectors)] = vectors.to(x)
        return x + self.position_embedding.weight[: ids.shape[1]]


class _Table(nn.Module):
    """Rows of an embedding, without initial values.

    On the meta device those of `nn.Embedding` would import torch's compiler, which takes seconds.
    """

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))


class _Encoder(nn.Module):
    """Layers, under the names that files use."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class _Layer(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a norm and added to its input."""

    def __init__(self, width: int, inner_width: int, heads: int, activation: str, eps: float):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = _Attention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = _Mlp(width, inner_width, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    """Self-attention of each position to itself and the positions before it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = FusedLinear(width, {"q_proj": width, "k_proj": width, "v_proj": width})
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, width/heads)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, inner_width: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(width, inner_width)
        self.activation = ACTIVATIONS[activation]
        self.fc2 = nn.Linear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))
