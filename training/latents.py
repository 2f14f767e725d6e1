"""Encode the training images of the UNet: moved, recoloured, softened and restyled.

The result lies in shards, so that a run can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training import captions, images
from training.autoencoder import LatentTransparency, load_trained
from training.compounds import compose, read_compounds
from training.concepts import read_concepts
from training.data import CACHE, SIDE, TRAINING_SETS, Concept, load_set
from training.precision import mixed_precision

SHARDS = CACHE / "latents"
SHARD_SIZE = 64
"""Images of a set in one shard, before the copies."""
RECOLOR_SHARE = 0.35
"""Share of the copies of an image of one colour that get another."""
SOFT_SHARE, GLOW_SHARE = 0.06, 0.06
OUTLINE_SHARE, PIXEL_SHARE = 0.06, 0.06
OPAQUE_SHARE = 8
"""One shard in so many is encoded once more on light backgrounds, for the patch."""


@dataclass(frozen=True)
class Sample:
    """What a latent shows; see `captions.Subject`. `image` is the row in the set."""

    label: str
    set: str
    image: int
    style: str
    color: str | None = None
    looks: tuple[str, ...] = ()


def nearest_color(hue: float) -> str:
    """Return the colour word nearest to a hue in [0, 1)."""

    def distance(name: str) -> float:
        apart = abs(captions.HUES[name] - hue)
        return min(apart, 1 - apart)

    return min(captions.HUES, key=distance)


def recolor_as(rgba: Tensor, hue: float, color: str) -> Tensor:
    """Give the main colour of one image, (1, 4, H, W), the colour of a word."""
    saturation, gain, lift = captions.TONES.get(color, (1.0, 1.0, 0.0))
    target = captions.HUES.get(color, 0.06)
    return images.recolor(rgba, hue, target, saturation, gain, lift)


def augment(
    rgba: Tensor, sample: Sample, concept: Concept, generator: torch.Generator, *, first: bool
) -> tuple[Tensor, Sample]:
    """Return one copy of an image and what it shows.

    Args:
        rgba: (1, 4, 512, 512) in [0, 1].
        sample: What the image shows.
        concept: Its concept.
        generator: Source of random numbers.
        first: Whether to leave the image as it is but for a mirror.
    """
    style, color, looks = sample.style, None, ()

    def chance() -> float:
        return float(torch.rand(1, generator=generator))

    def choose(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    rgba = images.move(rgba, generator, 0.0 if first else 1.0)
    hue = images.main_hue(rgba)
    own = None if hue is None else nearest_color(hue)
    if first:
        return rgba, Sample(sample.label, sample.set, sample.image, style, own)
    if hue is not None and chance() < RECOLOR_SHARE:
        others = tuple(
            name
            for name in captions.COLORS
            if name != own and not captions.is_held_out(name, concept)
        )
        color = choose(others)
        rgba = recolor_as(rgba, hue, color)
    else:
        # A small turn of the hue keeps the colour's name and adds variety.
        angle = (torch.rand(1, generator=generator) - 0.5) * 0.5
        rgba = images.rotate_hue(rgba, angle)
        color = own if chance() < 0.3 else None
    kind = chance()
    if kind < SOFT_SHARE:
        opacity = 0.35 + 0.3 * chance()
        rgba = torch.cat([rgba[:, :3], rgba[:, 3:] * opacity], 1)
        looks = (choose(captions.SOFT),)
    elif kind < SOFT_SHARE + GLOW_SHARE:
        rgba = images.add_glow(images.pad_to_fit(rgba, 40), 34 + 20 * chance(), 0.9)
        looks = (choose(captions.GLOWING),)
    elif kind < SOFT_SHARE + GLOW_SHARE + OUTLINE_SHARE:
        rgba = images.add_outline(images.pad_to_fit(rgba, 20), 14, 1.0)
        style = "outline"
    elif kind < SOFT_SHARE + GLOW_SHARE + OUTLINE_SHARE + PIXEL_SHARE:
        rgba, style = images.pixelate(rgba), "pixel art"
    return rgba, Sample(sample.label, sample.set, sample.image, style, color, looks)


def to_tensor(array: np.ndarray) -> Tensor:
    """Return one image of a set as (1, 4, 512, 512) in [0, 1]."""
    rgba = torch.from_numpy(np.array(array)).permute(2, 0, 1)[None].float() / 255
    if rgba.shape[-1] != SIDE:
        larger = F.interpolate(images.premultiply(rgba), (SIDE, SIDE), mode="bicubic")
        rgba = images.unpremultiply(larger.clamp(0, 1))
    return rgba


def images_of_set(name: str) -> Iterator[tuple[np.ndarray, Sample, Concept]]:
    """Yield the images of a set that show a concept, then the compounds made of them."""
    array, labels = load_set(name)
    style = TRAINING_SETS[name].style
    concepts = {concept.label: concept for concept in read_concepts()}
    for row, label in enumerate(labels):
        if label in concepts:
            yield array[row], Sample(label, name, row, style), concepts[label]
    rows = {label: row for row, label in enumerate(labels)}
    for number, (concept, parts) in enumerate(read_compounds().items()):
        if name == "openclipart" or any(part.label not in rows for part in parts):
            continue
        image = compose(parts, {part.label: array[rows[part.label]] for part in parts})
        if image is not None:
            yield image, Sample(concept.label, name, len(labels) + number, style), concept


@torch.inference_mode()
def encode(model: LatentTransparency, rgba: Tensor) -> Tensor:
    """Encode images, (B, 4, 512, 512), as adjusted latents in float16."""
    with mixed_precision():
        return model.encode_transparent(rgba).half()


@torch.inference_mode()
def encode_opaque(model: LatentTransparency, rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Encode images on light backgrounds as plain latents in float16."""
    background = images.random_background(len(rgba), SIDE, SIDE, generator) * 0.5 + 0.5
    with mixed_precision():
        return model.encode_opaque(images.composite(rgba, background)).half()


