"""The UNet's training pictures: every picture of every concept, recoloured, mirrored and made soft, as latents with what they show."""

from __future__ import annotations

import json
import os
import random
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from PIL import Image

from training import captions, pictures
from training.autoencoder import LatentTransparency, load_trained
from training.data import CACHE, TRAINING_SETS, Concept, load, read_concepts

TRANSPARENT, OPAQUE, SUBJECTS = CACHE / "latents.npy", CACHE / "opaque.npy", CACHE / "subjects.json"
RECOLORED = 3
"""Other colours that a colourable picture is given."""
BATCH = 16


def dominant_hue(rgba: np.ndarray) -> float | None:
    """The hue (0 to 1) that most of a picture has, None for pictures of many colours or of none."""
    solid = rgba[..., 3] > 128
    hsv = np.asarray(Image.fromarray(rgba[..., :3]).convert("HSV")).astype(np.float32) / 255
    vivid = solid & (hsv[..., 1] > 0.35) & (hsv[..., 2] > 0.25)
    if vivid.sum() < 0.4 * max(solid.sum(), 1):
        return None
    histogram = np.bincount((hsv[..., 0][vivid] * 24).astype(int) % 24, minlength=24).astype(float)
    near = histogram + np.roll(histogram, 1) + np.roll(histogram, -1)
    return float((near.argmax() + 0.5) / 24) if near.max() > 0.5 * histogram.sum() else None


def nearest_color(hue: float) -> str:
    """The colour word of a hue."""
    return min(captions.HUES, key=lambda name: min(abs(captions.HUES[name] - hue), 1 - abs(captions.HUES[name] - hue)))


def recolor(rgba: np.ndarray, hue: float, color: str) -> np.ndarray:
    """The picture with its dominant hue turned to a colour; for black, gray, white and brown, its saturation and value, too."""
    hsv = np.asarray(Image.fromarray(rgba[..., :3]).convert("HSV")).astype(np.float32) / 255
    target = captions.HUES.get(color, 0.06)
    hsv[..., 0] = (hsv[..., 0] + target - hue) % 1.0
    saturation, gain, lift = {
        "white": (0.06, 0.35, 0.65),
        "gray": (0.06, 0.7, 0.05),
        "black": (0.1, 0.3, 0.0),
        "brown": (0.75, 0.6, 0.0),
    }.get(color, (1.0, 1.0, 0.0))
    hsv[..., 1] *= saturation
    hsv[..., 2] = hsv[..., 2] * gain + lift
    rgb = np.asarray(Image.fromarray((hsv.clip(0, 1) * 255).astype(np.uint8), "HSV").convert("RGB"))
    return np.concatenate([rgb, rgba[..., 3:]], -1)


def variants(
    rgba: np.ndarray, concept: Concept, rng: random.Random
) -> list[tuple[np.ndarray, str | None, tuple[str, ...]]]:
    """A picture as it is, mirrored, in other colours, and soft or glowing in its own and another: (RGBA, colour to say, look to say)."""
    flipped = lambda each: each[:, ::-1] if rng.random() < 0.5 else each  # noqa: E731
    hue = dominant_hue(rgba)
    own = nearest_color(hue) if hue is not None else None
    others = [color for color in captions.COLORS if color != own and not captions.is_held_out(color, concept)]
    made: list[tuple[np.ndarray, str | None, tuple[str, ...]]] = [(rgba, None, ()), (rgba[:, ::-1], own, ())]
    if hue is not None:
        for color in rng.sample(others, RECOLORED):
            made.append((flipped(recolor(rgba, hue, color)), color, ()))
    for words, chance, change in ((captions.SOFT, 0.25, _fade), (captions.GLOWING, 0.2, _glow)):
        if rng.random() < chance:
            made.append((flipped(change(rgba, rng)), None, (rng.choice(words),)))
            if hue is not None:
                color = rng.choice(others)
                made.append((flipped(change(recolor(rgba, hue, color), rng)), color, (rng.choice(words),)))
    return made


def _fade(rgba: np.ndarray, rng: random.Random) -> np.ndarray:
    """The same at a third to two thirds of its opacity."""
    alpha = rgba[..., 3:] * rng.uniform(0.35, 0.65)
    return np.concatenate([rgba[..., :3], alpha.round().astype(np.uint8)], -1)


def _glow(rgba: np.ndarray, rng: random.Random) -> np.ndarray:
    """The same over a glow of its own colours."""
    haloed = pictures.halo(_tensor([rgba]), rng.uniform(14, 26), 0.9)
    return (haloed[0].permute(1, 2, 0) * 255).round().byte().numpy()


@torch.inference_mode()
def encode(model: LatentTransparency, batch: list[np.ndarray]) -> torch.Tensor:
    """Pictures → their adjusted latents, float16."""
    return model.encode_transparent(_tensor(batch)).half()


@torch.inference_mode()
def encode_opaque(model: LatentTransparency, batch: list[np.ndarray], generator: torch.Generator) -> torch.Tensor:
    """Pictures laid on light backgrounds → plain latents, float16."""
    backgrounds = pictures.random_background(len(batch), 256, 256, generator) * 0.5 + 0.5
    return model.encode_opaque(pictures.over(_tensor(batch), backgrounds)).half()


def _tensor(batch: list[np.ndarray]) -> torch.Tensor:
    return (
        torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
        / 255
    )


def encode_set(name: str) -> dict[str, Any]:
    """Everything of one set: adjusted latents, what they show, and the plain latents of every eighth batch."""
    torch.set_num_threads(1)
    seed = list(TRAINING_SETS).index(name)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    model = load_trained().to(memory_format=torch.channels_last)
    concepts = {concept.label: (i, concept) for i, concept in enumerate(read_concepts())}
    images, labels = load(TRAINING_SETS)[name]
    shown: list[tuple[np.ndarray, dict[str, Any]]] = []
    for image, label in zip(images, labels, strict=True):
        if label in concepts:
            number, concept = concepts[label]
            for rgba, color, look in variants(image, concept, rng):
                shown.append((rgba, {"concept": number, "set": name, "color": color, "look": look}))
    rng.shuffle(shown)
    hidden: list[torch.Tensor] = []
    plain: list[torch.Tensor] = []
    for start in range(0, len(shown), BATCH):
        batch = [rgba for rgba, _ in shown[start : start + BATCH]]
        hidden.append(encode(model, batch))
        if start % (8 * BATCH) == 0:
            plain.append(encode_opaque(model, batch, generator))
    subjects = [subject for _, subject in shown]
    opaque = [i for i in range(len(subjects)) if i // BATCH % 8 == 0]
    print(name, len(subjects), flush=True)
    return {
        "hidden": torch.cat(hidden).numpy(),
        "plain": torch.cat(plain).numpy(),
        "subjects": subjects,
        "opaque": opaque,
    }


def main() -> None:
    """Encode everything once, a process for each core."""
    with get_context("spawn").Pool(os.cpu_count()) as pool:
        sets = pool.map(encode_set, TRAINING_SETS, chunksize=1)
    np.save(TRANSPARENT, np.concatenate([each["hidden"] for each in sets]))
    np.save(OPAQUE, np.concatenate([each["plain"] for each in sets]))
    subjects = [subject for each in sets for subject in each["subjects"]]
    firsts = np.cumsum([0, *(len(each["subjects"]) for each in sets)])
    opaque = [int(first) + i for first, each in zip(firsts, sets, strict=False) for i in each["opaque"]]
    SUBJECTS.write_text(json.dumps({"subjects": subjects, "opaque": opaque}))


if __name__ == "__main__":
    main()
