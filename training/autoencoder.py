"""The autoencoder, and transparency hidden in its latent (Zhang and Agrawala, "Transparent Image Layer Diffusion using Latent
Transparency", 2024): one training run for the VAE, the encoder of the offset, and the transparent decoder.

    opaque picture           → VAE encoder → z                 VAE decoder(z) = the picture
    transparent picture      → VAE encoder (laid on grey) + offset(RGBA) → z'
                                                               VAE decoder(z') = the picture on grey
                                                               transparent decoder(that, z') = colour and alpha
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import Encoder
from PIL import Image
from torch import Tensor, nn

from alphalayer.engine.transparency import TransparentDecoder
from training import pictures, ranks
from training.data import CACHE, TRAINING_SETS, load

CHECKPOINT = CACHE / "autoencoder.pt"
STEPS = 1900
"""Of the whole training; the decoders are trained on by `--refine`."""
LATENT_CHANNELS = 4
DOWNSAMPLING = 8
MARGIN = 0.02
LATENT_NOISE = 0.07
COARSE_SHARE = 0.2
"""How often the latent is also halved and must decode to the halved picture: keeps the latent smooth, so that it can be learnt
(Kouzelis et al. 2025, "EQ-VAE")."""
DECODER_CONFIG = {
    "in_channels": 3,
    "out_channels": 4,
    "latent_channels": LATENT_CHANNELS,
    "block_out_channels": [12, 16, 24, 48, 64],
    "layers_per_block": 1,
    "attention_blocks": 0,
    "latent_block": 3,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
WEIGHTS = {
    "fluent-3d": 2.0,
    "fluent": 1.5,
    "noto": 1.0,
    "fluent-flat": 0.7,
    "noto-v1": 0.7,
}
HELD_OUT = 20
"""Every 20th picture of a set is kept out of training."""


def make_vae() -> AutoencoderDC:
    """8 times smaller on a side, 4 channels; convolutions only."""
    return AutoencoderDC(
        in_channels=3,
        latent_channels=LATENT_CHANNELS,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(16, 32, 64, 128),
        decoder_block_out_channels=(16, 32, 64, 128),
        encoder_layers_per_block=(1, 1, 1, 2),
        decoder_layers_per_block=(1, 1, 2, 3),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        scaling_factor=1.0,
    )


def make_offset_encoder() -> nn.Module:
    """RGBA (B, 4, H, W) → offset of the latent (B, 4, H/8, W/8); begins at zero."""
    encoder = Encoder(
        in_channels=4,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(12, 24, 48, 96),
        layers_per_block=(1, 1, 1, 1),
        qkv_multiscales=((), (), (), ()),
        out_shortcut=False,
    )
    nn.init.normal_(encoder.conv_out.weight, std=1e-3)
    nn.init.zeros_(encoder.conv_out.bias)
    return encoder


class LatentTransparency(nn.Module):
    """The three networks together."""

    def __init__(self):
        super().__init__()
        self.vae = make_vae()
        self.offset = make_offset_encoder()
        self.decoder = TransparentDecoder(**DECODER_CONFIG)

    def encode_opaque(self, rgb: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → latent."""
        return self.vae.encode(rgb * 2 - 1).latent

    def encode_transparent(self, rgba: Tensor) -> Tensor:
        """(B, 4, H, W) in [0, 1] → adjusted latent; the VAE sees the picture on mid grey."""
        return self.encode_opaque(pictures.over(rgba, torch.full((1, 3, 1, 1), 0.5))) + self.offset(rgba * 2 - 1)

    def decode(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent → the VAE's picture in [-1, 1], and what the transparent decoder makes of it: (B, 4, H, W), alpha first."""
        rgb = self.vae.decode(latent, return_dict=False)[0]
        return rgb, self.decoder((rgb / 2 + 0.5).clamp(0, 1), latent)


def load_trained() -> LatentTransparency:
    """The networks as they were last saved, for use."""
    model = LatentTransparency()
    model.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["model"])
    return model.eval().requires_grad_(False)


