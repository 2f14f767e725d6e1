"""The UNet's training texts: for each picture of `latents` several wordings of what it shows, encoded once for all steps."""

from __future__ import annotations

import json
import os
import random
from multiprocessing import get_context

import numpy as np
import torch
from numpy.lib.format import open_memmap

from training import captions
from training.captions import Subject
from training.data import CACHE, read_concepts
from training.latents import SUBJECTS
from training.text import LENGTH, POOLED, WIDTH_1, WIDTH_2, Encoders

CONTEXT, POOLS = CACHE / "context.npy", CACHE / "pooled.npy"
WORDINGS = 16
"""Different texts for each picture."""
BATCH = 64


def encode(part: tuple[int, int]) -> None:
    """Fill in the rows from one picture to another."""
    torch.set_num_threads(1)
    first, last = part
    rng = random.Random(first)
    concepts, encoders = read_concepts(), Encoders()
    context, pools = np.load(CONTEXT, mmap_mode="r+"), np.load(POOLS, mmap_mode="r+")
    listed = json.loads(SUBJECTS.read_text())["subjects"][first:last]
    subjects = [
        (Subject(concepts[each["concept"]], each["color"], tuple(each["look"])), each["set"]) for each in listed
    ]
    texts = [captions.describe(*subject, rng) for subject in subjects for _ in range(WORDINGS)]
    texts += captions.UNWANTED if last == len(context) // WORDINGS else ()
    for start in range(0, len(texts), BATCH):
        hidden, pooled = encoders(texts[start : start + BATCH])
        rows = slice(first * WORDINGS + start, first * WORDINGS + start + len(hidden))
        context[rows], pools[rows] = hidden.half().numpy(), pooled.half().numpy()


def main() -> None:
    """Encode everything, a process for each core; the texts of negative prompts come last."""
    count = len(json.loads(SUBJECTS.read_text())["subjects"])
    rows = count * WORDINGS + len(captions.UNWANTED)
    open_memmap(CONTEXT, "w+", np.float16, (rows, LENGTH, WIDTH_1 + WIDTH_2)).flush()
    open_memmap(POOLS, "w+", np.float16, (rows, POOLED)).flush()
    cores = os.cpu_count() or 1
    parts = [(count * i // cores, count * (i + 1) // cores) for i in range(cores)]
    with get_context("spawn").Pool(cores) as pool:
        pool.map(encode, parts, chunksize=1)


if __name__ == "__main__":
    main()
