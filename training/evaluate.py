"""Measure the shipped model with a classifier that knows other vendors' images only.

Writes one JSON report:
    ceiling: The classifier on training images, and on what the autoencoder leaves of them.
    prompts: Right concepts among the first one and five over the paraphrases, with chance.
    styles: The same with a style word behind each prompt.
    colors: How often a colour word decides the main hue.
    seeds: How different images of other seeds are.
    memorisation: How near the nearest training image is.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import captions, contact_sheet, images
from training.alphalayer_imports import LocalEngine
from training.autoencoder import load_trained
from training.concepts import read_concepts
from training.data import CACHE, EVALUATION_SETS, TRAINING_SETS, load_set, load_sets
from training.latents import nearest_color, read_samples, to_tensor
from training.precision import mixed_precision
from training.text import read_paraphrases

CHECKPOINT = CACHE / "classifier.pt"
SIDE = 64
REPORT = contact_sheet.DOCS / "evaluation.json"
STYLES = ("cartoon", "flat icon", "sticker", "pixel art")


class Classifier(nn.Module):
    """Small convolutional network with a score for every concept."""

    def __init__(self, classes: int):
        super().__init__()
        widths = (64, 128, 160)
        layers: list[nn.Module] = [nn.Conv2d(4, 32, 5, stride=2, padding=2), nn.BatchNorm2d(32)]
        layers += [nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        entering = 32
        for width in widths:
            layers += [nn.Conv2d(entering, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if width < widths[-1] else []
            entering = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(widths[-1] * 16, 256),
            nn.ReLU(),
            nn.Linear(256, classes),
        )

    def forward(self, rgba: Tensor) -> Tensor:
        """Score premultiplied RGBA, (B, 4, 64, 64) in [0, 1].

        Returns:
            Scores, (B, classes).
        """
        return self.head(self.body(rgba))


def concept_labels() -> list[str]:
    """Return the labels in the classifier's order."""
    return [concept.label for concept in read_concepts()]


