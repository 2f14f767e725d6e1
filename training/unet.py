"""The UNet: noise prediction on the adjusted latents, so that it draws transparent pictures; and the LoRA that teaches it opaque ones.

SDXL's recipe at a small size: scaled-linear noise schedule, two text encoders, pooled text and sizes as added conditions; min-SNR
weights (Hang et al. 2023), classifier-free guidance (Ho and Salimans 2022), an average of the weights over time.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from training import captions, ranks
from training.autoencoder import DOWNSAMPLING, LATENT_CHANNELS
from training.data import CACHE
from training.latents import OPAQUE, SUBJECTS, TRANSPARENT
from training.text import POOLED, WIDTH_1, WIDTH_2
from training.wordings import CONTEXT, POOLS, WORDINGS

CHECKPOINT, SCALE = CACHE / "unet.pt", CACHE / "scaling-factor.txt"
TIME_IDS_WIDTH = 32
SIDE = 256
MIN_SNR = 5.0
NOISY, PICTURE_WEIGHT = 500, 0.2
"""The error of the noise hardly shows an error of the picture where there is much noise; this much of the latter's is added."""
SILENT, UNWANTED = 0.07, 0.05
"""How often the text is zeroed, and how often it is one of those that stand in negative prompts."""
SET_WEIGHTS = {
    "fluent-3d": 5.0,
    "fluent": 2.5,
    "noto": 1.5,
    "fluent-flat": 0.7,
    "noto-v1": 0.5,
}
"""How often a set is shown; the shaded look most, so that it is what comes where no style is asked for."""
AVERAGED_EVERY = 4
AS_THEY_ARE = 2.0
"""How much more often pictures in their own colours are shown than recoloured, faded or glowing ones."""


def make_unet() -> UNet2DConditionModel:
    """11 million parameters, for latents of 4x32x32; the finest level is narrow, so that a step costs little."""
    return UNet2DConditionModel(
        sample_size=SIDE // DOWNSAMPLING,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(1, 2, 4, 6),
        cross_attention_dim=WIDTH_1 + WIDTH_2,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS_WIDTH,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_IDS_WIDTH,
    )


def schedule() -> DDPMScheduler:
    """SDXL's noise schedule."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


class Samples:
    """Latents, each with one of its wordings."""

    def __init__(self, seed: int, *, opaque: bool = False):
        listed = json.loads(SUBJECTS.read_text())
        self._pictures = listed["opaque"] if opaque else range(len(listed["subjects"]))
        self._latents = torch.from_numpy(np.load(OPAQUE if opaque else TRANSPARENT))
        self._context, self._pooled = np.load(CONTEXT, mmap_mode="r"), np.load(POOLS, mmap_mode="r")
        self.scale = scaling_factor()
        self._until = list(
            accumulate(
                SET_WEIGHTS[each["set"]] * (1.0 if each["color"] or each["look"] else AS_THEY_ARE)
                for each in (listed["subjects"][i] for i in self._pictures)
            )
        )
        self._rng = random.Random(seed)

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled latents (count, 4, 32, 32), context (count, 77, 192), pooled text (count, 128)."""
        chosen = self._rng.choices(range(len(self._until)), cum_weights=self._until, k=count)
        texts = [self._pictures[i] * WORDINGS + self._rng.randrange(WORDINGS) for i in chosen]
        chances = [self._rng.random() for _ in chosen]
        texts = [
            -1 - self._rng.randrange(len(captions.UNWANTED)) if c < UNWANTED else text
            for text, c in zip(texts, chances, strict=True)
        ]
        context = torch.from_numpy(self._context[texts]).float()
        pooled = torch.from_numpy(self._pooled[texts]).float()
        silent = torch.tensor([UNWANTED <= c < UNWANTED + SILENT for c in chances])
        context[silent], pooled[silent] = 0.0, 0.0
        return self._latents[chosen].float() * self.scale, context, pooled


def scaling_factor() -> float:
    """1 / the spread of the adjusted latents, so that the sampler works at unit variance: measured once, then the UNet's for good."""
    if not SCALE.is_file():
        SCALE.write_text(repr(float(1 / np.load(TRANSPARENT, mmap_mode="r")[::7].astype(np.float32).std())))
    return float(SCALE.read_text())


