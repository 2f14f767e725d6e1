"""Random weights by the recipe of the published numbers that tests compare with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def seeded_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Return float32 tensors from one generator of NumPy, in the order of the names."""
    random, weights = np.random.RandomState(seed), {}
    for name, shape in shapes.items():
        values = random.standard_normal(math.prod(shape)).reshape(shape)
        if len(shape) > 1:
            values /= math.sqrt(math.prod(shape[1:]))
        else:
            values = 0.1 * values + name.endswith(".weight")
        weights[name] = torch.from_numpy(values).float()
    return weights
