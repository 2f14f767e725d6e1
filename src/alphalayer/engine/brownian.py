"""Brownian-tree noise of the SDE samplers: the same path of an image whatever the steps, the batch and the order of queries.

A Wiener process on a dyadic tree of intervals, as torchsde's `BrownianTree` builds it (seeds by numpy's `SeedSequence`, times rounded to
six decimals), with the normal draws of `alphalayer.engine.noise`. Knows nothing of samplers.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from alphalayer.engine.noise import Shape, randn
from alphalayer.request import NoiseSource

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

    @property
    def middle(self) -> float:
        return round((self.start + self.end) / 2, _DECIMALS)


class BrownianTree:
    """W over [start, end] for one image; `value(t)` is W(t), a float32 tensor of `shape` with W(start) = 0.

    Only the way to the last time asked for is kept (about fifty tensors) and the last few values: a sampler asks downwards, and what
    was dropped is drawn again, with the same seeds, if it is asked for.
    """

    def __init__(
        self, start: float, end: float, shape: Shape, seed: int, source: NoiseSource, device: torch.device | str = "cpu"
    ):
        self._seed, self._shape, self._device = seed, shape, device
        self._source: NoiseSource = source
        first = int(np.random.SeedSequence(entropy=seed, pool_size=_POOL_SIZE).generate_state(3)[0])
        whole = self._randn(first) * float(np.sqrt(end - start))
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

    def _walk(self, time: float) -> Tensor:
        """Down to the node that begins or ends at a time of the tree's interval."""
        node, before = self._root, torch.zeros(self._shape, device=self._device)
        while time not in (node.start, node.end):
            left, right = self._children(node)
            if time >= right.start:
                before, node, aside = before + left.increment, right, left
            else:
                node, aside = left, right
            aside.left = aside.right = None
        return before + node.increment if time == node.end else before

    def between(self, start: float, end: float) -> Tensor:
        """W(end) - W(start)."""
        return self.value(end) - self.value(start)

    def _children(self, node: _Node) -> tuple[_Node, _Node]:
        """Split a node by a Brownian bridge."""
        if node.left is None or node.right is None:
            a, m, b = node.start, node.middle, node.end
            spawned = np.random.SeedSequence(
                entropy=self._seed, spawn_key=(node.index, node.depth), pool_size=_POOL_SIZE
            )
            bridge = self._randn(int(spawned.generate_state(4)[0])) * float(np.sqrt((m - a) * (b - m) / (b - a)))
            left = node.increment * ((m - a) / (b - a)) + bridge
            node.left = _Node(a, m, 2 * node.index, node.depth + 1, left)
            node.right = _Node(m, b, 2 * node.index + 1, node.depth + 1, node.increment - left)
        return node.left, node.right

    def _randn(self, seed: int) -> Tensor:
        return randn(seed, self._shape, self._source, self._device)


class BrownianNoise:
    """Unit-variance noise between two noise levels for a batch, one tree an image.

    `noise(sigma, sigma_next)` is -(W(sigma) - W(sigma_next)) / sqrt(sigma - sigma_next), float32 (B, *shape). Inside a `with` block a
    thread draws the next few intervals of `ahead`, so that a step finds its noise ready; other intervals are drawn when asked for.
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
        self._trees = [BrownianTree(low, high, shape, seed, source, device) for seed in seeds] if low < high else []
        self._ahead = iter(ahead)
        self._drawn: dict[tuple[float, float], Future[Tensor]] = {}
        # one thread only: a tree grows while it is asked
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="brownian-noise")

    def __enter__(self) -> BrownianNoise:
        self._draw_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing more is drawn, and what was drawn is let go of."""
        self._thread.shutdown(cancel_futures=True)
        self._drawn.clear()
        self._trees.clear()

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """Noise of the step from `sigma` down to `sigma_next`."""
        drawn = self._drawn.pop((sigma, sigma_next), None)
        if drawn is None:
            return self._thread.submit(self._draw, sigma, sigma_next).result()
        self._draw_ahead()
        return drawn.result()

    def _draw_ahead(self) -> None:
        for interval in islice(self._ahead, _INTERVALS_AHEAD - len(self._drawn)):
            self._drawn[interval] = self._thread.submit(self._draw, *interval)

    @torch.inference_mode()
    def _draw(self, sigma: float, sigma_next: float) -> Tensor:
        increments = torch.stack([tree.between(sigma_next, sigma) for tree in self._trees])
        return -increments / float(np.sqrt(abs(sigma - sigma_next)))
