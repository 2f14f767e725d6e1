"""Train the decoders on latents as the UNet leaves them: noised a little and denoised again.

The latents of images are too clean. The UNet's are off by a little everywhere, most of all in the
corners, where all images are empty. A critic of small patches keeps edges sharp.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from training import images
from training.autoencoder import (
    CHECKPOINT,
    ImageSampler,
    evaluate,
    image_loss,
    load_trained,
    rgba_loss,
)
from training.data import SIDE
from training.precision import mixed_precision
from training.text import POOLED, WIDTH_1, WIDTH_2
from training.unet import load_averaged, scaling_factor

STEPS, FIRST = 10, 6
"""Steps of the sampler, and the first of those that denoise."""
SOFT_SHARE = 0.4
"""Share of soft images. Without them the decoder forgets how a glow meets what glows."""
CRITIC_FROM, CRITIC_WEIGHT = 0.4, 0.04
"""Share of the steps before the critic begins, and its weight in the loss."""


def make_critic() -> nn.Module:
    """Return a critic that scores patches of RGB and alpha, (B, 4, H, W) in [-1, 1]."""
    layers: list[nn.Module] = []
    for entering, width in ((4, 32), (32, 64), (64, 96)):
        layers += [spectral_norm(nn.Conv2d(entering, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(96, 1, 3, 1, 1)))


@torch.inference_mode()
def renoise(unet: torch.nn.Module, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Noise adjusted latents, (B, 4, 32, 32), to the middle and denoise them without a text."""
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        use_karras_sigmas=True,
    )
    scheduler.set_timesteps(STEPS)
    count, first = len(latents), scheduler.timesteps[FIRST : FIRST + 1]
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents * scaling_factor(), noise, first.repeat(count))
    scheduler.set_begin_index(FIRST)
    context, pooled = torch.zeros(count, 77, WIDTH_1 + WIDTH_2), torch.zeros(count, POOLED)
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * count).float()
    added = {"text_embeds": pooled, "time_ids": sizes}
    for step in scheduler.timesteps[FIRST:]:
        scaled = scheduler.scale_model_input(noisy, step)
        predicted = unet(scaled, step, context, added_cond_kwargs=added).sample
        noisy = scheduler.step(predicted, step, noisy).prev_sample
    return noisy / scaling_factor()


def _critic_input(rgba: Tensor, background: Tensor) -> Tensor:
    alpha = rgba[:, 3:].clamp(0, 1)
    laid = images.composite(torch.cat([rgba[:, :3], alpha], 1), background)
    return torch.cat([laid, alpha], 1) * 2 - 1


def train(count: int, steps: int, learning_rate: float = 3e-4) -> None:
    """Train both decoders on latents that the UNet denoised. The encoders stay.

    Args:
        count: Number of images, a multiple of 8.
        steps: Number of steps.
        learning_rate: Highest learning rate.
    """
    model, unet = load_trained(), load_averaged().eval()
    sampler, generator = ImageSampler(500_000), torch.Generator().manual_seed(5)
    start = time.time()
    targets, latents = [], []
    for _ in range(count // 8):
        whole = sampler.whole(8, soft_share=SOFT_SHARE)
        with torch.inference_mode():
            clean = model.encode_transparent(whole)
        targets.append(whole)
        latents.append(torch.cat([renoise(unet, clean[:6], generator), clean[6:]]).clone())
    target_images, source_latents = torch.cat(targets), torch.cat(latents)
    print(f"{count} latents denoised in {time.time() - start:.0f} s", flush=True)
    trained = [*model.vae.decoder.parameters(), *model.decoder.parameters()]
    for value in trained:
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.5, 0.95), weight_decay=1e-4)
    critic = make_critic()
    critic_optimizer = torch.optim.AdamW(critic.parameters(), 1e-3, betas=(0.5, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        row = int(torch.randint(0, len(target_images), (1,), generator=generator))
        latent, target = source_latents[row : row + 1], target_images[row : row + 1]
        with mixed_precision():
            rgb, decoded = model.decode(latent)
        rgb, decoded = rgb.float(), decoded.float()
        grey = images.composite(target, torch.full((1, 3, 1, 1), 0.5))
        loss = image_loss(rgb, grey * 2 - 1) + rgba_loss(decoded, target, generator)
        # The border is a hundredth of the image and empty in almost all of them.
        alpha, true_alpha = decoded[:, :1], target[:, 3:]
        rim = torch.ones_like(alpha, dtype=torch.bool)
        rim[..., 8:-8, 8:-8] = False
        loss = loss + 3 * F.relu(alpha[rim & (true_alpha == 0)] + 0.02).mean().nan_to_num()
        if step >= CRITIC_FROM * steps:
            output = torch.cat([decoded[:, 1:], decoded[:, :1]], 1)
            background = torch.rand(1, 3, 1, 1, generator=generator)
            real, fake = _critic_input(target, background), _critic_input(output, background)
            scores = critic(torch.cat([real, fake.detach()]))
            blame = F.relu(1 - scores[:1]).mean() + F.relu(1 + scores[1:]).mean()
            critic_optimizer.zero_grad()
            blame.backward()
            critic_optimizer.step()
            loss = loss - CRITIC_WEIGHT * critic(fake).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} {time.time() - start:.0f} s loss {loss.item():.3f}", flush=True)
    saved = torch.load(CHECKPOINT, weights_only=True)
    saved["model"] = saved["average"] = model.state_dict()
    torch.save(saved, CHECKPOINT.with_suffix(".new"))
    CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)
    print(evaluate(model.eval()), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=280)
    parser.add_argument("--steps", type=int, default=450)
    options = parser.parse_args()
    train(options.images, options.steps)