class Crops:
    """Random crops of the training pictures (or of those held out), with what `pictures` does to them."""

    def __init__(self, seed: int, *, held_out: bool = False):
        self._sets = [pictures_ for pictures_, _ in load(TRAINING_SETS).values()]
        self._weights = np.array([WEIGHTS[name] for name in TRAINING_SETS])
        self._weights /= self._weights.sum()
        self._rng = np.random.default_rng(seed)
        self.torch_rng = torch.Generator().manual_seed(seed)
        self._held_out = held_out

    def batch(self, count: int, side: int) -> Tensor:
        """(count, 4, side, side) in [0, 1]."""
        crops = np.stack([self._crop(side) for _ in range(count)])
        rgba = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
        turned = torch.rand(count, generator=self.torch_rng) < 0.5
        angles = torch.rand(count, generator=self.torch_rng) * 2 * torch.pi * turned
        rgba = pictures.turn_hue(rgba, angles)
        return pictures.soften(rgba, self.torch_rng) if self._rng.random() < 0.25 else rgba

    def whole(self, count: int, *, soft: float = 0.0) -> Tensor:
        """Whole pictures as they are, or with this chance made soft, (count, 4, 256, 256)."""
        rgba = torch.from_numpy(np.stack([self._crop(256) for _ in range(count)])).permute(0, 3, 1, 2).float() / 255
        return pictures.soften(rgba, self.torch_rng) if soft and self._rng.random() < soft else rgba

    def _crop(self, side: int) -> np.ndarray:
        while True:
            chosen = self._sets[self._rng.choice(len(self._sets), p=self._weights)]
            index = int(self._rng.integers(len(chosen)))
            if (index % HELD_OUT == 7) == self._held_out:
                break
        picture = chosen[index]
        for _ in range(4):
            top, left = self._rng.integers(0, 256 - side + 1, 2)
            crop = picture[top : top + side, left : left + side]
            if crop[..., 3].mean() > 60:
                break
        return crop[:, ::-1] if self._rng.random() < 0.5 and not self._held_out else crop


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean structural similarity (Wang et al. 2004) of pictures in [-1, 1], 7x7 windows."""
    pool = lambda each: F.avg_pool2d(each, 7, 2)  # noqa: E731
    x, y = (x + 1) / 2, (y + 1) / 2
    mean_x, mean_y = pool(x), pool(y)
    var_x, var_y = pool(x * x) - mean_x**2, pool(y * y) - mean_y**2
    both = pool(x * y) - mean_x * mean_y
    return (
        ((2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4)) / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
    ).mean()


def edges(x: Tensor) -> Tensor:
    """Differences of neighbours, both ways."""
    return torch.cat([(x[..., 1:, :] - x[..., :-1, :]).flatten(1), (x[..., 1:] - x[..., :-1]).flatten(1)], 1)


def likeness(made: Tensor, wanted: Tensor) -> Tensor:
    """Loss between pictures in [-1, 1]: absolute, edges, structure, and colour on a coarse scale."""
    chroma = lambda each: F.avg_pool2d(torch.einsum("ij,bjhw->bihw", pictures.YIQ[1:], each), 4)  # noqa: E731
    return (
        (made - wanted).abs().mean()
        + 0.5 * (edges(made) - edges(wanted)).abs().mean()
        + 0.15 * (1 - ssim(made, wanted))
        + 2 * (chroma(made) - chroma(wanted)).abs().mean()
    )


def beyond(alpha: Tensor, true_alpha: Tensor) -> Tensor:
    """Alpha as the loss sees it: empty must be below zero and full above one by a margin, so that both are exact once cut to [0, 1]."""
    empty, full = F.relu(alpha + MARGIN), 1 - F.relu(1 + MARGIN - alpha)
    return torch.where(true_alpha == 0, empty, torch.where(true_alpha == 1, full, alpha))


def loss_of(model: LatentTransparency, rgba: Tensor, noise: float, rng: torch.Generator) -> tuple[Tensor, float]:
    """The loss of one batch, half of it laid on backgrounds as opaque pictures; and the spread of the latent."""
    count, _, high, wide = rgba.shape
    background = pictures.random_background(count, high, wide, rng)
    opaque = pictures.over(rgba, background)
    grey = pictures.over(rgba, torch.full((1, 3, 1, 1), 0.5))
    half = count // 2
    with torch.autocast("cpu", torch.bfloat16):
        plain = model.encode_opaque(torch.cat([opaque[:half], grey[half:]]))
        hidden = plain[half:] + model.offset(rgba[half:] * 2 - 1)
        latent = torch.cat([plain[:half], hidden]).float()
        latent = latent + torch.randn(latent.shape, generator=rng) * noise
        rgb = model.vae.decode(latent, return_dict=False)[0].float()
        made = model.decoder((rgb[half:] / 2 + 0.5).clamp(0, 1), latent[half:]).float()
    wanted = torch.cat([opaque[:half], grey[half:]]) * 2 - 1
    alpha, color = made[:, :1], made[:, 1:]
    true_alpha = rgba[half:, 3:]
    alpha = beyond(alpha, true_alpha)
    other = torch.rand(count - half, 3, 1, 1, generator=rng)
    loss = likeness(rgb, wanted)
    if torch.rand(1, generator=rng) < COARSE_SHARE:
        with torch.autocast("cpu", torch.bfloat16):
            coarse = model.vae.decode(F.avg_pool2d(latent, 2), return_dict=False)[0].float()
        loss = loss + likeness(coarse, F.avg_pool2d(wanted, 2))
    loss = loss + 2 * (alpha - true_alpha).abs().mean() + (edges(alpha) - edges(true_alpha)).abs().mean()
    laid, true_laid = color * alpha + other * (1 - alpha), pictures.over(rgba[half:], other)
    loss = loss + likeness(laid * 2 - 1, true_laid * 2 - 1)
    loss = loss + 0.3 * ((color - rgba[half:, :3]).abs() * (true_alpha > 0.02)).mean()
    spread = latent.std().clamp(min=1e-3)
    centre = latent.mean((0, 2, 3)).pow(2).mean()
    return loss + 0.02 * (spread.log() ** 2 + centre), float(spread.detach())


@torch.inference_mode()
def evaluate(model: LatentTransparency, count: int = 64, sheet: Path | None = None) -> dict[str, float]:
    """On held-out whole pictures at 256 px: PSNR on a checkerboard of greys in dB, alpha error, and colour error (0 to 255)."""
    crops = Crops(5, held_out=True)
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    board = (((y // 16 + x // 16) % 2) * 0.2 + 0.4)[None, None].float()
    psnr: list[float] = []
    alpha_error: list[float] = []
    color_error: list[float] = []
    rows: list[Tensor] = []
    for _ in range(count // 8):
        rgba = crops.whole(8)
        made = model.decode(model.encode_transparent(rgba))[1].clamp(0, 1)
        made = torch.cat([made[:, 1:], made[:, :1]], 1)
        laid, true = pictures.over(made, board), pictures.over(rgba, board)
        psnr += (-10 * torch.log10((laid - true).pow(2).mean((1, 2, 3)))).tolist()
        alpha_error.append(float((made[:, 3] - rgba[:, 3]).abs().mean()))
        solid = rgba[:, 3:] > 0.5
        mean = lambda each, where=solid: (each[:, :3] * where).sum((2, 3)) / where.sum((2, 3))  # noqa: E731
        color_error.append(float((mean(made) - mean(rgba)).abs().mean()) * 255)
        if len(rows) < 4:
            rows += [torch.cat(list(true), -1), torch.cat(list(laid), -1)]
    if sheet:
        Image.fromarray((torch.cat(rows, -2).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(sheet)
    return {
        "psnr_mean": float(np.mean(psnr)),
        "psnr_worst": float(np.min(psnr)),
        "alpha_error": float(np.mean(alpha_error)),
        "color_error": float(np.mean(color_error)),
    }


@torch.no_grad()
def whiten(model: LatentTransparency, crops: Crops, batches: int = 24) -> None:
    """Give every channel of the adjusted latent mean 0 and spread 1, by changing the convolutions at both its ends.

    Exact but for the picture's border, where convolutions pad with 0; the training that follows mends that.
    """
    latents = torch.cat([model.encode_transparent(crops.batch(8, 128)) for _ in range(batches)])
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp(min=0.05)
    out, offset, into = model.vae.encoder.conv_out, model.offset.conv_out, model.vae.decoder.conv_in
    into.bias += torch.einsum("oihw,i->o", into.weight, mean)
    into.weight *= spread[None, :, None, None]
    injected = model.decoder.latent_conv_in
    injected.bias += injected.weight[:, :, 0, 0] @ mean
    injected.weight *= spread[None, :, None, None]
    out.bias.copy_((out.bias - mean) / spread)
    offset.bias.copy_(offset.bias / spread)
    for layer in (out, offset):
        layer.weight /= spread[:, None, None, None]


def train(steps: int, learning_rate: float = 1e-3) -> None:
    """Train for so many steps in all and save; goes on from the last checkpoint, on the same schedule."""
    ranks.join()
    torch.manual_seed(0)
    model = LatentTransparency().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    step = 0
    if CHECKPOINT.is_file():
        saved = torch.load(CHECKPOINT, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    crops = Crops((step + 1) * 100 + ranks.rank())
    torch.manual_seed((step + 1) * 100 + ranks.rank())
    start = last = time.time()
    while step < steps:
        done = step / steps
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        side, count = (64, 8) if done < 0.6 else (128, 3)
        if step == int(0.6 * steps):
            whiten(model, Crops(7))
        rgba = crops.batch(count, side).contiguous(memory_format=torch.channels_last)
        loss, spread = loss_of(model, rgba, LATENT_NOISE * min(1.0, done * 8), crops.torch_rng)
        optimizer.zero_grad()
        loss.backward()
        ranks.average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if ranks.rank() > 0:
            continue
        if step % 50 == 0:
            print(
                f"{step} {time.time() - start:.0f} s side {side} loss {loss.item():.3f} spread {spread:.2f}", flush=True
            )
        if time.time() - last > 120:
            save(model, optimizer, step)
            last = time.time()
    if ranks.rank() == 0:
        save(model, optimizer, step)
        print(evaluate(model.eval(), sheet=CACHE / "autoencoder.png"), flush=True)


def refine(steps: int, learning_rate: float = 3e-4) -> None:
    """Train the two decoders on, with the encoders as they are: latents and UNets that were made stay valid."""
    saved = torch.load(CHECKPOINT, weights_only=True)
    model = LatentTransparency().to(memory_format=torch.channels_last)
    model.load_state_dict(saved["model"])
    model.vae.encoder.requires_grad_(False)
    model.offset.requires_grad_(False)
    decoders = [*model.vae.decoder.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.AdamW(decoders, learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    refined = saved.get("refined", 0)
    crops = Crops(100_000 + refined)
    start = last = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                learning_rate * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
        # whole pictures, too: the borders of crops are not those of pictures
        rgba = (crops.whole(2) if step % 3 == 2 else crops.batch(4, 128)).contiguous(memory_format=torch.channels_last)
        loss, _ = loss_of(model, rgba, LATENT_NOISE, crops.torch_rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoders, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"refine {step + 1} {time.time() - start:.0f} s loss {loss.item():.3f}", flush=True)
        if time.time() - last > 120 or step + 1 == steps:
            saved.update(model=model.state_dict(), refined=refined + step + 1)
            torch.save(saved, CHECKPOINT.with_suffix(".new"))
            CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)
            last = time.time()
    print(evaluate(model.eval(), sheet=CACHE / "autoencoder.png"), flush=True)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the checkpoint as a whole."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(content, CHECKPOINT.with_suffix(".new"))
    CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--refine", type=int, metavar="STEPS", help="train the decoders on, and the encoders not")
    options = parser.parse_args()
    if options.refine:
        refine(options.refine)
    else:
        train(options.steps)
