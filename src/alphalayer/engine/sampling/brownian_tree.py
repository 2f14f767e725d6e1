"""Brownian-tree noise of the SDE samplers.

An image's path does not depend on the steps, the batch or the order of the queries. A Wiener
process is built on a dyadic tree of intervals, as in torchsde's `BrownianTree`: seeds come from
NumPy's `SeedSequence`, and times are rounded to six decimals. The normal values come from
`alphalayer.engine.sampling.noise`. This module is independent of the samplers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from alphalayer.core.request import NoiseSource
from alphalayer.engine.sampling.noise import Shape, randn

_POOL_SIZE = 24
_DECIMALS = 6
_CACHED_VALUES = 4
"""The next interval requests each end of an interval again. DPM++ SDE has three ends a step."""
_INTERVALS_AHEAD = 4
"""Two steps of DPM++ SDE: the current one and the next."""


@dataclass
class _Node:
    """Process over the interval [start, end]. `increment` is W(end) - W(start)."""

    start: float
    end: float
    index: int
    depth: int
    increment: Tensor
    left: _Node | None = None
    right: _Node | None = None


class BrownianTree:
    """Wiener process W over [start, end] for the images of a batch, with W(start) = 0.

    The tree keeps the nodes on the way to the latest time (about fifty tensors) and the latest
    values. Samplers query falling times. Dropped nodes are generated again from the same seeds.

    Args:
        start: Lower end of the interval.
        end: Upper end of the interval.
        shape: Shape of one image's noise.
        seeds: Seeds of the images.
        source: Kind of generator of the normal values.
        device: Device of the values.

    Source: torchsde 0.2.6, `BrownianTree`.
    """

    def __init__(
        self,
        start: float,
        end: float,
        shape: Shape,
        seeds: Sequence[int],
        source: NoiseSource,
        device: torch.device | str = "cpu",
    ):
        self._seeds, self._shape, self._device = seeds, shape, device
        self._source: NoiseSource = source
        root_seeds = [
            _derive_seed(np.random.SeedSequence(seed, pool_size=_POOL_SIZE), 3) for seed in seeds
        ]
        whole = randn(root_seeds, shape, source, device) * float(np.sqrt(end - start))
        self._root = _Node(round(start, _DECIMALS), round(end, _DECIMALS), 0, 0, whole)
        self._values: dict[float, Tensor] = {}

    def value(self, time: float) -> Tensor:
        """Return W at a time, clamped to the tree's interval: float32 (seeds, *shape)."""
        time = min(max(round(time, _DECIMALS), self._root.start), self._root.end)
        cached = self._values.pop(time, None)
        value = self._values[time] = self._walk(time) if cached is None else cached
        if len(self._values) > _CACHED_VALUES:
            del self._values[next(iter(self._values))]
        return value

    def between(self, start: float, end: float) -> Tensor:
        """Return W(end) - W(start), float32 (seeds, *shape)."""
        return self.value(end) - self.value(start)

    def _walk(self, time: float) -> Tensor:
        """Walk down to the node that begins or ends at a time, and return W there."""
        node, before = self._root, torch.zeros_like(self._root.increment)
        samples: Iterator[Tensor] | None = None
        while time not in (node.start, node.end):
            if node.left is None or node.right is None:
                # a node without halves has no split nodes below it: sample for all of them at once
                samples = samples or iter(self._sample(_find_splits(node, time)))
                node.left, node.right = _split_node(node, next(samples))
            left, right = node.left, node.right
            if time >= right.start:
                before, node, sibling = before + left.increment, right, left
            else:
                node, sibling = left, right
            sibling.left = sibling.right = None
        return before + node.increment if time == node.end else before

    def _sample(self, nodes: Sequence[tuple[int, int]]) -> Tensor:
        """Return the normal values that split nodes.

        Args:
            nodes: Index and depth of each node.

        Returns:
            float32 (nodes, seeds, *shape).
        """
        seeds = [
            _derive_seed(np.random.SeedSequence(seed, spawn_key=node, pool_size=_POOL_SIZE), 4)
            for node in nodes
            for seed in self._seeds
        ]
        return randn(seeds, self._shape, self._source, self._device).unflatten(
            0, (len(nodes), len(self._seeds))
        )


