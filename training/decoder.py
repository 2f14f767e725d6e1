"""The transparent decoder trained on with latents as the UNet leaves them: noised a little and denoised again.

The latents of pictures are too clean a school: what the UNet makes is off by a little everywhere, most of all in the corners, where all
pictures are empty and hardly differ.
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from training import pictures
from training.autoencoder import CHECKPOINT, Crops, LatentTransparency, beyond, edges, evaluate, likeness, load_trained
from training.patch import averaged_unet
from training.text import POOLED, WIDTH_1, WIDTH_2
from training.unet import SIDE, scaling_factor

STEPS, FIRST = 20, 12
"""Of so many steps of the sampler those from here on are made."""
SOFT = 0.4
"""How often pictures are made soft: where all are hard, the decoder forgets how a glow meets what glows."""


@torch.inference_mode()
def as_drawn(unet: torch.nn.Module, latents: Tensor, rng: torch.Generator) -> Tensor:
    """Adjusted latents (B, 4, 32, 32) noised to the middle of the schedule and denoised without a text."""
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    scheduler.set_timesteps(STEPS)
    count = len(latents)
    noise = torch.randn(latents.shape, generator=rng)
    scaled = latents * scaling_factor()
    noisy = scheduler.add_noise(scaled, noise, scheduler.timesteps[FIRST : FIRST + 1].repeat(count))
    scheduler.set_begin_index(FIRST)
    context, pooled = torch.zeros(count, 77, WIDTH_1 + WIDTH_2), torch.zeros(count, POOLED)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * count).float()}
    for step in scheduler.timesteps[FIRST:]:
        made = unet(scheduler.scale_model_input(noisy, step), step, context, added_cond_kwargs=added).sample
        noisy = scheduler.step(made, step, noisy).prev_sample
    return noisy / scaling_factor()


def train(count: int, steps: int, learning_rate: float = 3e-4) -> None:
    """Draw so many latents again and train the transparent decoder on them; the VAE and the encoders stay."""
    model: LatentTransparency = load_trained()
    unet, crops = averaged_unet().eval(), Crops(500_000)
    rng = torch.Generator().manual_seed(5)
    start = time.time()
    rgba, latents, seen = [], [], []
    with torch.inference_mode():
        for _ in range(count // 8):
            whole = crops.whole(8, soft=SOFT)
            clean = model.encode_transparent(whole)
            drawn = torch.cat([as_drawn(unet, clean[:6], rng), clean[6:]])
            rgba.append(whole)
            latents.append(drawn)
            seen.append((model.vae.decode(drawn, return_dict=False)[0] / 2 + 0.5).clamp(0, 1))
    wanted, given, shown = (torch.cat(each).clone() for each in (rgba, latents, seen))
    print(f"{count} latents drawn again in {time.time() - start:.0f} s", flush=True)
    decoder = model.decoder.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), learning_rate, weight_decay=1e-4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        rows = torch.randint(0, len(wanted), (2,), generator=rng)
        with torch.autocast("cpu", torch.bfloat16):
            made = decoder(shown[rows], given[rows])
        made, true = made.float(), wanted[rows]
        alpha, true_alpha = beyond(made[:, :1], true[:, 3:]), true[:, 3:]
        other = torch.rand(2, 3, 1, 1, generator=rng)
        laid = made[:, 1:] * alpha + other * (1 - alpha)
        loss = 2 * (alpha - true_alpha).abs().mean() + (edges(alpha) - edges(true_alpha)).abs().mean()
        loss = loss + likeness(laid * 2 - 1, pictures.over(true, other) * 2 - 1)
        # the border is a hundredth of the picture and empty in all of them
        rim = torch.cat([alpha[..., :4, :], alpha[..., -4:, :]], -2).abs().mean()
        rim = rim + torch.cat([alpha[..., :4], alpha[..., -4:]], -1).abs().mean()
        loss = loss + 1.5 * rim * (true_alpha[..., :4, :].max() == 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"{step + 1} {time.time() - start:.0f} s loss {loss.item():.3f}", flush=True)
    saved = torch.load(CHECKPOINT, weights_only=True)
    saved["model"] = model.state_dict()
    torch.save(saved, CHECKPOINT.with_suffix(".new"))
    CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)
    print(evaluate(model.eval()), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=280)
    parser.add_argument("--steps", type=int, default=450)
    options = parser.parse_args()
    train(options.pictures, options.steps)
