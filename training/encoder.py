"""Train the transparent encoder of the shipped model. All its other networks stay as they are.

The encoder gives an offset of the VAE's latent, so that the shipped decoders read colour and alpha:

    image on grey          -> VAE encoder         -> z       (frozen)
    alpha, padded colours  -> transparent encoder -> offset  (trained)
    z + offset             -> VAE decoder, transparent decoder -> RGBA  (frozen)

It learns from two kinds of images. Training images must come back from the frozen decoders.
Images that the model itself generated must get the latents they came from, because the UNet knows
no others.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from training import captions, images
from training.alphalayer_imports import (
    MODEL_FOLDER,
    DiffusionModel,
    GenerationRequest,
    LocalEngine,
    Precision,
    TransparentDecoder,
    TransparentEncoder,
    decode_transparent,
    find_models,
    load_encoder,
    load_model,
    on_grey,
    pad_colours,
)
from training.autoencoder import (
    HELD_OUT_SHARE,
    ImageSampler,
    Stop,
    WeightAverage,
    image_loss,
    rgba_loss,
)
from training.data import CACHE, FOLDER

CHECKPOINT = CACHE / "encoder.pt"
PAIRS = CACHE / "encoder-pairs"
FILE = MODEL_FOLDER / "layerdiffuse" / "encoder.safetensors"
MODELS = Path("models")
SIDE = 256
"""Side of the shipped model's images in pixels."""
WIDTHS = (16, 16, 32, 32, 64, 64, 160, 160)
PAIR_COUNT, SHARD_SIZE = 400, 25
PAIR_INTERVAL, PAIR_WEIGHT = 4, 0.5
"""Steps between two generated images, and the weight of their loss."""
LATENT_NOISE = 0.05
SOFT_SHARE, THIN_SHARE = 0.2, 0.4
"""Shares of the batches whose alpha is softened, and of those that get one opacity."""
FALLING_SHARE = 0.4
"""Share of the steps in which the learning rate falls."""
SAVING_INTERVAL = 120
"""CPU seconds between two checkpoints."""
FIXED_IMAGES = 16
"""Held-out images by which the best weights are chosen."""


def shipped_names() -> list[str]:
    """Return the names of the concepts that the shipped model knows."""
    text = (FOLDER / "concepts.txt").read_text(encoding="utf-8").partition("# People")[0]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [line.partition(" = ")[2].partition(";")[0].strip() for line in lines]


def make_prompt(number: int) -> str:
    """Return a prompt with a concept, and often with a colour or softness."""
    rng = random.Random(number)
    names = shipped_names()
    words = [names[number % len(names)]]
    if rng.random() < 0.4:
        words.insert(0, rng.choice(list(captions.COLORS)))
    if rng.random() < 0.25:
        words.insert(0, rng.choice(["translucent", "see-through", "glass", "glowing"]))
    return f"a {' '.join(words)}, high quality"


def load_shipped() -> DiffusionModel:
    """Load the shipped model in float32, outside the engine's inference mode."""
    entry = find_models(MODELS)[-1]
    assert entry.path == MODEL_FOLDER
    precision = Precision(torch.float32, torch.float32, torch.float32, torch.channels_last)
    model = load_model(entry, precision, MODELS)
    # The transparent encoder halves its input three times.
    assert (model.latent.channels, model.latent.cell) == (4, 8)
    return model


def generate_pairs() -> None:
    """Write the shards of generated images and their latents that are not there yet."""
    if len(list(PAIRS.glob("*.npz"))) * SHARD_SIZE >= PAIR_COUNT:
        return
    engine = LocalEngine(MODELS, device="cpu", dtype="fp32")
    PAIRS.mkdir(parents=True, exist_ok=True)
    engine.warm_up()
    latents: list[Tensor] = []
    decoder = engine.model.modules["vae"].get_submodule("decoder")
    hook = decoder.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0].clone()))
    for first in range(0, PAIR_COUNT, SHARD_SIZE):
        path = PAIRS / f"{first:04d}.npz"
        if path.is_file():
            continue
        latents.clear()
        rgba: list[np.ndarray] = []
        for number in range(first, first + SHARD_SIZE):
            request = GenerationRequest(
                prompt=make_prompt(number),
                seed=number,
                model="alphalayer-mini",
                sampler="DPM++ 2M",
                steps=10,
            )
            rgba.append(engine.generate(request).images[0].rgba)
        np.savez_compressed(path, latents=torch.cat(latents).numpy(), images=np.stack(rgba))
        print(path.stem, flush=True)
    hook.remove()


