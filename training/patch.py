"""The LayerDiffuse patch: low-rank changes of every weight that move the transparent UNet to opaque pictures, turned round.

LayerDiffuse trains a LoRA that moves an opaque model to adjusted latents. Here the long training has the transparent side, where
the quality is wanted; the LoRA learns the way to the plain latents of pictures on backgrounds. What is shipped is the same pair as
ever: a base that paints opaque pictures (UNet + LoRA), and a patch that makes it transparent (minus the LoRA).
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from training.data import CACHE
from training.unet import CHECKPOINT as UNET
from training.unet import Samples, loss_of, make_unet, schedule

CHECKPOINT = CACHE / "patch.pt"
RANK = 8


class LowRank(nn.Module):
    """weight → weight + up @ down; begins at no change."""

    def __init__(self, weight: Tensor):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        self.up = nn.Parameter(torch.zeros(rows, RANK))
        self.down = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + (self.up @ self.down).view_as(weight)


def averaged_unet() -> nn.Module:
    """The UNet with the averaged weights of its training."""
    unet = make_unet()
    unet.load_state_dict(torch.load(UNET, map_location="cpu", weights_only=True)["average"])
    return unet.requires_grad_(False)


def train(minutes: float, count: int = 16, learning_rate: float = 2e-3) -> None:
    """Train the LoRA for a time and save it; goes on from the one that is there."""
    torch.manual_seed(1)
    unet = averaged_unet().to(memory_format=torch.channels_last)
    layers = {name: each for name, each in unet.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}
    changes = {name: LowRank(layer.weight) for name, layer in layers.items()}
    if CHECKPOINT.is_file():
        for name, change in torch.load(CHECKPOINT, weights_only=True).items():
            changes[name].load_state_dict(change)
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", changes[name])
    optimizer = torch.optim.AdamW(
        [each for change in changes.values() for each in change.parameters()], learning_rate, weight_decay=0.0
    )
    samples, noise_schedule = Samples(7, opaque=True), schedule()
    start, step = time.time(), 0
    while (done := (time.time() - start) / (minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * (1 - done)
        with parametrize.cached():
            loss = loss_of(unet, samples, count, noise_schedule)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        step += 1
        if step % 25 == 0:
            print(f"{step} {time.time() - start:.0f} s loss {loss.item():.4f}", flush=True)
    torch.save(
        {name: {"up": change.up.detach(), "down": change.down.detach()} for name, change in changes.items()}, CHECKPOINT
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    train(parser.parse_args().minutes)
