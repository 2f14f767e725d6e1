"""Weights by their canonical names, which are those of diffusers and transformers.

A network may compute several linear layers of one input as one product. Files, patches and tests
still name each of them. This module maps the names to rows of the fused parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

NAMED = 3
"""Limit of the tensors that a message names."""
N = TypeVar("N", bound=nn.Module)


class FusedLinear(nn.Linear):
    """Linear layers of one input, computed as one product.

    Args:
        in_features: Width of the input.
        parts: Output width of each layer, by its name relative to the parent of this module.
        bias: Whether the layers have a bias.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], bias: bool = True):
        super().__init__(in_features, sum(parts.values()), bias)
        self.parts = dict(parts)


def build(
    create: Callable[[], N],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> N:
    """Return a network for inference on the CPU, with the weights of a file.

    It is created on the meta device, and never with more parameters than there are tensors.
    So a config with large numbers takes neither memory nor time.

    Args:
        create: Creates the network.
        tensors: Tensors by canonical name. Others are ignored.
        dtype: dtype of the network.
        memory_format: Order of the weights of convolutions in memory.

    Raises:
        ValueError: A tensor is missing or has another shape.
    """
    with torch.device("meta"), limit_parameters(2 * len(tensors)):
        network = create()
    weights = NamedWeights(network)
    if mismatch := weights.mismatch(tensors):
        raise ValueError(f"its tensors do not match its sizes: {mismatch}")
    weights.assign(tensors, dtype, memory_format)
    return network.eval()


@contextmanager
def limit_parameters(limit: int) -> Generator[None]:
    """Raise `ValueError` when networks get more than a number of parameters.

    A config that lies could describe a network that fills the memory. Fewer missing tensors are
    reported by their names.
    """
    count = 0

    def check(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += parameter is not None
        if count > limit:
            raise ValueError(
                f"its config describes more than {limit} weights, far more than its tensors"
            )

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class _Slot:
    """Rows of a module's parameter. None means all of them."""

    module: nn.Module
    parameter: str
    rows: slice | None = None

    def read(self) -> Tensor:
        whole = getattr(self.module, self.parameter).detach()
        return whole if self.rows is None else whole[self.rows]


class NamedWeights(Mapping[str, Tensor]):
    """View of a network's parameters by canonical name.

    A value is the parameter itself, or rows of a fused one. Writing into a value changes the
    network. Each access reads the parameter again, so the values follow the network to another
    device.
    """

    def __init__(self, network: nn.Module):
        self._slots = dict(_slots(network))

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor of a name."""
        return self._slots[name].read()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order of the modules."""
        return iter(self._slots)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._slots)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.items()}

    def mismatch(self, tensors: Mapping[str, Tensor]) -> str:
        """Describe tensors that are missing or have another shape, or return ""."""
        problems = [
            f"{name} is missing"
            if name not in tensors
            else f"{name} has the shape {by_sides(tensors[name].shape)}, expected {by_sides(shape)}"
            for name, shape in self.shapes().items()
            if name not in tensors or tuple(tensors[name].shape) != shape
        ]
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        return ", ".join(problems[:NAMED]) + more

    def assign(
        self,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Replace all parameters of the network, which may be on the meta device.

        Args:
            tensors: Tensors of exactly these names and shapes, of any floating dtype.
            dtype: dtype of the new parameters. A tensor that has it is used without a copy.
            memory_format: Order of the weights of convolutions in memory.
        """
        names: dict[tuple[nn.Module, str], list[str]] = {}
        for name, slot in self._slots.items():
            names.setdefault((slot.module, slot.parameter), []).append(name)
        for (module, parameter), parts in names.items():
            values = [tensors[name] for name in parts]
            value, shape = values[0], getattr(module, parameter).shape
            order = memory_format if len(shape) == 4 else torch.contiguous_format
            if (
                len(values) > 1
                or value.dtype != dtype
                or not value.is_contiguous(memory_format=order)
            ):
                # copied once: tensors in between would leave gaps in memory
                value = torch.empty(shape, dtype=dtype, memory_format=order)
                for rows, part in zip(value.split([*map(len, values)]), values, strict=True):
                    rows.copy_(part)
            setattr(module, parameter, nn.Parameter(value, requires_grad=False))


def _slots(network: nn.Module) -> Iterator[tuple[str, _Slot]]:
    for path, module in network.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            if isinstance(module, FusedLinear):
                prefix, first = path.rpartition(".")[0], 0
                for part, width in module.parts.items():
                    name = ".".join(filter(None, (prefix, part, parameter)))
                    yield name, _Slot(module, parameter, slice(first, first + width))
                    first += width
            else:
                yield f"{path}.{parameter}".lstrip("."), _Slot(module, parameter)


def by_sides(shape: Sequence[int] | None) -> str:
    """Describe a shape as 3x4, or "absent" for None."""
    return "absent" if shape is None else "x".join(map(str, shape)) or "scalar"
