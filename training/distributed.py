"""Several processes of one thread each that train one network, under torchrun: each takes its own batches, the gradients are averaged."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn


def count() -> int:
    """How many processes train; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process; the first, 0, prints and saves."""
    return int(os.environ.get("RANK", "0"))


def join() -> None:
    """Find the other processes."""
    if count() > 1:
        dist.init_process_group("gloo")


def agree(value: float) -> float:
    """What the first process says."""
    said = torch.tensor(value)
    if count() > 1:
        dist.broadcast(said, 0)
    return float(said)


def average_gradients(model: nn.Module) -> None:
    """Replace each gradient by its mean over the processes."""
    if count() == 1:
        return
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    # half as many bytes between the processes; the mean of two loses nothing that the noise of a batch would not drown
    together = torch.cat([each.flatten() for each in gradients]).bfloat16()
    dist.all_reduce(together)
    parts = together.float().div_(count()).split([each.numel() for each in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
