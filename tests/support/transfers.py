"""Record of the operations that copy values to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_CONSTRUCTORS = (torch.tensor, torch.as_tensor, torch.asarray)


class Transfers(TorchFunctionMode):
    """Recorder of the operations that copy from the CPU to another device.

    The device may be "meta". There a read of a value on the CPU raises, so no operation that waits
    for a device stays unnoticed. A dispatch mode does not see what `torch.tensor` copies.

    Attributes:
        operations: Names of the operations, in order.
    """

    def __init__(self):
        super().__init__()
        self.operations: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and record it if its values are on two devices."""
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        if len(devices | ({"cpu"} if func in _CONSTRUCTORS else set())) > 1:
            self.operations.append(func.__name__)
        return result
