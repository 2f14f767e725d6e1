"""Changes of a weight: LoRA, full differences, and the forms of LyCORIS and DoRA.

Source: Hu et al. 2021, "LoRA", arXiv 2106.09685. Yeh et al. 2023, "LyCORIS", arXiv 2309.14859
(LoCon, LoHa, LoKr, IA3). Chavan et al. 2023, "GLoRA", arXiv 2306.07967. Liu et al. 2024, "DoRA",
arXiv 2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Change(Protocol):
    """Change of one parameter W."""

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return the changed weight.

        Args:
            weight: float32, of any shape. It does not change.
            strength: Factor of the change.

        Returns:
            float32, shaped like `weight`.
        """
        ...

    def fits(self, weight: Tensor) -> bool:
        """Check whether the shape of a weight matches."""
        ...


@dataclass(frozen=True)
class Delta:
    """LoRA, full difference or replacement.

    With `down` it adds `scale * up @ down`, else `scale * up`. With `replaces`, W becomes `up`, and
    the strength has no effect.
    """

    up: Tensor
    down: Tensor | None = None
    scale: float = 1.0
    replaces: bool = False

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return the changed weight; see `Change`."""
        up = self.up.to(weight.device, torch.float32)
        if self.replaces:
            return up.reshape(weight.shape).clone()
        if self.down is not None:
            up = up.flatten(1) @ self.down.to(weight.device, torch.float32).flatten(1)
        return weight + strength * self.scale * up.reshape(weight.shape)

    def fits(self, weight: Tensor) -> bool:
        """Check whether the shape of a weight matches."""
        if self.down is None:
            return _without_ones(self.up) == _without_ones(weight)
        if min(self.up.ndim, self.down.ndim, weight.ndim) < 2 or not len(self.down):
            return False
        return (
            self.up.shape[0] == weight.shape[0]
            and self.up[0].numel() == len(self.down)
            and self.down[0].numel() * weight.shape[0] == weight.numel()
        )


Factors = Mapping[str, Tensor]
"""Tensors of a change by their names in its formula."""


@dataclass(frozen=True)
class Factored:
    """Change that a formula computes from several tensors.

    Without a magnitude it adds `strength * scale * formula`. With one (DoRA), the sum of W and the
    whole change gets that magnitude, and `strength` mixes W with the result.

    Attributes:
        factors: Tensors of the formula.
        formula: Returns the change, of any shape with the numbers of W in their order.
        scale: Factor of the formula's result.
        magnitude: One number for each row of W along `axis`.
        axis: 0: outputs of W; 1: inputs.
    """

    factors: Factors
    formula: Callable[[Factors, Tensor], Tensor]
    scale: float = 1.0
    magnitude: Tensor | None = None
    axis: int = 0

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return the changed weight; see `Change`."""
        factors = {
            name: factor.to(weight.device, torch.float32) for name, factor in self.factors.items()
        }
        change = self.scale * self.formula(factors, weight).reshape(weight.shape)
        if self.magnitude is None:
            return weight + strength * change
        sides = [1] * weight.ndim
        sides[self.axis] = -1
        magnitude = self.magnitude.to(weight.device, torch.float32).reshape(sides)
        merged = weight + change
        others = [axis for axis in range(weight.ndim) if axis != self.axis]
        norm = torch.linalg.vector_norm(merged, dim=others, keepdim=True)
        return weight + strength * (merged * (magnitude / norm.clamp_min(1e-30)) - weight)

    def fits(self, weight: Tensor) -> bool:
        """Check whether the shape of a weight matches. Nothing is computed."""
        try:
            # in float32, as in `apply`, where tensors of two dtypes would not multiply
            shape = self.formula(
                {name: _shape_of(factor) for name, factor in self.factors.items()},
                _shape_of(weight),
            ).shape
        except (RuntimeError, IndexError):
            return False
        if not weight.ndim or not shape or shape[0] != weight.shape[0]:
            return False
        rows = weight.shape[self.axis] if self.axis < weight.ndim else 0
        return shape.numel() == weight.numel() and (
            self.magnitude is None or (self.magnitude.numel() == rows > 0 and weight.ndim > 1)
        )


def low_rank(factors: Factors, _weight: Tensor) -> Tensor:
    """Return LoRA's product: up @ down, or up @ mid @ down."""
    up, down = factors["up"].flatten(1), factors["down"]
    if "mid" in factors:
        return _tucker(factors["mid"], up.T, down.flatten(1))
    return up @ down.flatten(1)


def hadamard(factors: Factors, _weight: Tensor) -> Tensor:
    """Return LoHa's product: two low-rank matrices, multiplied number by number."""
    first, second = (
        _tucker(factors[f"t{i}"], factors[f"w{i}_a"], factors[f"w{i}_b"])
        if f"t{i}" in factors
        else factors[f"w{i}_a"] @ factors[f"w{i}_b"]
        for i in (1, 2)
    )
    return first * second


def kronecker(factors: Factors, _weight: Tensor) -> Tensor:
    """Return LoKr's Kronecker product. Each matrix is whole or of low rank."""
    first = factors.get("w1")
    if first is None:
        first = factors["w1_a"] @ factors["w1_b"]
    second = factors.get("w2")
    if second is None and "t2" in factors:
        second = _tucker(factors["t2"], factors["w2_a"], factors["w2_b"])
    if second is None:
        second = factors["w2_a"] @ factors["w2_b"]
    return torch.kron(first, second.flatten(1))


def generalized(factors: Factors, weight: Tensor) -> Tensor:
    """Return GLoRA's change: W A + B, with A and B of low rank."""
    a1, a2, b1, b2 = (factors[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if len(b1) != weight.shape[0] or b1.shape[1] != len(b2):
        # earlier versions of LyCORIS named the factors the other way round
        a1, a2, b1, b2 = a2, a1, b2, b1
    return torch.einsum("oi...,ij->oj...", weight, a1 @ a2) + (b1 @ b2).reshape(weight.shape)


def per_output(factors: Factors, weight: Tensor) -> Tensor:
    """Return IA3's change: each output times its number."""
    return weight * _along(factors["vector"], weight, 0)


def per_input(factors: Factors, weight: Tensor) -> Tensor:
    """Return IA3's change: each input times its number."""
    return weight * _along(factors["vector"], weight, 1)


def _along(vector: Tensor, weight: Tensor, axis: int) -> Tensor:
    if vector.numel() != weight.shape[axis]:
        raise IndexError("another number of rows")
    return vector.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, device="meta")


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return a convolution (o, i, ...) from three parts.

    Args:
        core: (m, n, ...).
        left: (m, o).
        right: (n, i).

    Raises:
        IndexError: m or n is larger than o and i. A small file could fill the memory.
    """
    product = torch.einsum("mn...,mo,ni->oi...", core, left, right)
    if max(core.shape[:2]) > max(product.shape[:2]):
        raise IndexError("more ranks than rows")
    return product


def _without_ones(tensor: Tensor) -> list[int]:
    """Return a shape without sides of 1 at its end.

    A 1x1 convolution is a linear layer.
    """
    shape = [*tensor.shape]
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return shape