def _derive_seed(sequence: np.random.SeedSequence, words: int) -> int:
    return int(sequence.generate_state(words)[0])


def _middle(start: float, end: float) -> float:
    return round((start + end) / 2, _DECIMALS)


def _find_splits(node: _Node, time: float) -> list[tuple[int, int]]:
    """List index and depth of the nodes to split on the way down to a time."""
    start, end, index, depth = node.start, node.end, node.index, node.depth
    splits: list[tuple[int, int]] = []
    while time not in (start, end):
        splits.append((index, depth))
        middle = _middle(start, end)
        goes_right = time >= middle
        start, end = (middle, end) if goes_right else (start, middle)
        index, depth = 2 * index + goes_right, depth + 1
    return splits


def _split_node(node: _Node, sample: Tensor) -> tuple[_Node, _Node]:
    """Split a node by a Brownian bridge.

    Args:
        node: Node over [a, b].
        sample: Standard normal values, shaped like the node's increment.

    Returns:
        Nodes over [a, m] and [m, b], where m is the rounded middle.
    """
    a, m, b = node.start, _middle(node.start, node.end), node.end
    bridge = sample * float(np.sqrt((m - a) * (b - m) / (b - a)))
    left = node.increment * ((m - a) / (b - a)) + bridge
    return (
        _Node(a, m, 2 * node.index, node.depth + 1, left),
        _Node(m, b, 2 * node.index + 1, node.depth + 1, node.increment - left),
    )


class BrownianNoise:
    """Unit-variance noise between two noise levels for a batch.

    `noise(sigma, sigma_next)` is -(W(sigma) - W(sigma_next)) / sqrt(sigma - sigma_next). Inside a
    `with` block, a thread generates the next few intervals of `ahead` before they are requested.
    Other intervals are generated on request.

    Args:
        seeds: Seeds of the images.
        shape: Shape of one image's noise.
        sigmas: Noise levels of the schedule. The process spans the positive ones.
        source: Kind of generator of the normal values.
        device: Device of the noise.
        ahead: Intervals (sigma, sigma_next) in the order in which they will be requested.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Shape,
        sigmas: Tensor,
        source: NoiseSource,
        device: torch.device | str = "cpu",
        ahead: Sequence[tuple[float, float]] = (),
    ):
        low, high = float(sigmas[sigmas > 0].min()), float(sigmas.max())
        # a schedule of one step requests no noise
        self._tree = BrownianTree(low, high, shape, seeds, source, device) if low < high else None
        self._ahead = iter(ahead)
        self._pending: dict[tuple[float, float], Future[Tensor]] = {}
        # one thread only, because queries change the tree
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="brownian-noise") if ahead else None

    def __enter__(self) -> BrownianNoise:
        self._generate_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread, and release the tree and all noise."""
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
        self._pending.clear()
        self._tree = None

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """Return the noise of the step from `sigma` down to `sigma_next`.

        Returns:
            float32 (B, *shape).

        Raises:
            ValueError: The schedule has one step only.
            RuntimeError: The `with` block is over, and its thread has stopped.
        """
        if self._thread is None:
            return self._generate(sigma, sigma_next)
        pending = self._pending.pop((sigma, sigma_next), None)
        if pending is None:
            return self._thread.submit(self._generate, sigma, sigma_next).result()
        self._generate_ahead()
        return pending.result()

    def _generate_ahead(self) -> None:
        if self._thread is None:
            return
        for interval in islice(self._ahead, _INTERVALS_AHEAD - len(self._pending)):
            self._pending[interval] = self._thread.submit(self._generate, *interval)

    @torch.inference_mode()
    def _generate(self, sigma: float, sigma_next: float) -> Tensor:
        if self._tree is None:
            raise ValueError("there is no noise between equal levels, nor after the block")
        return -self._tree.between(sigma_next, sigma) / float(np.sqrt(abs(sigma - sigma_next)))