def encode_set(name: str, copies: int) -> None:
    """Write the shards of one set that are not there yet."""
    model = load_trained().to(memory_format=torch.channels_last)
    listed = list(images_of_set(name))
    SHARDS.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(listed), SHARD_SIZE)):
        path = SHARDS / f"{name}-{number:03d}.json"
        if path.is_file():
            continue
        seed = zlib.crc32(f"{name}/{number}".encode())
        generator = torch.Generator().manual_seed(seed)
        latents: list[Tensor] = []
        opaque: list[Tensor] = []
        samples: list[Sample] = []
        for array, sample, concept in listed[start : start + SHARD_SIZE]:
            rgba = to_tensor(array)
            pairs = [
                augment(rgba, sample, concept, generator, first=copy == 0) for copy in range(copies)
            ]
            batch = torch.cat([image for image, _ in pairs])
            batch = batch.contiguous(memory_format=torch.channels_last)
            latents.append(encode(model, batch))
            if number % OPAQUE_SHARE == 0:
                opaque.append(encode_opaque(model, batch, generator))
            samples += [copy for _, copy in pairs]
        np.save(path.with_suffix(".npy"), torch.cat(latents).numpy())
        if opaque:
            np.save(path.with_suffix(".opaque.npy"), torch.cat(opaque).numpy())
        path.write_text(json.dumps([asdict(sample) for sample in samples]))
        print(path.stem, len(samples), flush=True)


def shard_paths() -> list[Path]:
    """Return the description files of the shards in a fixed order."""
    return sorted(SHARDS.glob("*.json"))


def read_samples() -> list[Sample]:
    """Return what each latent shows, in the order of `read_latents`."""
    return [
        Sample(**{**entry, "looks": tuple(entry["looks"])})
        for path in shard_paths()
        for entry in json.loads(path.read_text())
    ]


def read_latents(*, opaque: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Load the latents.

    Args:
        opaque: Whether to load the plain latents of opaque images instead.

    Returns:
        Latents, (count, 4, 32, 32) float16, and the sample number of each.
    """
    arrays: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    first = 0
    for path in shard_paths():
        count = len(json.loads(path.read_text()))
        array_path = path.with_suffix(".opaque.npy" if opaque else ".npy")
        if array_path.is_file():
            arrays.append(np.load(array_path))
            numbers.append(np.arange(first, first + count))
        first += count
    return np.concatenate(arrays), np.concatenate(numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", help="sets to encode; all if none is named")
    parser.add_argument("--copies", type=int, default=6, help="latents of each image")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for set_name in options.sets or TRAINING_SETS:
        encode_set(set_name, options.copies)
