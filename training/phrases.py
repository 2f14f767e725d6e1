"""Encode the captions of the UNet's training once for all steps.

Latents that show the same thing in the same style share their captions.
"""

from __future__ import annotations

import json
import random

import numpy as np
import torch
from numpy.lib.format import open_memmap

from training import captions
from training.captions import Subject
from training.compounds import read_compounds
from training.concepts import read_concepts
from training.data import CACHE
from training.latents import Sample, read_samples
from training.text import LENGTH, POOLED, WIDTH_1, WIDTH_2, Encoders

CONTEXT, POOLS, ROWS = CACHE / "context.npy", CACHE / "pooled.npy", CACHE / "phrases.json"
PLAIN_COUNT, SPECIAL_COUNT = 6, 2
"""Captions of a concept in a style, and of one with a colour or a look."""
BATCH = 64


def key_of(sample: Sample) -> tuple[str, str, str | None, tuple[str, ...]]:
    """Return what decides the captions of a sample."""
    return sample.label, sample.style, sample.color, sample.looks


def main() -> None:
    """Encode the captions. Those of negative prompts come last."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    concepts = {concept.label: concept for concept in (*read_concepts(), *read_compounds())}
    samples = read_samples()
    first_rows: dict[tuple[object, ...], tuple[int, int]] = {}
    texts: list[str] = []
    for key in dict.fromkeys(key_of(sample) for sample in samples):
        label, style, color, looks = key
        count = SPECIAL_COUNT if color or looks else PLAIN_COUNT
        first_rows[key] = (len(texts), count)
        subject = Subject(concepts[label], color, looks)
        texts += [captions.describe(subject, style, rng) for _ in range(count)]
    texts += captions.UNWANTED
    encoders = Encoders()
    context = open_memmap(CONTEXT, "w+", np.float16, (len(texts), LENGTH, WIDTH_1 + WIDTH_2))
    pooled = open_memmap(POOLS, "w+", np.float16, (len(texts), POOLED))
    for start in range(0, len(texts), BATCH):
        hidden, pools = encoders(texts[start : start + BATCH])
        context[start : start + len(hidden)] = hidden.half().numpy()
        pooled[start : start + len(hidden)] = pools.half().numpy()
    context.flush()
    pooled.flush()
    ROWS.write_text(json.dumps([first_rows[key_of(sample)] for sample in samples]))
    print(f"{len(texts)} captions of {len(samples)} latents", flush=True)


if __name__ == "__main__":
    main()
