"""Train the UNet to predict noise on the adjusted latents, so that it generates RGBA.

SDXL's recipe at a small size: scaled-linear noise schedule, two text encoders, pooled text and
sizes as added conditions. Min-SNR weights (Hang et al. 2023), classifier-free guidance (Ho and
Salimans 2022), an average of the weights over time.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from training import captions, distributed
from training.autoencoder import DOWNSAMPLING, LATENT_CHANNELS, Stop
from training.data import CACHE, SIDE, TRAINING_SETS
from training.latents import read_latents, read_samples
from training.phrases import CONTEXT, POOLS, ROWS
from training.precision import mixed_precision
from training.text import POOLED, WIDTH_1, WIDTH_2

CHECKPOINT, SCALE = CACHE / "unet.pt", CACHE / "scaling-factor.txt"
TIME_IDS_WIDTH = 32
MIN_SNR = 5.0
NOISY, IMAGE_WEIGHT = 500, 0.2
"""At high noise the error of the noise hardly shows an error of the image.

Half of the steps come from `NOISY` up, and this share of the image's error joins the loss.
"""
EMPTY_SHARE, UNWANTED_SHARE = 0.07, 0.05
"""Share of the texts that are zeroed, and of those that are negative prompts."""
AVERAGED_EVERY = 4


def make_unet() -> UNet2DConditionModel:
    """Return the UNet for latents of 4x32x32. The finest level is narrow, so a step is cheap."""
    return UNet2DConditionModel(
        sample_size=SIDE // DOWNSAMPLING,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 80, 160, 224),
        layers_per_block=1,
        down_block_types=(
            *("DownBlock2D", "DownBlock2D"),
            *("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        ),
        up_block_types=(
            *("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            *("UpBlock2D", "UpBlock2D"),
        ),
        transformer_layers_per_block=1,
        attention_head_dim=(1, 2, 5, 7),
        cross_attention_dim=WIDTH_1 + WIDTH_2,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS_WIDTH,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_IDS_WIDTH,
    )


def make_schedule() -> DDPMScheduler:
    """Return SDXL's noise schedule."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
    )


class SampleStream:
    """Random latents with captions. Concepts have equal shares, and designs within a concept.

    Args:
        seed: Seed of all random numbers.
        opaque: Whether to load the plain latents of opaque images.
    """

    def __init__(self, seed: int, *, opaque: bool = False):
        samples = read_samples()
        latents, numbers = read_latents(opaque=opaque)
        self._latents = torch.from_numpy(latents)
        rows = json.loads(ROWS.read_text())
        self._rows = [rows[number] for number in numbers]
        self._context = np.load(CONTEXT, mmap_mode="r")
        self._pooled = np.load(POOLS, mmap_mode="r")
        self.scale = scaling_factor()
        shown = [
            (samples[number].label, TRAINING_SETS[samples[number].set].design) for number in numbers
        ]
        in_design = Counter(shown)
        designs = Counter(label for label, _ in in_design)
        self._cumulative = list(
            accumulate(1 / (designs[label] * in_design[label, design]) for label, design in shown)
        )
        self._rng = random.Random(seed)

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch.

        Returns:
            Scaled latents (count, 4, 32, 32), context (count, 77, 192), pooled text (count, 128).
        """
        population = range(len(self._cumulative))
        chosen = self._rng.choices(population, cum_weights=self._cumulative, k=count)
        chances = [self._rng.random() for _ in chosen]
        texts: list[int] = []
        for number, chance in zip(chosen, chances, strict=True):
            first, phrases = self._rows[number]
            unwanted = -1 - self._rng.randrange(len(captions.UNWANTED))
            texts.append(
                unwanted if chance < UNWANTED_SHARE else first + self._rng.randrange(phrases)
            )
        context = torch.from_numpy(self._context[texts]).float()
        pooled = torch.from_numpy(self._pooled[texts]).float()
        limit = UNWANTED_SHARE + EMPTY_SHARE
        empty = torch.tensor([UNWANTED_SHARE <= chance < limit for chance in chances])
        context[empty], pooled[empty] = 0.0, 0.0
        return self._latents[chosen].float() * self.scale, context, pooled


def scaling_factor() -> float:
    """Return the factor that gives the adjusted latents unit variance.

    It is measured once and belongs to the UNet from then on.
    """
    if not SCALE.is_file():
        latents, _ = read_latents()
        SCALE.write_text(repr(float(1 / latents[::7].astype(np.float32).std())))
    return float(SCALE.read_text())


def compute_loss(unet: Any, samples: SampleStream, count: int, schedule: DDPMScheduler) -> Tensor:
    """Compute the weighted squared error of the predicted noise."""
    device = next(unet.parameters()).device
    latents, context, pooled = (value.to(device) for value in samples.batch(count))
    noise = torch.randn_like(latents)
    # Half of the steps are noisy ones. There the text must decide the colours, not the noise.
    uniform = torch.randint(0, 1000, (count - count // 2,))
    steps = torch.cat([uniform, torch.randint(NOISY, 1000, (count // 2,))]).to(device)
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32, device=device)
    added = {"text_embeds": pooled, "time_ids": sizes.repeat(count, 1)}
    noisy = schedule.add_noise(latents, noise, steps)
    with mixed_precision(device.type):
        predicted = unet(noisy, steps, context, added_cond_kwargs=added).sample
    kept = schedule.alphas_cumprod.to(device)[steps]
    ratio = kept / (1 - kept)
    weights = ratio.clamp(max=MIN_SNR) / ratio + IMAGE_WEIGHT / ratio.clamp(min=0.01)
    return (weights * (predicted.float() - noise).pow(2).mean((1, 2, 3))).mean()


class Average:
    """Mean of the weights over time. The older the run, the longer the memory."""

    def __init__(self, model: torch.nn.Module, longest: float = 0.9995):
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._longest = longest

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move towards the model's weights."""
        keep = min(self._longest, (1 + step) / (10 + step)) ** AVERAGED_EVERY
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - keep)