class Pairs:
    """Generated images, and the latents they came from.

    Args:
        model: The shipped model.
        held_out: Whether to take the images kept out of the training instead.
    """

    def __init__(self, model: DiffusionModel, *, held_out: bool = False):
        shards = [np.load(path) for path in sorted(PAIRS.glob("*.npz"))]
        arrays = np.concatenate([shard["images"] for shard in shards])
        latents = torch.from_numpy(np.concatenate([shard["latents"] for shard in shards]))
        chosen = [row for row in range(len(arrays)) if (row % HELD_OUT_SHARE == 7) == held_out]
        self.images, self.latents = arrays[chosen], latents[chosen]
        self._model = model
        self._encoded: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def rgba(self, row: int) -> Tensor:
        """Return one image, (1, 4, 256, 256) in [0, 1]."""
        return torch.from_numpy(self.images[row : row + 1]).permute(0, 3, 1, 2).float() / 255

    def loss(self, encoder: nn.Module, row: int) -> Tensor:
        """Return the squared error of the latent of one image."""
        if row not in self._encoded:
            self._encoded[row] = encode(self._model, None, self.rgba(row))
        latent = self._encoded[row] + encoder(to_argb(self.rgba(row)))
        return (latent - self.latents[row]).pow(2).mean()


def to_argb(rgba: Tensor) -> Tensor:
    """Return alpha and padded colours (B, 4, H, W), as the encoder reads them."""
    arrays = (rgba * 255).round().byte().permute(0, 2, 3, 1).numpy()
    padded = np.stack([pad_colours(array) for array in arrays])
    argb = torch.cat([rgba[:, 3:], torch.from_numpy(padded).permute(0, 3, 1, 2)], 1)
    return argb.contiguous(memory_format=torch.channels_last)


def make_encoder() -> TransparentEncoder:
    """Return a new encoder, whose offset begins near zero."""
    encoder = TransparentEncoder((*WIDTHS, 4))
    layers = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    nn.init.normal_(layers[-1].weight, std=1e-3)
    return encoder.to(memory_format=torch.channels_last)


def decode(model: DiffusionModel, latent: Tensor) -> tuple[Tensor, Tensor]:
    """Decode latents of the VAE in one pass.

    Returns:
        The VAE's image in [-1, 1], and alpha and RGB in about [0, 1].
    """
    rgb = model.modules["vae"].decode(latent)
    return rgb, model.decoder((rgb / 2 + 0.5).clamp(0, 1), latent)


def sample_images(sampler: ImageSampler, step: int) -> Tensor:
    """Return two crops or one whole image, at the shipped model's size.

    The borders of crops are not those of images.
    """
    is_whole = step % 8 == 7
    rgba = sampler.whole(1) if is_whole else sampler.crops(2, SIDE)
    if step % 16 == 15:
        rgba = images.move(rgba, sampler.generator)
    choice = float(torch.rand(1, generator=sampler.generator))
    if choice < SOFT_SHARE:
        rgba = images.soften(rgba, sampler.generator)
    elif choice < SOFT_SHARE + THIN_SHARE:
        rgba = images.thin(rgba, sampler.generator)
    return images.downsample(rgba)


def compute_loss(
    model: DiffusionModel, encoder: nn.Module, rgba: Tensor, generator: torch.Generator
) -> Tensor:
    """Compute the loss of images (B, 4, H, W) against what the decoders return."""
    grey = on_grey(rgba).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        encoded = model.modules["vae"].encode(grey)
    latent = encoded + encoder(to_argb(rgba))
    latent = latent + torch.randn(latent.shape, generator=generator) * LATENT_NOISE
    rgb, decoded = decode(model, latent)
    return 0.5 * image_loss(rgb, grey) + rgba_loss(decoded, rgba, generator)


