"""Train one network with several processes of one thread each, under torchrun."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn


def process_count() -> int:
    """Return the number of training processes, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process. Process 0 prints and saves."""
    return int(os.environ.get("RANK", "0"))


def join() -> None:
    """Join the process group."""
    if process_count() > 1:
        dist.init_process_group("gloo")


def broadcast(value: float) -> float:
    """Return the value of process 0."""
    shared = torch.tensor(value)
    if process_count() > 1:
        dist.broadcast(shared, 0)
    return float(shared)


def average_gradients(model: nn.Module) -> None:
    """Replace each gradient by its mean over the processes."""
    if process_count() == 1:
        return
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    # bfloat16 halves the traffic. The noise of a batch is far larger than its rounding.
    flat = torch.cat([gradient.flatten() for gradient in gradients]).bfloat16()
    dist.all_reduce(flat)
    parts = flat.float().div_(process_count()).split([value.numel() for value in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