def make_optimizer(unet: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """Return the optimizer whose state is in the checkpoints."""
    return torch.optim.AdamW(
        unet.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )


def train(minutes: float, count: int = 32, learning_rate: float = 8e-4) -> None:
    """Train from the last checkpoint until the deadline or SIGTERM, on a GPU if there is one.

    Under torchrun each process has its own batches and the gradients are averaged. That is for
    CPUs. Attention is a plain product of matrices: on a CPU that is up to 1.6 times faster than
    `scaled_dot_product_attention` at these sizes.

    Args:
        minutes: Time of this run. The learning rate falls over its last 40 percent.
        count: Samples of a step and a process.
        learning_rate: Highest learning rate.
    """
    distributed.join()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = make_unet().to(device)
    if device == "cpu":
        unet.set_attn_processor(AttnProcessor())
    optimizer = make_optimizer(unet, learning_rate)
    average, step = Average(unet), 0
    if CHECKPOINT.is_file():
        saved = torch.load(CHECKPOINT, map_location=device, weights_only=True)
        unet.load_state_dict(saved["unet"])
        optimizer.load_state_dict(saved["optimizer"])
        average.weights, step = saved["average"], saved["step"]
    first = step
    seed = 1000 * (step + 1) + distributed.rank()
    torch.manual_seed(seed)
    samples, schedule, stop = SampleStream(seed), make_schedule(), Stop()
    start = last_saved = time.time()
    mean_loss = math.nan
    while True:
        part = (time.time() - start) / (minutes * 60)
        # All processes leave at the same step.
        part = distributed.broadcast(2.0 if stop.requested else part)
        if part >= 1:
            break
        tail = 1.0 if part < 0.6 else 0.5 * (1 + math.cos(math.pi * (part - 0.6) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * tail)
        loss = compute_loss(unet, samples, count, schedule)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        distributed.average_gradients(unet)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        if distributed.rank() > 0:
            continue
        if step % AVERAGED_EVERY == 0:
            average.update(unet, step)
        value = float(loss.detach())
        mean_loss = value if math.isnan(mean_loss) else 0.98 * mean_loss + 0.02 * value
        if step % 50 == 0:
            elapsed = time.time() - start
            rate = (step - first) * count * distributed.process_count() / elapsed
            print(
                f"step {step} {elapsed:.0f} s {rate:.1f} samples/s loss {mean_loss:.4f}",
                flush=True,
            )
        if time.time() - last_saved > 180:
            save(unet, optimizer, average, step)
            last_saved = time.time()
    if distributed.rank() == 0:
        save(unet, optimizer, average, step)


def save(
    unet: torch.nn.Module, optimizer: torch.optim.Optimizer, average: Average, step: int
) -> None:
    """Write the checkpoint atomically."""
    content = {
        "unet": unet.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.weights,
        "step": step,
    }
    new = Path(f"{CHECKPOINT}.new")
    torch.save(content, new)
    new.replace(CHECKPOINT)


def load_averaged() -> UNet2DConditionModel:
    """Load the UNet with the averaged weights of the last checkpoint, for inference."""
    unet = make_unet()
    saved = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
    unet.load_state_dict(saved["average"])
    return unet.requires_grad_(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step and a process")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    options = parser.parse_args()
    train(options.minutes, options.batch, options.learning_rate)
