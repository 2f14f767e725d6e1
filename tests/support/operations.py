"""Counts of torch's operations, on the meta device where no GPU is at hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NO_LAUNCH = {"aten::_unsafe_view", "aten::detach", "aten::_reshape_alias"}
_LIBRARY = torch.library.Library("alphalayer_tests", "DEF")
_LIBRARY.define("flash_attention(Tensor q, Tensor k, Tensor v) -> Tensor")


class OperationCounter(TorchDispatchMode):
    """Counter of the operations of a block that would launch a kernel on a GPU, by name."""

    def __init__(self):
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function._schema.name
        if not function.is_view and name not in _NO_LAUNCH:
            self.launches[name] += 1
        return function(*args, **(kwargs or {}))


@torch.library.impl(_LIBRARY, "flash_attention", "Meta")
def _flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return a result in the memory layout of flash attention: (B, positions, heads, width)."""
    b, heads, positions, width = q.shape
    return q.new_empty(b, positions, heads, width).transpose(1, 2)


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Stand for `scaled_dot_product_attention` on the meta device, as one operation."""
    return torch.ops.alphalayer_tests.flash_attention(q, k, v)