def shrink(rgba: np.ndarray) -> Tensor:
    """Return images, (N, side, side, 4) uint8, as premultiplied (N, 4, 64, 64) in [0, 1]."""
    parts: list[Tensor] = []
    for start in range(0, len(rgba), 64):
        part = torch.from_numpy(np.array(rgba[start : start + 64])).permute(0, 3, 1, 2)
        part = images.premultiply(part.float() / 255)
        parts.append(F.avg_pool2d(part, part.shape[-1] // SIDE))
    return torch.cat(parts)


def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, move, scale and mirror images. Change hue, strength of colour and sharpness."""
    count = len(batch)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, scale, stretch = uniform(-0.35, 0.35), uniform(0.8, 1.35), uniform(0.85, 1.18)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [
        torch.stack([cos * mirror, -sin * stretch, uniform(-0.15, 0.15)], -1),
        torch.stack([sin * mirror, cos * stretch, uniform(-0.15, 0.15)], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(batch.shape), align_corners=False)
    moved = F.grid_sample(batch, grid, align_corners=False)
    rotated = images.rotate_hue(moved, uniform(-3.14, 3.14) * (uniform(0, 1) < 0.4))
    grey = rotated[:, :3].mean(1, keepdim=True)
    strength = uniform(0.3, 1.2)[:, None, None, None]
    brightness = uniform(0.7, 1.2)[:, None, None, None]
    color = ((grey + (rotated[:, :3] - grey) * strength) * brightness).clamp(0, 1)
    out = torch.cat([torch.minimum(color, rotated[:, 3:]), rotated[:, 3:]], 1)
    if torch.rand(1, generator=generator) < 0.3:
        out = F.avg_pool2d(out, 3, 1, 1)
    return out + torch.randn(out.shape, generator=generator) * 0.02


def train_classifier(steps: int) -> Classifier:
    """Train on the evaluation sets, or load the last result."""
    labels = concept_labels()
    model = Classifier(len(labels))
    if CHECKPOINT.is_file():
        model.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
        return model.eval()
    torch.manual_seed(0)
    numbers = {label: number for number, label in enumerate(labels)}
    stacks: list[Tensor] = []
    targets: list[int] = []
    for array, set_labels in load_sets(EVALUATION_SETS).values():
        kept = [row for row, label in enumerate(set_labels) if label in numbers]
        stacks.append(shrink(array[kept]))
        targets += [numbers[set_labels[row]] for row in kept]
    data, target = torch.cat(stacks), torch.tensor(targets)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(0, len(data), (48,), generator=generator)
        with mixed_precision():
            scores = model(augment(data[rows], generator))
        loss = F.cross_entropy(scores.float(), target[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 200 == 0:
            print(f"classifier step {step} loss {loss.item():.3f}", flush=True)
    torch.save(model.state_dict(), CHECKPOINT)
    return model.eval()


@torch.inference_mode()
def score(model: Classifier, rgba: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Return the shares of images whose concept is the first, or among the first five."""
    numbers = {label: number for number, label in enumerate(concept_labels())}
    mirrored = np.ascontiguousarray(rgba[:, :, ::-1])
    scores = model(shrink(rgba)).softmax(-1) + model(shrink(mirrored)).softmax(-1)
    target = torch.tensor([numbers[label] for label in labels])
    first = scores.topk(5).indices
    return {
        "top1": float((first[:, 0] == target).float().mean()),
        "top5": float((first == target[:, None]).any(1).float().mean()),
    }


def measure_ceiling(model: Classifier, count: int = 200) -> dict[str, dict[str, float]]:
    """Score training images as they are and through the autoencoder."""
    rng = random.Random(0)
    known = set(concept_labels())
    sets = load_sets(TRAINING_SETS)
    pool = [
        (name, row)
        for name, (_, labels) in sets.items()
        for row, label in enumerate(labels)
        if label in known
    ]
    chosen = rng.sample(pool, count)
    labels = [sets[name][1][row] for name, row in chosen]
    autoencoder = load_trained()
    plain: list[np.ndarray] = []
    rebuilt: list[np.ndarray] = []
    for name, row in chosen:
        rgba = to_tensor(sets[name][0][row])
        with torch.inference_mode():
            output = autoencoder.reconstruct(rgba)
        for target, tensor in ((plain, rgba), (rebuilt, output)):
            target.append((tensor[0].permute(1, 2, 0) * 255).round().byte().numpy())
    return {
        "training_images": score(model, np.stack(plain), labels),
        "autoencoder": score(model, np.stack(rebuilt), labels),
    }


def main_hue_of(rgba: np.ndarray) -> float | None:
    """Return the main hue of an image, (side, side, 4) uint8."""
    tensor = torch.from_numpy(np.array(rgba)).permute(2, 0, 1)[None].float() / 255
    return images.main_hue(tensor)


def measure_colors(engine: LocalEngine, count: int = 50) -> dict[str, float]:
    """Generate colours of concepts that no training image shows and that are not their own."""
    recolorable = own_colors()
    shown = {(sample.label, sample.color) for sample in read_samples()}
    pairs = [
        (color, concept)
        for concept in read_concepts()
        for color in captions.HUES
        if recolorable.get(concept.label, color) != color and (concept.label, color) not in shown
    ]
    random.Random(0).shuffle(pairs)
    right = 0
    for color, concept in pairs[:count]:
        first, _, rest = concept.name.partition(" ")
        plain = rest if rest and first in captions.COLORS else concept.name
        hue = main_hue_of(contact_sheet.generate(engine, f"a {color} {plain}"))
        right += hue is not None and nearest_color(hue) == color
    total = len(pairs[:count])
    return {"pairs": total, "right_color": right / max(total, 1), "chance": 1 / len(captions.HUES)}


def own_colors() -> dict[str, str]:
    """Return the colour of the concepts that have the same main colour in two designs or more."""
    votes: dict[str, list[str | None]] = {}
    known = set(concept_labels())
    for name in ("fluent", "noto", "twemoji"):
        array, labels = load_set(name)
        for row, label in enumerate(labels):
            if label in known:
                hue = main_hue_of(array[row])
                votes.setdefault(label, []).append(nearest_color(hue) if hue is not None else None)
    colors: dict[str, str] = {}
    for label, names in votes.items():
        first = max(set(names), key=names.count)
        if first is not None and names.count(first) >= 2:
            colors[label] = first
    return colors


def measure_seeds(engine: LocalEngine, seeds: int = 4) -> dict[str, float]:
    """Return mean absolute differences of images, premultiplied, in [0, 1]."""
    prompts = contact_sheet.read_prompts()[::8]
    by_prompt = {
        prompt: [
            shrink(contact_sheet.generate(engine, prompt, 100 + seed)[None])[0]
            for seed in range(seeds)
        ]
        for prompt in prompts
    }

    def differences(group: list[Tensor]) -> list[float]:
        return [
            float((first - second).abs().mean())
            for number, first in enumerate(group)
            for second in group[:number]
        ]

    same_prompt = [value for group in by_prompt.values() for value in differences(group)]
    return {
        "other_seed": float(np.mean(same_prompt)),
        "smallest_other_seed": float(np.min(same_prompt)),
        "other_prompt": float(np.mean(differences([group[0] for group in by_prompt.values()]))),
    }


def measure_memorisation(engine: LocalEngine) -> dict[str, object]:
    """Return distances of the sheet's images to the nearest training image."""
    sets = load_sets(TRAINING_SETS)
    gallery = torch.cat([shrink(array) for array, _ in sets.values()]).flatten(1)
    origins = [f"{name}: {label}" for name, (_, labels) in sets.items() for label in labels]
    nearest: dict[str, tuple[str, float]] = {}
    for prompt in contact_sheet.read_prompts():
        own = shrink(contact_sheet.generate(engine, prompt)[None]).flatten(1)
        distance = (gallery - own).abs().mean(1)
        best = int(distance.argmin())
        nearest[prompt] = (origins[best], round(float(distance[best]), 4))
    between: list[float] = []
    for row in range(0, len(gallery), len(gallery) // 200):
        distance = (gallery - gallery[row]).abs().mean(1)
        distance[row] = 9.0
        between.append(float(distance.min()))
    distances = [distance for _, distance in nearest.values()]
    return {
        "mean": float(np.mean(distances)),
        "smallest": float(np.min(distances)),
        "between_training_images": float(np.mean(between)),
        "nearest": nearest,
    }


def main() -> None:
    """Evaluate the shipped model. The report is written after every part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classifier-steps", type=int, default=4000)
    model = train_classifier(parser.parse_args().classifier_steps)
    labels = {concept.name: concept.label for concept in read_concepts()}
    prompts = [(p, labels[name]) for p, name in read_paraphrases().items() if name in labels]
    engine = contact_sheet.make_engine()

    def measure_prompts(ending: str = "", step: int = 1) -> dict[str, float]:
        chosen = prompts[::step]
        generated = [contact_sheet.generate(engine, prompt + ending) for prompt, _ in chosen]
        figures = score(model, np.stack(generated), [label for _, label in chosen])
        return {"count": len(chosen), **figures}

    def measure_styles() -> dict[str, dict[str, float]]:
        endings = {style: measure_prompts(f", {style}", 4) for style in STYLES}
        return {"plain": measure_prompts("", 4), **endings}

    report: dict[str, object] = {"concepts": len(labels), "chance_top5": 5 / len(labels)}
    parts: dict[str, Callable[[], object]] = {
        "ceiling": lambda: measure_ceiling(model),
        "prompts": measure_prompts,
        "styles": measure_styles,
        "colors": lambda: measure_colors(engine),
        "seeds": lambda: measure_seeds(engine),
        "memorisation": lambda: measure_memorisation(engine),
    }
    for name, part in parts.items():
        report[name] = part()
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(json.dumps(report, indent=1) + "\n")
        print(name, json.dumps(report[name])[:300], flush=True)


if __name__ == "__main__":
    main()
