"""Train the autoencoder with latent transparency at 512x512.

One run trains three networks (Zhang and Agrawala, "Transparent Image Layer Diffusion using Latent
Transparency", 2024):

    opaque image       -> VAE encoder -> z                VAE decoder(z) = the image
    transparent image  -> VAE encoder(image on grey) + offset encoder(RGBA) -> z'
                                                          VAE decoder(z') = the image on grey
                                                          transparent decoder(that, z') = RGBA

Latents are 16 times smaller on a side and have 4 channels. All networks reach full resolution in
their last layer only, by pixel shuffle, so that a CPU can afford wide layers.
"""

from __future__ import annotations

import argparse
import signal
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import Encoder
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training import images
from training.alphalayer_imports import NamedWeights, TransparentDecoder
from training.data import CACHE, FOLDER, SIDE, load_set
from training.precision import mixed_precision

CHECKPOINT = CACHE / "autoencoder.pt"
UNFINISHED = FOLDER / "unfinished"
LATENT_CHANNELS = 4
DOWNSAMPLING = 16
ALPHA_MARGIN = 0.02
LATENT_NOISE = 0.05
COARSE_SHARE = 0.15
"""Share of the batches whose latent is also halved and must decode to the halved image.

It keeps the latent smooth, so that a UNet can learn it (Kouzelis et al. 2025, "EQ-VAE").
"""
DECODER_CONFIG = {
    "in_channels": 3,
    "out_channels": 4,
    "latent_channels": LATENT_CHANNELS,
    "block_out_channels": [48, 64, 96],
    "layers_per_block": 1,
    "attention_blocks": 0,
    "latent_block": 2,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
PATCH_SIDE = 4
SET_WEIGHTS = {
    "fluent": 2.0,
    "noto": 1.0,
    "fluent-flat": 0.7,
    "noto-v1": 0.7,
    "twemoji": 0.7,
    "streamline": 0.5,
    "openclipart": 1.0,
}
"""Shares of the sets. `fluent-3d` has the drawings of `fluent` at 256 pixels and stays out."""
HELD_OUT_SHARE = 20
ENCODER_RATE = 0.2
"""Learning rate of the encoders as a share of the decoders'."""
DECAY_SECONDS = 1500.0
"""Time before the deadline in which the learning rate falls to zero."""


class PatchTransparentDecoder(nn.Module):
    """Transparent decoder that works on squares of 4x4 pixels and adds to the VAE's colours."""

    def __init__(self):
        super().__init__()
        area = PATCH_SIDE**2
        config = {**DECODER_CONFIG, "in_channels": 3 * area, "out_channels": 4 * area}
        self.network = TransparentDecoder(**config)
        nn.init.zeros_(self.network.conv_out.weight)
        nn.init.zeros_(self.network.conv_out.bias)

    def forward(self, pixels: Tensor, latent: Tensor) -> Tensor:
        """Decode alpha and straight colours.

        Args:
            pixels: The VAE's image in [0, 1], (B, 3, H, W).
            latent: Adjusted latent, (B, 4, H/16, W/16).

        Returns:
            Alpha and RGB, (B, 4, H, W), about [0, 1].
        """
        decoded = self.network(F.pixel_unshuffle(pixels, PATCH_SIDE), latent)
        decoded = F.pixel_shuffle(decoded, PATCH_SIDE)
        return torch.cat([decoded[:, :1] + 0.5, decoded[:, 1:] + pixels], 1)


def make_vae() -> AutoencoderDC:
    """Return the VAE: 512x512 to 32x32 with 4 channels, convolutions only."""
    no_attention = ((), (), (), (), ())
    return AutoencoderDC(
        in_channels=3,
        latent_channels=LATENT_CHANNELS,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(16, 16, 32, 64, 128),
        decoder_block_out_channels=(32, 32, 64, 128, 128),
        encoder_layers_per_block=(0, 1, 1, 1, 2),
        decoder_layers_per_block=(0, 1, 2, 2, 3),
        encoder_qkv_multiscales=no_attention,
        decoder_qkv_multiscales=no_attention,
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        scaling_factor=1.0,
    )


def make_offset_encoder() -> nn.Module:
    """Return the encoder from RGBA (B, 4, H, W) to an offset of the latent. It begins at zero."""
    encoder = Encoder(
        in_channels=4,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 16, 32, 64, 128),
        layers_per_block=(0, 1, 1, 1, 1),
        qkv_multiscales=((), (), (), (), ()),
        out_shortcut=False,
    )
    nn.init.normal_(encoder.conv_out.weight, std=1e-3)
    nn.init.zeros_(encoder.conv_out.bias)
    return encoder


