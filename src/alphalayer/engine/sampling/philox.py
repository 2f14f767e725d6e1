"""Normal values of the Philox generator, equal to the bit on every device.

The generator is Philox-4x32-10 with the counter (call, 0, element, 0). Its first two words go
through Box-Muller. It uses integers and float64 only, so every device gives the same values.
A GPU's own generator gives them in float32 arithmetic, if it has a thread for each element.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". PyTorch's CUDA kernels,
    for Box-Muller and the counter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_UNIT = float(np.float32(2.3283064e-10))
_TURN = float(np.float32(2.3283064e-10 * 6.2831855))
_ROUNDS = 10
_VALUES_ON_CPU = 1 << 14
"""Values of one evaluation on the CPU. Its five buffers of 8-byte words fit the L2 cache."""
_VALUES_ON_GPU = 1 << 20
"""Values of one evaluation on a GPU, which holds about ten 8-byte words for each."""


def philox_normal(
    seeds: Sequence[int], count: int, call: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Generate the standard normal values of a `randn` call on CUDA generators.

    Args:
        seeds: One seed for each generator, below 2^64.
        count: Values of each generator.
        call: Number of `randn` calls on the generators before this one.
        device: Where to compute.

    Returns:
        float32 (seeds, count), on `device`.
    """
    if torch.device(device).type == "cpu":
        return _normal_in_numpy(seeds, count, call)
    group = max(1, _VALUES_ON_GPU // count)
    return torch.cat(
        [
            normal_in_torch(seeds[first : first + group], count, call, device)
            for first in range(0, len(seeds), group)
        ]
    )


def normal_in_torch(
    seeds: Sequence[int], count: int, call: int, device: torch.device | str
) -> Tensor:
    """Generate the values of `philox_normal` with torch operations on whole tensors."""
    words = [
        torch.full((count,), call, device=device),
        torch.zeros(count, dtype=torch.int64, device=device),
        torch.arange(count, device=device),
        torch.zeros(count, dtype=torch.int64, device=device),
    ]
    keys = torch.from_numpy(_round_keys(seeds).astype(np.int64))
    # a copy from pinned memory does not wait for the work that the GPU has queued
    pinned = torch.device(device).type == "cuda"
    keys = (keys.pin_memory() if pinned else keys).to(device, non_blocking=pinned)
    for key, other_key in keys:
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            ((second >> 32) & _LOW) ^ words[1] ^ key,
            second & _LOW,
            ((first >> 32) & _LOW) ^ words[3] ^ other_key,
            first & _LOW,
        ]
    u = words[0].double() * _UNIT + _UNIT / 2
    v = words[1].double() * _TURN + _TURN / 2
    return (torch.sqrt(-2.0 * torch.log(u)) * torch.sin(v)).float()


def _normal_in_numpy(seeds: Sequence[int], count: int, call: int) -> Tensor:
    """Generate the values of `philox_normal` in groups that stay in the cache."""
    keys = _round_keys(seeds)
    width = min(count, _VALUES_ON_CPU)
    height = min(len(seeds), _VALUES_ON_CPU // width)
    buffers = np.empty((5, height * width), np.uint64)
    values = torch.empty(len(seeds), count)
    for row in range(0, len(seeds), height):
        for column in range(0, count, width):
            group = values[row : row + height, column : column + width]
            words = [buffer[: group.numel()].reshape(group.shape) for buffer in buffers]
            words[2][:] = np.arange(column, column + group.shape[1])
            _box_muller(*_encrypt(words, call, keys[:, :, row : row + height]), group)
    return values


def _encrypt(words: Sequence[Words], call: int, keys: Words) -> tuple[Words, Words]:
    """Evaluate Philox in place.

    Args:
        words: Five buffers (seeds, values). The third one has the elements' numbers.
        call: First word of the counter.
        keys: Keys of the seeds (rounds, 2, seeds, 1).

    Returns:
        The first two words of the result. They are two of the buffers.
    """
    a, b, c, d, spare = words
    a.fill(call)
    b.fill(0)
    d.fill(0)
    for key, other_key in keys:
        a *= _MULTIPLIERS[0]
        c *= _MULTIPLIERS[1]
        np.right_shift(c, 32, out=spare)
        spare ^= b
        spare ^= key
        np.right_shift(a, 32, out=b)
        b ^= d
        b ^= other_key
        a &= _LOW
        c &= _LOW
        a, b, c, d, spare = spare, c, b, a, d
    return a, b


def _box_muller(first: Words, second: Words, values: Tensor) -> None:
    """Write the normal values of two words each into `values`, float32."""
    # logarithm and sine are torch's: those of NumPy differ from it in the last bit
    u = torch.from_numpy(first.astype(np.float64)).mul_(_UNIT).add_(_UNIT / 2)
    v = torch.from_numpy(second.astype(np.float64)).mul_(_TURN).add_(_TURN / 2)
    values.copy_(u.log_().mul_(-2.0).sqrt_().mul_(v.sin_()))


def _round_keys(seeds: Sequence[int]) -> Words:
    """Return both keys of each round: (rounds, 2, seeds, 1)."""
    first_keys = np.array(
        [[seed & _LOW for seed in seeds], [seed >> 32 for seed in seeds]], np.uint64
    )
    steps = np.outer(np.arange(_ROUNDS), _KEY_STEPS).astype(np.uint64)
    return ((first_keys + steps[..., None]) & np.uint64(_LOW))[..., None]