def train(steps: int, learning_rate: float = 1e-3) -> None:
    """Train for a number of steps in all, or until SIGTERM, from the last checkpoint.

    Args:
        steps: Steps since the first start. The learning rate falls to zero towards the last.
        learning_rate: Highest learning rate.
    """
    generate_pairs()
    model = load_shipped()
    pairs, fixed = Pairs(model), held_out_images(FIXED_IMAGES)
    encoder = make_encoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), learning_rate, betas=(0.9, 0.98))
    average, step, best = WeightAverage(encoder), 0, {"score": 0.0}
    if CHECKPOINT.is_file():
        saved = torch.load(CHECKPOINT, weights_only=True)
        encoder.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.weights, step, best = saved["average"], saved["step"], saved["best"]
    sampler = ImageSampler(1000 + step)
    torch.manual_seed(1000 + step)
    stop, start, saved_at = Stop(), time.time(), time.process_time()
    means, pair = {"loss": 0.0, "pair": 0.0}, torch.zeros(())
    while step < steps and not stop.requested:
        for group in optimizer.param_groups:
            fall = min(1.0, max(0.02, (1 - step / steps) / FALLING_SHARE))
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * fall
        rgba = sample_images(sampler, step)
        loss = compute_loss(model, encoder, rgba, sampler.generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step % PAIR_INTERVAL == 0:
            pair = pairs.loss(encoder, int(torch.randint(len(pairs), (1,))))
            (PAIR_WEIGHT * pair).backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        average.update(encoder)
        step += 1
        keep = 0.98 if means["loss"] else 0.0
        for name, value in (("loss", loss), ("pair", pair)):
            means[name] = keep * means[name] + (1 - keep) * float(value.detach())
        if step % 50 == 0:
            print(
                f"step {step} wall {time.time() - start:.0f} s cpu {time.process_time():.0f} s "
                f"loss {means['loss']:.4f} pair {means['pair']:.4f}",
                flush=True,
            )
        if time.process_time() - saved_at > SAVING_INTERVAL:
            best = save(model, encoder, optimizer, average, step, best, fixed)
            saved_at = time.process_time()
    save(model, encoder, optimizer, average, step, best, fixed)


def save(
    model: DiffusionModel,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
    step: int,
    best: dict[str, Any],
    fixed: Tensor,
) -> dict[str, Any]:
    """Write the checkpoint atomically.

    Returns:
        The best averaged weights so far, with their score and step.
    """
    candidate = make_encoder()
    candidate.load_state_dict(average.weights)
    figures = measure(reconstruct(model, candidate, fixed), fixed)
    score = figures["alpha"] + figures["color"]
    print(f"step {step} held out {figures}", flush=True)
    if score > best["score"]:
        weights = {name: value.clone() for name, value in average.weights.items()}
        best = {"score": score, "weights": weights, "step": step}
    content = {
        "model": encoder.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.weights,
        "step": step,
        "best": best,
    }
    torch.save(content, CHECKPOINT.with_suffix(".new"))
    CHECKPOINT.with_suffix(".new").replace(CHECKPOINT)
    return best


def held_out_images(count: int) -> Tensor:
    """Return whole images that this training does not see, (count, 4, 256, 256)."""
    return images.downsample(ImageSampler(5, held_out=True).whole(count))


@torch.no_grad()
def encode(model: DiffusionModel, encoder: nn.Module | None, rgba: Tensor) -> Tensor:
    """Return latents of the VAE, with the encoder's offset or without one."""
    latent = model.modules["vae"].encode(on_grey(rgba))
    return latent if encoder is None else latent + encoder(to_argb(rgba))


@torch.no_grad()
def reconstruct(
    model: DiffusionModel, encoder: nn.Module | None, rgba: Tensor, *, every_pass: bool = False
) -> Tensor:
    """Encode and decode images.

    Args:
        model: The shipped model.
        encoder: The transparent encoder. None: no offset.
        rgba: (B, 4, H, W) in [0, 1].
        every_pass: Whether to decode in eight orientations, as the engine does.
    """
    return torch.cat(
        [
            render_latent(model, encode(model, encoder, part), every_pass=every_pass)
            for part in rgba.split(1)
        ]
    )


@torch.no_grad()
def render_latent(model: DiffusionModel, latent: Tensor, *, every_pass: bool) -> Tensor:
    """Return straight RGBA (1, 4, H, W) in [0, 1] of a latent of the VAE."""
    rgb = model.modules["vae"].decode(latent)
    pixels = (rgb / 2 + 0.5).clamp(0, 1)
    run = decode_transparent if every_pass else TransparentDecoder.__call__
    return run(model.decoder, pixels, latent).clamp(0, 1)[:, [1, 2, 3, 0]]


def measure(output: Tensor, rgba: Tensor) -> dict[str, float]:
    """Compare reconstructed images with true ones.

    Args:
        output: Straight RGBA, (B, 4, 256, 256) in [0, 1].
        rgba: True images of the same shape.

    Returns:
        Mean PSNR in dB of alpha, of premultiplied colours and of the image on a checkerboard, the
        worst of the first two, and the mean alpha error in percent.
    """
    board = checkerboard(SIDE)
    error = (images.premultiply(output) - images.premultiply(rgba)).pow(2)
    laid = (images.composite(output, board) - images.composite(rgba, board)).pow(2)
    alpha, color, on_board = (
        -10 * values.mean((1, 2, 3)).log10() for values in (error[:, 3:], error[:, :3], laid)
    )
    figures = {
        "alpha": alpha.mean(),
        "color": color.mean(),
        "board": on_board.mean(),
        "alpha_worst": alpha.min(),
        "color_worst": color.min(),
        "alpha_error": 100 * (output[:, 3] - rgba[:, 3]).abs().mean(),
    }
    return {name: round(float(value), 2) for name, value in figures.items()}


def checkerboard(side: int) -> Tensor:
    """Return squares of two greys, (1, 1, side, side)."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (((y // 16 + x // 16) % 2) * 0.2 + 0.4)[None, None]


def load_best() -> TransparentEncoder:
    """Load the best weights of the checkpoint."""
    encoder = make_encoder()
    encoder.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["best"]["weights"])
    return encoder.eval()


def export() -> int:
    """Write the best weights as float16 into the shipped folder.

    Returns:
        Size of the file in bytes.
    """
    weights = {name: value.half().contiguous() for name, value in load_best().state_dict().items()}
    save_file(weights, FILE)
    path = FILE.with_name("config.json")
    config = json.loads(path.read_text())
    files = {"patch": config.pop("patch"), "decoder": config.pop("decoder"), "encoder": FILE.name}
    version = {"version": config.pop("version")}
    path.write_text(json.dumps(version | files | config, indent=1) + "\n")
    return FILE.stat().st_size


def evaluate(count: int, sheet: Path) -> None:
    """Print figures of the shipped file on held-out images, and write a sheet.

    Args:
        count: Number of training images.
        sheet: Where to write true and reconstructed images beside each other.
    """
    model, encoder = load_shipped(), load_encoder(FILE)
    pairs = Pairs(model, held_out=True)
    generated = torch.cat([pairs.rgba(row) for row in range(len(pairs))])
    shown: list[Tensor] = []
    for name, rgba in (("training images", held_out_images(count)), ("generated", generated)):
        for kind, network in (("no offset", None), ("encoder", encoder)):
            output = reconstruct(model, network, rgba, every_pass=True)
            print(name, kind, measure(output, rgba), flush=True)
            shown += [rgba[:8], output[:8]] if network else []
        latents = torch.cat([encode(model, encoder, part) for part in rgba.split(1)])
        print(name, "mean and spread of the latents", statistics(latents))
    print("latents of the UNet", statistics(pairs.latents))
    rows = [
        torch.cat(list(images.composite(part, background).expand(-1, 3, -1, -1)), -1)
        for background in (checkerboard(SIDE), torch.zeros(1, 1, 1, 1))
        for part in shown
    ]
    pixels = (torch.cat(rows, -2).clamp(0, 1) * 255).byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(sheet)


def statistics(latents: Tensor) -> str:
    """Return mean and spread of each channel."""
    means, spreads = latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()
    return " ".join(f"{a:.2f}±{b:.2f}" for a, b in zip(means, spreads, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--export", action="store_true", help="only write the best weights")
    parser.add_argument("--evaluate", action="store_true", help="only measure the shipped file")
    options = parser.parse_args()
    if options.export:
        print(f"{export()} bytes")
    elif options.evaluate:
        evaluate(48, CACHE / "encoder.png")
    else:
        train(options.steps, options.learning_rate)
