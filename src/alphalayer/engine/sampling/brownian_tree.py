"""Brownian-tree noise of the SDE samplers: the same path of an image whatever the steps, the batch and the order of queries.

A Wiener process on a dyadic tree of intervals, as torchsde's `BrownianTree` builds it (seeds by numpy's `SeedSequence`, times rounded to
six decimals), with the normal draws of `alphalayer.engine.sampling.noise`. Knows nothing of samplers.
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
_VALUES_KEPT = 4
"""Each end of an interval is asked for again with the next one; DPM++ SDE has three."""
_INTERVALS_AHEAD = 4
"""Two steps of DPM++ SDE: one that goes on and the next."""


@dataclass
class _Node:
    """The process over the interval [start, end]; `increment` is W(end) - W(start)."""

    start: float
    end: float
    index: int
    depth: int
    increment: Tensor
    left: _Node | None = None
    right: _Node | None = None


class BrownianTree:
    """W over [start, end] for the images of a batch; `value(t)` is W(t), float32 (seeds, *shape) with W(start) = 0.

    Only the way to the last time asked for is kept (about fifty tensors) and the last few values: a sampler asks downwards, and what
    was dropped is drawn again, with the same seeds, if it is asked for.
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
        firsts = [
            _generated(np.random.SeedSequence(seed, pool_size=_POOL_SIZE), 3) for seed in seeds
        ]
        whole = randn(firsts, shape, source, device) * float(np.sqrt(end - start))
        self._root = _Node(round(start, _DECIMALS), round(end, _DECIMALS), 0, 0, whole)
        self._values: dict[float, Tensor] = {}

    def value(self, time: float) -> Tensor:
        """W at a time, clamped to the tree's interval."""
        at = min(max(round(time, _DECIMALS), self._root.start), self._root.end)
        known = self._values.pop(at, None)
        value = self._values[at] = self._walk(at) if known is None else known
        if len(self._values) > _VALUES_KEPT:
            del self._values[next(iter(self._values))]
        return value

    def between(self, start: float, end: float) -> Tensor:
        """W(end) - W(start)."""
        return self.value(end) - self.value(start)

    def _walk(self, time: float) -> Tensor:
        """Down to the node that begins or ends at a time of the tree's interval."""
        node, before = self._root, torch.zeros_like(self._root.increment)
        drawn: Iterator[Tensor] | None = None
        while time not in (node.start, node.end):
            if node.left is None or node.right is None:
                # below a node without halves none has any: what all of them need is drawn in one go
                drawn = drawn or iter(self._render(_splits(node, time)))
                node.left, node.right = _halves(node, next(drawn))
            left, right = node.left, node.right
            if time >= right.start:
                before, node, aside = before + left.increment, right, left
            else:
                node, aside = left, right
            aside.left = aside.right = None
        return before + node.increment if time == node.end else before

    def _render(self, nodes: Sequence[tuple[int, int]]) -> Tensor:
        """Normal values for splitting nodes, told by index and depth: (nodes, seeds, *shape)."""
        seeds = [
            _generated(np.random.SeedSequence(seed, spawn_key=node, pool_size=_POOL_SIZE), 4)
            for node in nodes
            for seed in self._seeds
        ]
        return randn(seeds, self._shape, self._source, self._device).unflatten(
            0, (len(nodes), len(self._seeds))
        )


def _generated(sequence: np.random.SeedSequence, words: int) -> int:
    return int(sequence.generate_state(words)[0])


def _middle(start: float, end: float) -> float:
    return round((start + end) / 2, _DECIMALS)


def _splits(node: _Node, time: float) -> list[tuple[int, int]]:
    """Index and depth of the nodes that are split on the way from a node down to a time."""
    start, end, index, depth = node.start, node.end, node.index, node.depth
    found: list[tuple[int, int]] = []
    while time not in (start, end):
        found.append((index, depth))
        middle = _middle(start, end)
        goes_right = time >= middle
        start, end = (middle, end) if goes_right else (start, middle)
        index, depth = 2 * index + goes_right, depth + 1
    return found


def _halves(node: _Node, drawn: Tensor) -> tuple[_Node, _Node]:
    """Split a node by a Brownian bridge."""
    a, m, b = node.start, _middle(node.start, node.end), node.end
    bridge = drawn * float(np.sqrt((m - a) * (b - m) / (b - a)))
    left = node.increment * ((m - a) / (b - a)) + bridge
    return (
        _Node(a, m, 2 * node.index, node.depth + 1, left),
        _Node(m, b, 2 * node.index + 1, node.depth + 1, node.increment - left),
    )


class BrownianNoise:
    """Unit-variance noise between two noise levels for a batch.

    `noise(sigma, sigma_next)` is -(W(sigma) - W(sigma_next)) / sqrt(sigma - sigma_next), float32 (B, *shape). Inside a `with` block a
    thread draws the next few intervals of `ahead`, so that a step finds its noise ready; other intervals are drawn when asked for, without
    `ahead` by whoever asks.
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
        # one step asks for none
        self._tree = BrownianTree(low, high, shape, seeds, source, device) if low < high else None
        self._ahead = iter(ahead)
        self._drawn: dict[tuple[float, float], Future[Tensor]] = {}
        # one thread only: a tree grows while it is asked
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="brownian-noise") if ahead else None

    def __enter__(self) -> BrownianNoise:
        self._draw_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing more is drawn, and what was drawn is let go of."""
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
        self._drawn.clear()
        self._tree = None

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """Noise of the step from `sigma` down to `sigma_next`."""
        if self._thread is None:
            return self._render(sigma, sigma_next)
        drawn = self._drawn.pop((sigma, sigma_next), None)
        if drawn is None:
            return self._thread.submit(self._render, sigma, sigma_next).result()
        self._draw_ahead()
        return drawn.result()

    def _draw_ahead(self) -> None:
        if self._thread is None:
            return
        for interval in islice(self._ahead, _INTERVALS_AHEAD - len(self._drawn)):
            self._drawn[interval] = self._thread.submit(self._render, *interval)

    @torch.inference_mode()
    def _render(self, sigma: float, sigma_next: float) -> Tensor:
        if self._tree is None:
            raise ValueError("there is no noise between equal levels, nor after the block")
        return -self._tree.between(sigma_next, sigma) / float(np.sqrt(abs(sigma - sigma_next)))
