"""Start the autoencoder from the encoder of the shipped 256-pixel model.

First the new decoders learn to read the shipped latents, and the shipped encoder stays as it is.
This answers whether those latents hold enough detail for 512 pixels. Then the encoder for 512
pixels learns to give the same latents. The checkpoint is the start of `training.autoencoder`.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor, nn

from training import autoencoder, images
from training.alphalayer_imports import MODEL_FOLDER
from training.autoencoder import (
    ImageSampler,
    LatentTransparency,
    Stop,
    WeightAverage,
    compute_loss,
    evaluate,
)
from training.data import CACHE
from training.precision import mixed_precision

CHECKPOINT = CACHE / "warm-start.pt"


class ShippedLatents(LatentTransparency):
    """New decoders and offset encoder on the latents of the shipped encoder."""

    def __init__(self):
        super().__init__()
        shipped = AutoencoderDC.from_pretrained(MODEL_FOLDER / "vae").float().encoder
        self.shipped = shipped.requires_grad_(False)
        self.vae.encoder.requires_grad_(False)

    def encode_opaque(self, rgb: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in [0, 1] at half of its size, as the shipped model does."""
        with torch.no_grad():
            return self.shipped(F.avg_pool2d(rgb, 2) * 2 - 1)


def train_decoders(model: ShippedLatents, cpu_seconds: float, rate: float = 1e-3) -> None:
    """Train the decoders and the offset encoder for a time and report held-out figures."""
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.98), weight_decay=1e-4)
    average, stop, sampler = WeightAverage(model, 0.99), Stop(), ImageSampler(7)
    step, begin, mean_loss = 0, time.process_time(), 0.0
    wall, reported = time.time(), 0
    while (used := time.process_time() - begin) < cpu_seconds and not stop.requested:
        fall = min(1.0, max(0.02, (cpu_seconds - used) / (0.35 * cpu_seconds)))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * fall
        rgba = sampler.whole(1, soft_share=0.3) if step % 40 == 39 else sampler.crops(8, 128)
        if len(rgba) == 1:
            rgba = torch.cat([rgba, rgba.flip(3)])
        loss, figures = compute_loss(model, rgba, 0.05, sampler.generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update(model)
        step += 1
        mean_loss = 0.97 * mean_loss + 0.03 * figures["loss"] if step > 1 else figures["loss"]
        if step % 25 == 0:
            print(
                f"step {step} cpu {used:.0f} s wall {time.time() - wall:.0f} s "
                f"loss {mean_loss:.4f} spread {figures['spread']:.2f}",
                flush=True,
            )
        if used // 240 > reported:
            reported = used // 240
            torch.save({"model": model.state_dict(), "average": average.weights}, CHECKPOINT)
    model.load_state_dict(average.weights)
    torch.save({"model": model.state_dict(), "average": average.weights}, CHECKPOINT)
    print(f"{step} steps", evaluate(model.eval(), 32, CACHE / "warm-start.png"), flush=True)


def match_encoder(model: ShippedLatents, steps: int = 300, rate: float = 2e-3) -> float:
    """Teach the encoder for 512 pixels the shipped latents; return the last squared error."""
    source, target = model.shipped.state_dict(), model.vae.encoder.state_dict()
    # Level 0 of the encoder for 512 pixels is empty, so its blocks are one further.
    for name, value in source.items():
        number = name.split(".")[1] if name.startswith("down_blocks.") else None
        moved = name if number is None else name.replace(number, str(int(number) + 1), 1)
        if moved in target and target[moved].shape == value.shape:
            target[moved] = value
    model.vae.encoder.load_state_dict(target)
    encoder, sampler = model.vae.encoder.requires_grad_(True), ImageSampler(8)
    optimizer = torch.optim.AdamW(encoder.parameters(), rate, betas=(0.9, 0.98))
    error = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            # The copied layers stay while the first layer is far from right.
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        rgba = sampler.crops(8, 128)
        background = images.random_background(8, 128, 128, sampler.generator)
        opaque = images.composite(rgba, background)
        with mixed_precision():
            wanted = model.encode_opaque(opaque)
            error = (encoder(opaque * 2 - 1) - wanted).float().pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        if step < steps // 3:
            for name, value in encoder.named_parameters():
                if not name.startswith("conv_in"):
                    value.grad = None
        optimizer.step()
    return float(error.detach())


def main() -> None:
    """Train the decoders, match the encoder, write the start of the autoencoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu-seconds", type=float, default=900)
    parser.add_argument("--match-only", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = ShippedLatents().to(memory_format=torch.channels_last)
    if options.match_only:
        model.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["average"])
    else:
        train_decoders(model, options.cpu_seconds)
    print(f"squared error of the new encoder's latents: {match_encoder(model):.4f}", flush=True)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("shipped.")}
    fresh = LatentTransparency()
    fresh.load_state_dict(weights)
    optimizer = autoencoder.make_optimizer(fresh, 1e-3)
    autoencoder.save(fresh, optimizer, WeightAverage(fresh), 0)


if __name__ == "__main__":
    main()