def loss_of(unet: Any, samples: Samples, count: int, noise_schedule: DDPMScheduler) -> Tensor:
    """Weighted squared error of the predicted noise."""
    where = next(unet.parameters()).device
    latents, context, pooled = (each.to(where) for each in samples.batch(count))
    noise = torch.randn_like(latents)
    # half of all from the noisy end, where the text and not the noise is to say what colour it will be
    steps = torch.cat([torch.randint(0, 1000, (count - count // 2,)), torch.randint(NOISY, 1000, (count // 2,))]).to(
        where
    )
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32, device=where).repeat(count, 1)
    noisy = noise_schedule.add_noise(latents, noise, steps).contiguous(memory_format=torch.channels_last)
    with torch.autocast(where.type, torch.bfloat16):
        made = unet(noisy, steps, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    kept = noise_schedule.alphas_cumprod.to(where)[steps]
    ratio = kept / (1 - kept)
    weights = ratio.clamp(max=MIN_SNR) / ratio + PICTURE_WEIGHT / ratio.clamp(min=0.01)
    return (weights * (made.float() - noise).pow(2).mean((1, 2, 3))).mean()


class Average:
    """The mean of the weights over time; the older the run, the longer the memory."""

    def __init__(self, model: torch.nn.Module, longest: float = 0.9995):
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._longest = longest

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move towards the weights as they are."""
        keep = min(self._longest, (1 + step) / (10 + step)) ** AVERAGED_EVERY
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - keep)


def make_optimizer(unet: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """The optimizer whose state is in the checkpoints."""
    return torch.optim.AdamW(unet.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def train(minutes: float, count: int = 32, learning_rate: float = 8e-4) -> None:
    """Train for a time and save, on a GPU if there is one; goes on from the last checkpoint. The rate falls over the last 40 % of the time.

    Under torchrun each process takes its own batches and the gradients are averaged; that is for CPUs.
    """
    ranks.join()
    torch.manual_seed(0)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    unet = make_unet().to(where, memory_format=torch.channels_last)
    optimizer = make_optimizer(unet, learning_rate)
    average, step = Average(unet), 0
    if CHECKPOINT.is_file():
        saved = torch.load(CHECKPOINT, map_location=where, weights_only=True)
        unet.load_state_dict(saved["unet"])
        optimizer.load_state_dict(saved["optimizer"])
        average.weights, step = saved["average"], saved["step"]
    first = step
    torch.manual_seed(1000 * (step + 1) + ranks.rank())
    samples, noise_schedule = Samples(1000 * (step + 1) + ranks.rank()), schedule()
    start = last = time.time()
    mean = math.nan
    while True:
        if (part := ranks.agree((time.time() - start) / (minutes * 60))) >= 1:
            break
        tail = 1.0 if part < 0.6 else 0.5 * (1 + math.cos(math.pi * (part - 0.6) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * tail)
        loss = loss_of(unet, samples, count, noise_schedule)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        ranks.average_gradients(unet)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        if ranks.rank() == 0:
            if step % AVERAGED_EVERY == 0:
                average.update(unet, step)
            mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
            if step % 50 == 0:
                rate = (step - first) * count * ranks.count() / (time.time() - start)
                print(f"{step} {time.time() - start:.0f} s {rate:.1f} samples/s loss {mean:.4f}", flush=True)
            if time.time() - last > 180:
                save(unet, optimizer, average, step)
                last = time.time()
    if ranks.rank() == 0:
        save(unet, optimizer, average, step)


def save(unet: torch.nn.Module, optimizer: torch.optim.Optimizer, average: Average, step: int) -> None:
    """Write the checkpoint as a whole."""
    content = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "average": average.weights, "step": step}
    new = Path(f"{CHECKPOINT}.new")
    torch.save(content, new)
    new.replace(CHECKPOINT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=240)
    parser.add_argument("--batch", type=int, default=16, help="a process")
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="smaller for smaller batches")
    options = parser.parse_args()
    train(options.minutes, options.batch, options.learning_rate)
