"""Does the shipped model draw what is asked? Judged by a small classifier that has seen other vendors' emoji only.

Reports, as one JSON line: top-1 and top-5 over the paraphrases; the same for the training pictures themselves and for what the autoencoder
leaves of them (the ceiling), and chance; how often a colour word changes the colour; how unlike the pictures of other seeds are; and
how near the nearest training picture is.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphalayer.engine.pipeline import LocalEngine
from training import captions, contact_sheet, pictures
from training.autoencoder import load_trained
from training.data import CACHE, EVALUATION_SETS, TRAINING_SETS, load, read_concepts
from training.latents import SUBJECTS, dominant_hue, nearest_color
from training.text import paraphrases

CHECKPOINT = CACHE / "classifier.pt"
SIDE = 64
REPORT = contact_sheet.DOCS / "evaluation.json"


class Classifier(nn.Module):
    """(B, 4, 64, 64) premultiplied RGBA → a score for every concept."""

    def __init__(self, classes: int):
        super().__init__()
        widths = (64, 128, 160)
        layers: list[nn.Module] = [nn.Conv2d(4, 32, 5, stride=2, padding=2), nn.BatchNorm2d(32), nn.ReLU()]
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
        entering = 32
        for width in widths:
            layers += [nn.Conv2d(entering, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if width < widths[-1] else []
            entering = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(widths[-1] * 16, 256), nn.ReLU(), nn.Linear(256, classes)
        )

    def forward(self, rgba: Tensor) -> Tensor:
        """Scores (B, classes)."""
        return self.head(self.body(rgba))


def small(rgba: np.ndarray) -> Tensor:
    """(N, 256, 256, 4) uint8 → (N, 4, 64, 64) premultiplied in [0, 1]."""
    tensor = torch.from_numpy(np.asarray(rgba)).permute(0, 3, 1, 2).float() / 255
    return F.avg_pool2d(torch.cat([tensor[:, :3] * tensor[:, 3:], tensor[:, 3:]], 1), 256 // SIDE)


def augment(batch: Tensor, rng: torch.Generator) -> Tensor:
    """Turned, moved, scaled, mirrored; hue, strength of colour, opacity and sharpness changed."""
    count = len(batch)
    uniform = lambda low, high: torch.rand(count, generator=rng) * (high - low) + low  # noqa: E731
    angle, scale, stretch = uniform(-0.35, 0.35), uniform(0.8, 1.35), uniform(0.85, 1.18)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    rows = [
        torch.stack([angle.cos() * scale * mirror, -angle.sin() * scale * stretch, uniform(-0.15, 0.15)], -1),
        torch.stack([angle.sin() * scale * mirror, angle.cos() * scale * stretch, uniform(-0.15, 0.15)], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(batch.shape), align_corners=False)
    moved = F.grid_sample(batch, grid, align_corners=False)
    turned = pictures.turn_hue(moved, uniform(-3.14, 3.14) * (uniform(0, 1) < 0.4))
    grey = turned[:, :3].mean(1, keepdim=True)
    strength = uniform(0.3, 1.2)[:, None, None, None]
    color = ((grey + (turned[:, :3] - grey) * strength) * uniform(0.7, 1.2)[:, None, None, None]).clamp(0, 1)
    out = torch.cat([torch.minimum(color, turned[:, 3:]), turned[:, 3:]], 1)
    if torch.rand(1, generator=rng) < 0.3:
        out = F.avg_pool2d(out, 3, 1, 1)
    return out + torch.randn(out.shape, generator=rng) * 0.02


def train_classifier(steps: int) -> Classifier:
    """Train on the evaluation sets, or load what was trained."""
    names = [concept.label for concept in read_concepts()]
    model = Classifier(len(names))
    if CHECKPOINT.is_file():
        model.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
        return model.eval()
    torch.manual_seed(0)
    stacks, targets = [], []
    for images, labels in load(EVALUATION_SETS).values():
        kept = [i for i, label in enumerate(labels) if label in names]
        stacks.append(small(images[kept]))
        targets += [names.index(labels[i]) for i in kept]
    data, target = torch.cat(stacks), torch.tensor(targets)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rng = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(0, len(data), (48,), generator=rng)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(augment(data[rows], rng))
        loss = F.cross_entropy(scores.float(), target[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 200 == 0:
            print(f"classifier {step} loss {loss.item():.3f}", flush=True)
    torch.save(model.state_dict(), CHECKPOINT)
    return model.eval()


@torch.inference_mode()
def hits(model: Classifier, rgba: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Share of pictures whose concept is the first, or among the first five."""
    names = [concept.label for concept in read_concepts()]
    flipped = rgba[:, :, ::-1]
    scores = model(small(rgba)).softmax(-1) + model(small(np.ascontiguousarray(flipped))).softmax(-1)
    target = torch.tensor([names.index(label) for label in labels])
    first = scores.topk(5).indices
    return {
        "top1": float((first[:, 0] == target).float().mean()),
        "top5": float((first == target[:, None]).any(1).float().mean()),
    }


def ceiling(model: Classifier, count: int = 200) -> dict[str, dict[str, float]]:
    """The classifier on pictures of the training vendors, as they are and through the autoencoder."""
    rng = random.Random(0)
    names = {concept.label for concept in read_concepts()}
    pool = [
        (name, i)
        for name, (_, labels) in load(TRAINING_SETS).items()
        for i, label in enumerate(labels)
        if label in names
    ]
    chosen, sets = rng.sample(pool, count), load(TRAINING_SETS)
    rgba = np.stack([sets[name][0][i] for name, i in chosen])
    labels = [sets[name][1][i] for name, i in chosen]
    networks = load_trained()
    rebuilt: list[np.ndarray] = []
    with torch.inference_mode():
        for start in range(0, count, 8):
            batch = torch.from_numpy(rgba[start : start + 8]).permute(0, 3, 1, 2).float() / 255
            made = networks.decode(networks.encode_transparent(batch))[1].clamp(0, 1)
            made = torch.cat([made[:, 1:], made[:, :1]], 1).permute(0, 2, 3, 1)
            rebuilt.append((made * 255).byte().numpy())
    return {"training_pictures": hits(model, rgba, labels), "autoencoder": hits(model, np.concatenate(rebuilt), labels)}


