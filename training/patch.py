"""Train the LayerDiffuse patch: a low-rank change from the transparent UNet to opaque images.

LayerDiffuse trains a LoRA that moves an opaque model to adjusted latents. Here the long training
has the transparent side, where the quality is needed. The LoRA learns the way to the plain
latents of images on backgrounds. The shipped base is UNet + LoRA, the shipped patch is -LoRA.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.data import CACHE
from training.unet import SampleStream, compute_loss, load_averaged, make_schedule

CHECKPOINT = CACHE / "patch.pt"
RANK = 8


class LowRank(nn.Module):
    """Change of a weight by up @ down. It begins at zero."""

    def __init__(self, weight: Tensor):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        self.up = nn.Parameter(torch.zeros(rows, RANK))
        self.down = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        return weight + (self.up @ self.down).view_as(weight)


def train(minutes: float, count: int = 16, learning_rate: float = 2e-3) -> None:
    """Train the LoRA from the last checkpoint for a time and save it.

    Args:
        minutes: Time of this run.
        count: Samples of a step.
        learning_rate: Highest learning rate.
    """
    torch.manual_seed(1)
    unet = load_averaged()
    layers = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    changes = {name: LowRank(layer.weight) for name, layer in layers.items()}
    if CHECKPOINT.is_file():
        for name, change in torch.load(CHECKPOINT, weights_only=True).items():
            changes[name].load_state_dict(change)
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", changes[name])
    factors = [value for change in changes.values() for value in change.parameters()]
    optimizer = torch.optim.AdamW(factors, learning_rate, weight_decay=0.0)
    samples, schedule = SampleStream(7, opaque=True), make_schedule()
    start, step = time.time(), 0
    while (done := (time.time() - start) / (minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * (1 - done)
        with parametrize.cached():
            loss = compute_loss(unet, samples, count, schedule)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        step += 1
        if step % 25 == 0:
            print(f"step {step} {time.time() - start:.0f} s loss {loss.item():.4f}", flush=True)
    factors_by_layer = {
        name: {"up": change.up.detach(), "down": change.down.detach()}
        for name, change in changes.items()
    }
    torch.save(factors_by_layer, CHECKPOINT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    train(parser.parse_args().minutes)