class LatentTransparency(nn.Module):
    """VAE, offset encoder and transparent decoder."""

    def __init__(self):
        super().__init__()
        self.vae = make_vae()
        self.offset = make_offset_encoder()
        self.decoder = PatchTransparentDecoder()

    def encode_opaque(self, rgb: Tensor) -> Tensor:
        """Encode opaque images, (B, 3, H, W) in [0, 1]."""
        return self.vae.encode(rgb * 2 - 1).latent

    def encode_transparent(self, rgba: Tensor) -> Tensor:
        """Encode transparent images, (B, 4, H, W) in [0, 1]. The VAE sees them on mid grey."""
        grey = images.composite(rgba, torch.full((1, 3, 1, 1), 0.5))
        return self.encode_opaque(grey) + self.offset(rgba * 2 - 1)

    def decode(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Decode a latent.

        Returns:
            The VAE's image in [-1, 1], and alpha and RGB in about [0, 1], (B, 4, H, W).
        """
        rgb = self.vae.decode(latent, return_dict=False)[0]
        return rgb, self.decoder((rgb / 2 + 0.5).clamp(0, 1), latent)

    def reconstruct(self, rgba: Tensor) -> Tensor:
        """Encode and decode transparent images.

        Returns:
            Straight RGBA, (B, 4, H, W) in [0, 1].
        """
        decoded = self.decode(self.encode_transparent(rgba))[1].clamp(0, 1)
        return decoded[:, [1, 2, 3, 0]]


def load_trained() -> LatentTransparency:
    """Load the averaged networks of the last checkpoint, for inference."""
    model = LatentTransparency()
    if CHECKPOINT.is_file():
        model.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["average"])
    else:
        load_unfinished(model)
    return model.eval().requires_grad_(False)


def load_unfinished(model: LatentTransparency) -> None:
    """Load the float16 weights that the repository has from a training that is not finished."""
    copy_weights(load_file(UNFINISHED / "autoencoder.safetensors"), model)


def copy_weights(weights: Mapping[str, Tensor], network: nn.Module) -> None:
    """Copy tensors of a file into all parameters of a network."""
    parameters = NamedWeights(network)
    assert weights.keys() == parameters.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def export_unfinished() -> None:
    """Write the averaged weights of the last checkpoint as float16 into the repository."""
    model = LatentTransparency()
    model.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["average"])
    UNFINISHED.mkdir(exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in NamedWeights(model).items()}
    save_file(weights, UNFINISHED / "autoencoder.safetensors")


def is_held_out(label: str) -> bool:
    """Return whether images of a label are kept out of the autoencoder's training."""
    return zlib.crc32(label.encode()) % HELD_OUT_SHARE == 7


class ImageSampler:
    """Random crops and whole images of the sets, augmented.

    Args:
        seed: Seed of all random numbers.
        held_out: Whether to take the images kept out of the training instead.
    """

    def __init__(self, seed: int, *, held_out: bool = False):
        available = [name for name in SET_WEIGHTS if (CACHE / "images" / f"{name}.json").is_file()]
        self._sets: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        for name in available:
            array, labels = load_set(name)
            self._sets.append(array)
            chosen = [i for i, label in enumerate(labels) if is_held_out(label) == held_out]
            self._rows.append(np.array(chosen))
        weights = np.array([SET_WEIGHTS[name] for name in available])
        self._weights = weights / weights.sum()
        self._rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self._held_out = held_out

    def crops(self, count: int, side: int) -> Tensor:
        """Return augmented crops, (count, 4, side, side) in [0, 1]."""
        rgba = _to_tensor([self._crop(side) for _ in range(count)])
        rotated = torch.rand(count, generator=self.generator) < 0.5
        angles = torch.rand(count, generator=self.generator) * 2 * torch.pi * rotated
        rgba = images.rotate_hue(rgba, angles)
        if self._rng.random() < 0.2:
            rgba = images.soften(rgba, self.generator)
        return rgba.contiguous(memory_format=torch.channels_last)

    def whole(self, count: int, *, soft_share: float = 0.0) -> Tensor:
        """Return whole images, (count, 4, 512, 512), softened with a chance of `soft_share`."""
        rgba = _to_tensor([self._crop(SIDE) for _ in range(count)])
        if soft_share and self._rng.random() < soft_share:
            rgba = images.soften(rgba, self.generator)
        return rgba.contiguous(memory_format=torch.channels_last)

    def _crop(self, side: int) -> np.ndarray:
        number = self._rng.choice(len(self._sets), p=self._weights)
        image = self._sets[number][self._rng.choice(self._rows[number])]
        crop = image
        for _ in range(6):
            # Multiples of 2 keep edges where whole images have them.
            top, left = self._rng.integers(0, (SIDE - side) // 2 + 1, 2) * 2
            crop = image[top : top + side, left : left + side]
            if crop[..., 3].mean() > 60:
                break
        if self._held_out:
            return crop
        return np.rot90(crop[:, :: 1 - 2 * int(self._rng.integers(2))], self._rng.integers(4))


def _to_tensor(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean structural similarity (Wang et al. 2004) in 7x7 windows.

    Args:
        first: (B, 3, H, W) in [-1, 1].
        second: The same shape.
    """
    pool = lambda image: F.avg_pool2d(image, 7, 3)  # noqa: E731
    first, second = (first + 1) / 2, (second + 1) / 2
    mean_1, mean_2 = pool(first), pool(second)
    variance_1 = pool(first * first) - mean_1**2
    variance_2 = pool(second * second) - mean_2**2
    covariance = pool(first * second) - mean_1 * mean_2
    similarity = (2 * mean_1 * mean_2 + 1e-4) * (2 * covariance + 9e-4)
    similarity = similarity / ((mean_1**2 + mean_2**2 + 1e-4) * (variance_1 + variance_2 + 9e-4))
    return similarity.mean()


def gradient_error(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean absolute difference of the two images' gradients."""
    difference = first - second
    vertical = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    horizontal = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    return (vertical + horizontal) / 2


def image_loss(output: Tensor, target: Tensor) -> Tensor:
    """Compare images in [-1, 1]: values, gradients, structure, and colour on a coarse scale."""
    chroma = torch.einsum("ij,bjhw->bihw", images.RGB_TO_YIQ[1:], F.avg_pool2d(output - target, 8))
    return (
        (output - target).abs().mean()
        + gradient_error(output, target)
        + 0.2 * (1 - ssim(output, target))
        + 2 * chroma.abs().mean()
    )


def stretch_alpha(alpha: Tensor, true_alpha: Tensor) -> Tensor:
    """Return alpha as the loss sees it.

    Empty must be below zero and full above one by a margin. Both are exact once clamped.
    """
    empty, full = F.relu(alpha + ALPHA_MARGIN), 1 - F.relu(1 + ALPHA_MARGIN - alpha)
    return torch.where(true_alpha == 0, empty, torch.where(true_alpha == 1, full, alpha))


def compute_loss(
    model: LatentTransparency, rgba: Tensor, noise: float, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Compute the loss of a batch. The first quarter is laid on backgrounds as opaque images.

    Args:
        model: The networks.
        rgba: (B, 4, H, W) in [0, 1].
        noise: Standard deviation of the noise added to the latent, as a share of its own.
        generator: Source of random numbers.

    Returns:
        The loss, and figures for the log.
    """
    count, _, height, width = rgba.shape
    opaque_count = max(1, count // 4)
    background = images.random_background(opaque_count, height, width, generator)
    opaque = images.composite(rgba[:opaque_count], background)
    grey = images.composite(rgba[opaque_count:], torch.full((1, 3, 1, 1), 0.5))
    target = torch.cat([opaque, grey])
    with mixed_precision():
        latent = model.encode_opaque(target)
        hidden = latent[opaque_count:] + model.offset(rgba[opaque_count:] * 2 - 1)
        clean = torch.cat([latent[:opaque_count], hidden]).float()
        # Noise in proportion to the spread: a fixed one would reward an ever larger latent.
        spread = clean.std((0, 2, 3), keepdim=True)
        noise_level = noise * spread.detach()
        latent = clean + torch.randn(clean.shape, generator=generator) * noise_level
        rgb = model.vae.decode(latent, return_dict=False)[0].float()
        pixels = (rgb[opaque_count:] / 2 + 0.5).clamp(0, 1)
        decoded = model.decoder(pixels, latent[opaque_count:]).float()
    loss = image_loss(rgb, target * 2 - 1)
    if torch.rand(1, generator=generator) < COARSE_SHARE and height >= 128:
        with mixed_precision():
            coarse = model.vae.decode(F.avg_pool2d(latent, 2), return_dict=False)[0].float()
        loss = loss + 0.5 * image_loss(coarse, F.avg_pool2d(target * 2 - 1, 2))
    loss = loss + rgba_loss(decoded, rgba[opaque_count:], generator)
    center = clean.mean((0, 2, 3)).pow(2).mean()
    loss = loss + 0.05 * (spread.clamp(min=1e-3).log().pow(2).mean() + center)
    return loss, {"loss": float(loss.detach()), "spread": float(spread.detach().mean())}


def rgba_loss(decoded: Tensor, rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Compare the transparent decoder's output with true images.

    Args:
        decoded: Alpha and RGB, (B, 4, H, W).
        rgba: True images, (B, 4, H, W).
        generator: Source of random numbers.
    """
    true_alpha = rgba[:, 3:]
    alpha, color = stretch_alpha(decoded[:, :1], true_alpha), decoded[:, 1:]
    background = torch.rand(len(rgba), 3, 1, 1, generator=generator)
    output = color * alpha + background * (1 - alpha)
    loss = image_loss(output * 2 - 1, images.composite(rgba, background) * 2 - 1)
    loss = loss + 2 * (alpha - true_alpha).abs().mean() + 2 * gradient_error(alpha, true_alpha)
    return loss + 0.3 * ((color - rgba[:, :3]).abs() * (true_alpha > 0.02)).mean()


class WeightAverage:
    """Exponential average of a model's weights."""

    def __init__(self, model: nn.Module, longest: float = 0.995):
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._longest = longest
        self._steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights."""
        self._steps += 1
        keep = min(self._longest, (1 + self._steps) / (10 + self._steps))
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - keep)


class Stop:
    """Flag that SIGTERM and SIGINT set, so that a run can save before it ends."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def learning_rate_factor(step: int, remaining_seconds: float) -> float:
    """Return the share of the learning rate: a warm-up, a plateau, a fall before the deadline."""
    return min(1.0, (step + 1) / 100) * min(1.0, max(0.02, remaining_seconds / DECAY_SECONDS))


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """Return the optimizer whose state is in the checkpoints.

    The encoders are slower. Otherwise they run away from what the decoders can read.
    """
    encoders, decoders = [], []
    for name, value in model.named_parameters():
        (encoders if name.startswith(("vae.encoder", "offset")) else decoders).append(value)
    groups = [{"params": encoders, "factor": ENCODER_RATE}, {"params": decoders, "factor": 1.0}]
    return torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)


def train(minutes: float, learning_rate: float = 1.5e-3) -> None:
    """Train until the deadline or SIGTERM, from the last checkpoint or committed weights.

    Args:
        minutes: Time from now to the deadline.
        learning_rate: Highest learning rate.
    """
    model = LatentTransparency()
    step = 0
    saved = torch.load(CHECKPOINT, weights_only=True) if CHECKPOINT.is_file() else None
    if saved is None and (UNFINISHED / "autoencoder.safetensors").is_file():
        load_unfinished(model)
    elif saved is not None:
        model.load_state_dict(saved["model"])
        step = saved["step"]
    model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, learning_rate)
    average = WeightAverage(model)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        average.weights = saved["average"]
    first = step
    sampler = ImageSampler(1000 + step)
    torch.manual_seed(1000 + step)
    stop, start, last_saved, mean_loss = Stop(), time.time(), time.time(), None
    while (remaining := minutes * 60 - (time.time() - start)) > 0 and not stop.requested:
        for group in optimizer.param_groups:
            factor = group["factor"] * learning_rate_factor(step - first, remaining)
            group["lr"] = learning_rate * factor
        # The borders of crops are not those of images.
        rgba = sampler.whole(2, soft_share=0.3) if step % 40 == 39 else sampler.crops(6, 128)
        noise = LATENT_NOISE * min(1.0, step / 200)
        loss, figures = compute_loss(model, rgba, noise, sampler.generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        step += 1
        value = figures["loss"]
        mean_loss = value if mean_loss is None else 0.98 * mean_loss + 0.02 * value
        if step % 50 == 0:
            print(
                f"step {step} wall {time.time() - start:.0f} s cpu {time.process_time():.0f} s "
                f"loss {mean_loss:.4f} spread {figures['spread']:.2f}",
                flush=True,
            )
        if time.time() - last_saved > 180:
            save(model, optimizer, average, step)
            last_saved = time.time()
    save(model, optimizer, average, step)
    print(f"saved step {step}, cpu {time.process_time():.0f} s", flush=True)


def save(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage, step: int
) -> None:
    """Write the checkpoint atomically."""
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.weights,
        "step": step,
    }
    torch.save(content, CHECKPOINT.with_suffix(".new"))
    CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)


def steep_edges(image: Tensor, inside: Tensor) -> Tensor:
    """Return the mean of the 2,000 largest differences of neighbours inside the objects, (B,)."""
    vertical = (image[..., 1:, :] - image[..., :-1, :]).abs()
    vertical = vertical * (inside[..., 1:, :] & inside[..., :-1, :])
    horizontal = (image[..., 1:] - image[..., :-1]).abs() * (inside[..., 1:] & inside[..., :-1])
    return torch.cat([vertical.flatten(1), horizontal.flatten(1)], 1).topk(2000, 1).values.mean(1)


def inner_edge_ratio(output: Tensor, rgba: Tensor) -> Tensor:
    """Return the steepness of edges inside the objects as a share of the true one, (B,).

    Args:
        output: Straight RGBA, (B, 4, H, W).
        rgba: True images of the same shape.
    """
    inside = F.max_pool2d((rgba[:, 3:] < 0.98).float(), 9, 1, 4) < 0.5
    grey = torch.full((1, 3, 1, 1), 0.5)
    truth = steep_edges(images.composite(rgba, grey), inside)
    return steep_edges(images.composite(output, grey), inside) / truth.clamp(min=1e-3)


def half_transparent_share(rgba: Tensor) -> Tensor:
    """Return the share of pixels whose alpha is between 0.04 and 0.96."""
    return ((rgba[:, 3] > 0.04) & (rgba[:, 3] < 0.96)).float().mean()


@torch.inference_mode()
def evaluate(model: nn.Module, count: int = 64, sheet: Path | None = None) -> dict[str, float]:
    """Measure the reconstruction of whole images that were held out.

    Args:
        model: Network with `reconstruct`.
        count: Number of images, a multiple of 8.
        sheet: Where to write true and reconstructed images beside each other.

    Returns:
        PSNR at 256 pixels on a checkerboard of greys in dB, alpha error, mean colour error (0 to
        255), inner edges as a share of the true ones at 256 and 512 pixels, half-transparent
        pixels as a multiple of the true ones at 512 pixels.
    """
    sampler = ImageSampler(5, held_out=True)
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    board = (((y // 16 + x // 16) % 2) * 0.2 + 0.4)[None, None].float()
    names = ("psnr", "alpha", "color", "edges_256", "edges_512", "half", "half_true")
    values: dict[str, list[float]] = {name: [] for name in names}
    rows: list[Tensor] = []
    for _ in range(count // 8):
        rgba = sampler.whole(8)
        output = torch.cat([model.reconstruct(part).float() for part in rgba.split(2)])
        small, small_output = images.downsample(rgba), images.downsample(output)
        error = images.composite(small_output, board) - images.composite(small, board)
        values["psnr"] += (-10 * error.pow(2).mean((1, 2, 3)).log10()).tolist()
        values["alpha"].append(float((output[:, 3] - rgba[:, 3]).abs().mean()))
        solid = rgba[:, 3:] > 0.5
        means = [(part[:, :3] * solid).sum((2, 3)) / solid.sum((2, 3)) for part in (output, rgba)]
        values["color"].append(float((means[0] - means[1]).abs().mean()) * 255)
        values["edges_256"] += inner_edge_ratio(small_output, small).tolist()
        values["edges_512"] += inner_edge_ratio(output, rgba).tolist()
        values["half"].append(float(half_transparent_share(output)))
        values["half_true"].append(float(half_transparent_share(rgba)))
        if len(rows) < 6:
            board_512 = F.interpolate(board, scale_factor=2)
            rows += [
                torch.cat(list(images.composite(part, board_512)[..., 96:416, 96:416]), -1)
                for part in (rgba, output)
            ]
    if sheet:
        pixels = (torch.cat(rows, -2).clamp(0, 1) * 255).byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(sheet)
    return {
        "psnr_mean": float(np.mean(values["psnr"])),
        "psnr_worst": float(np.min(values["psnr"])),
        "alpha_error": float(np.mean(values["alpha"])),
        "color_error": float(np.mean(values["color"])),
        "edges_256": float(np.median(values["edges_256"])),
        "edges_512": float(np.median(values["edges_512"])),
        "half_transparent_ratio": float(np.mean(values["half"]) / np.mean(values["half_true"])),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--evaluate", action="store_true", help="only measure the last checkpoint")
    parser.add_argument("--export", action="store_true", help="only write the unfinished weights")
    options = parser.parse_args()
    if options.export:
        export_unfinished()
    elif options.evaluate:
        print(evaluate(load_trained(), sheet=CACHE / "autoencoder.png"))
    else:
        train(options.minutes, options.learning_rate)