def color_pairs(engine: LocalEngine, count: int = 50) -> dict[str, float]:
    """(colour, concept) pairs that no training picture shows and that are not its own: how often the main hue is nearest to the word."""
    recolorable = _recolorable_labels()
    shown = {(each["concept"], each["color"]) for each in json.loads(SUBJECTS.read_text())["subjects"]}
    pairs = [
        (color, concept)
        for number, concept in enumerate(read_concepts())
        for color in captions.HUES
        if recolorable.get(concept.label, color) != color and (number, color) not in shown
    ]
    random.Random(0).shuffle(pairs)
    right = 0
    for color, concept in pairs[:count]:
        plain = concept.name.split(" ", 1)[-1] if concept.name.split(" ")[0] in captions.COLORS else concept.name
        hue = dominant_hue(contact_sheet.draw(engine, f"a {color} {plain}"))
        right += hue is not None and nearest_color(hue) == color
    total = len(pairs[:count])
    return {"pairs": total, "right_color": right / total, "chance": 1 / len(captions.HUES)}


def _recolorable_labels() -> dict[str, str]:
    """Concepts whose pictures have one dominant colour in most sets, with that colour."""
    votes: dict[str, list[str | None]] = {}
    names = {concept.label for concept in read_concepts()}
    for images, labels in load({name: TRAINING_SETS[name] for name in ("fluent-3d", "fluent", "noto")}).values():
        for image, label in zip(images, labels, strict=True):
            if label in names:
                hue = dominant_hue(image)
                votes.setdefault(label, []).append(nearest_color(hue) if hue is not None else None)
    found: dict[str, str] = {}
    for label, colors in votes.items():
        first = max(set(colors), key=colors.count)
        if first is not None and colors.count(first) >= 2:
            found[label] = first
    return found


def diversity(engine: LocalEngine, seeds: int = 3) -> dict[str, float]:
    """Mean absolute difference (0 to 1, premultiplied) between pictures of one prompt with other seeds, and of other prompts."""
    chosen = contact_sheet.prompts()[::8]
    drawn = {
        prompt: [small(contact_sheet.draw(engine, prompt, 100 + i)[None])[0] for i in range(seeds)] for prompt in chosen
    }
    within = [float((a - b).abs().mean()) for each in drawn.values() for i, a in enumerate(each) for b in each[:i]]
    firsts = [each[0] for each in drawn.values()]
    across = [float((a - b).abs().mean()) for i, a in enumerate(firsts) for b in firsts[:i]]
    return {
        "other_seed": float(np.mean(within)),
        "smallest_other_seed": float(np.min(within)),
        "other_prompt": float(np.mean(across)),
    }


def memorisation(engine: LocalEngine) -> dict[str, object]:
    """Distance of each picture of the contact sheet to the nearest training picture, and of training pictures to each other."""
    gallery = torch.cat([small(np.asarray(images)) for images, _ in load(TRAINING_SETS).values()]).flatten(1)
    origin = [f"{name}: {label}" for name, (_, labels) in load(TRAINING_SETS).items() for label in labels]
    nearest: dict[str, tuple[str, float]] = {}
    for prompt in contact_sheet.prompts():
        own = small(contact_sheet.draw(engine, prompt)[None]).flatten(1)
        distance = (gallery - own).abs().mean(1)
        best = int(distance.argmin())
        nearest[prompt] = (origin[best], round(float(distance[best]), 4))
    apart = []
    for i in range(0, len(gallery), len(gallery) // 200):
        distance = (gallery - gallery[i]).abs().mean(1)
        distance[i] = 9.0
        apart.append(float(distance.min()))
    distances = [each for _, each in nearest.values()]
    return {
        "mean": float(np.mean(distances)),
        "smallest": float(np.min(distances)),
        "between_training_pictures": float(np.mean(apart)),
        "nearest": nearest,
    }


def main() -> None:
    """Evaluate the shipped model; the report is written beside the contact sheets after every part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classifier-steps", type=int, default=2000)
    model = train_classifier(parser.parse_args().classifier_steps)
    by_name = {concept.name: concept.label for concept in read_concepts()}
    asked = list(paraphrases().items())[:200]
    engine = LocalEngine(Path("models"), device="cpu", dtype="fp32")
    report: dict[str, object] = {"concepts": len(by_name), "chance_top5": 5 / len(by_name)}

    def prompts() -> dict[str, float]:
        drawn = np.stack([contact_sheet.draw(engine, prompt) for prompt, _ in asked])
        return {"count": len(asked), **hits(model, drawn, [by_name[name] for _, name in asked])}

    parts: dict[str, Callable[[], object]] = {
        "ceiling": lambda: ceiling(model),
        "prompts": prompts,
        "colors": lambda: color_pairs(engine),
        "seeds": lambda: diversity(engine),
        "memorisation": lambda: memorisation(engine),
    }
    for name, part in parts.items():
        report[name] = part()
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(json.dumps(report, indent=1) + "\n")
        print(name, json.dumps(report[name])[:300], flush=True)


if __name__ == "__main__":
    main()
