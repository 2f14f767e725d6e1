"""Conditioning from prompts: both text encoders of SDXL, and the plan of a prompt over the steps.

The encoders compute in float32 with weights as stored (float16 in published checkpoints). The
UNet's cross-attention and its added conditioning read the result. This module is independent of
sampling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphalayer.core.cost import max_chunks
from alphalayer.core.errors import InvalidRequest
from alphalayer.engine.networks.clip import ClipTextModel
from alphalayer.engine.text.chunks import Chunk, LearnedWord, chunk_fragments
from alphalayer.engine.text.grammar import parse_weights, schedule_prompt, split_and
from alphalayer.engine.text.textual_inversion import TextualInversion
from alphalayer.engine.text.tokenizer import ClipTokenizer

CACHE_BYTES = 64 * 1024**2
"""Size of the cache of conditionings, on the device: about 100 short prompts of SDXL."""
MAX_CHUNKS = 600
"""Limit of a prompt over all steps: 380 MB for SDXL.

A prompt of 10,000 characters without BREAK has fewer chunks.
"""
CHUNKS_AT_ONCE = 32
"""Limit of one call of an encoder."""
_BLANK = " "


@dataclass(frozen=True)
class Conditioning:
    """Encoded text of n chunks.

    Attributes:
        context: float32 (1, 77 n, width of both encoders).
        pooled: float32 (1, projection width of encoder 2).
    """

    context: Tensor
    pooled: Tensor

    @property
    def nbytes(self) -> int:
        """Return the memory of both tensors in bytes."""
        return self.context.nbytes + self.pooled.nbytes


class TextEncoders:
    """Both text encoders with their tokenizers, and a cache of the latest conditionings.

    Args:
        tokenizer: Tokenizer of encoder 1.
        tokenizer_2: Tokenizer of encoder 2.
        text_encoder: CLIP ViT-L, without projection.
        text_encoder_2: OpenCLIP ViT-bigG, with projection.
        embeddings: Textual inversions by name.
    """

    def __init__(
        self,
        tokenizer: ClipTokenizer,
        tokenizer_2: ClipTokenizer,
        text_encoder: ClipTextModel,
        text_encoder_2: ClipTextModel,
        embeddings: Mapping[str, TextualInversion] | None = None,
    ):
        self._parts = (tokenizer, text_encoder), (tokenizer_2, text_encoder_2)
        self._cache: OrderedDict[tuple[str, int], Conditioning] = OrderedDict()
        self._embeddings: Mapping[str, TextualInversion] | None = None
        self.set_embeddings(embeddings or {})

    def set_embeddings(self, embeddings: Mapping[str, TextualInversion]) -> None:
        """Replace the textual inversions and clear the cache.

        Embeddings of another width are ignored. The same object as before changes nothing.

        Args:
            embeddings: Textual inversions by name.
        """
        if embeddings is self._embeddings:
            return
        widths = tuple(model.width for _, model in self._parts)
        fitting = [
            embedding
            for embedding in embeddings.values()
            if (embedding.clip_l.shape[1], embedding.clip_g.shape[1]) == widths
        ]
        first, second = self._parts
        self._encoders = (
            _Encoder(*first, {embedding.name: embedding.clip_l for embedding in fitting}),
            _Encoder(*second, {embedding.name: embedding.clip_g for embedding in fitting}),
        )
        self._embeddings = embeddings
        self.forget()

    def encode(self, text: str, clip_skip: int = 1) -> Conditioning:
        """Return the conditioning of a text of any length, from the cache if it is there.

        Attention weights and BREAK are applied. Schedules and AND are plain text here.

        Args:
            text: Prompt, or a part of one.
            clip_skip: Layer of the hidden states, counted from the last. 1 means 2 in SDXL.
        """
        key = text, clip_skip
        if key not in self._cache:
            self._cache[key] = self._encode(text, clip_skip)
        self._cache.move_to_end(key)
        conditioning = self._cache[key]
        while sum(cached.nbytes for cached in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return conditioning

    def is_cached(self, text: str, clip_skip: int) -> bool:
        """Check whether the conditioning of a text is in the cache."""
        return (text, clip_skip) in self._cache

    def forget(self) -> None:
        """Clear the cache."""
        self._cache.clear()

    def count_chunks(self, text: str) -> int:
        """Count the chunks of a text."""
        return len(self._split(text)[0])

    def _split(self, text: str) -> list[list[Chunk]]:
        """Split a text into chunks for each encoder.

        Both encoders get the same number of chunks: the shorter list is padded with empty ones.
        """
        lists = [encoder.split(text) for encoder in self._encoders]
        count = max(len(chunks) for chunks in lists)
        return [[*chunks, *(Chunk() for _ in range(count - len(chunks)))] for chunks in lists]

    @torch.inference_mode()
    def _encode(self, text: str, clip_skip: int) -> Conditioning:
        """Encode a text chunk by chunk.

        `context` joins the chunks. It is the hidden state of the last layer but one, or of an
        earlier one, without the final norm. `pooled` is that of the first chunk by encoder 2.

        Source: Podell et al. 2023, "SDXL", arXiv 2307.01952. AUTOMATIC1111 for the chunks.
        """
        layer = max(clip_skip, 2)
        lists = self._split(text)
        hidden = [
            encoder.encode(chunks, layer)
            for encoder, chunks in zip(self._encoders, lists, strict=True)
        ]
        context = torch.cat(
            [_emphasize(states, chunks) for states, chunks in zip(hidden, lists, strict=True)],
            dim=-1,
        )
        pooled = self._encoders[1].pool(hidden[1][:1], lists[1][:1], layer)
        return Conditioning(context.flatten(0, 1)[None], pooled)

    def empty(self) -> Conditioning:
        """Return zeros, the conditioning of an empty negative prompt in SDXL's training."""
        blank = self.encode(_BLANK)
        return Conditioning(torch.zeros_like(blank.context), torch.zeros_like(blank.pooled))


class _Encoder:
    """Text encoder with its tokenizer and its learned vectors by name."""

    def __init__(
        self, tokenizer: ClipTokenizer, model: ClipTextModel, vectors: Mapping[str, Tensor]
    ):
        self._tokenizer, self._model, self._vectors = tokenizer, model, vectors
        comma = tokenizer.encode(",")
        self._comma = comma[0] if len(comma) == 1 else -1
        words = [
            LearnedWord(name, tuple(tokenizer.encode(name)), len(matrix))
            for name, matrix in vectors.items()
        ]
        # a name without tokens cannot occur in a prompt
        self._words = [word for word in words if word.tokens]

    def split(self, text: str) -> list[Chunk]:
        """Split a text into chunks."""
        return chunk_fragments(
            parse_weights(text), self._tokenizer.encode, self._comma, self._words
        )

    def encode(self, chunks: Sequence[Chunk], layer: int) -> Tensor:
        """Return the hidden states of chunks, float32 (chunks, 77, width).

        Args:
            chunks: Chunks of a text. One call of the model takes at most `CHUNKS_AT_ONCE`.
            layer: Layer of the hidden states, counted from the last, which is 1.
        """
        batches = [chunks[i : i + CHUNKS_AT_ONCE] for i in range(0, len(chunks), CHUNKS_AT_ONCE)]
        return torch.cat(
            [self._model(self._ids(batch), layer, self._learned(batch)) for batch in batches]
        )

    def pool(self, hidden: Tensor, chunks: Sequence[Chunk], layer: int) -> Tensor:
        """Return the pooled output of what `encode` returned, (chunks, projection width)."""
        return self._model.pool(hidden, self._ids(chunks), layer)

    def _ids(self, chunks: Sequence[Chunk]) -> Tensor:
        """Return the token ids of chunks on the model's device, (chunks, 77)."""
        device = next(self._model.parameters()).device
        return torch.tensor([self._frame(chunk.tokens) for chunk in chunks], device=device)

    def _frame(self, tokens: list[int]) -> list[int]:
        """Add the start token, the end token and padding: 77 token ids.

        Everything after an end token inside the prompt becomes padding.
        """
        end, pad = self._tokenizer.end, self._tokenizer.pad
        framed = [self._tokenizer.start, *tokens, end] + [pad] * (75 - len(tokens))
        first_end = framed.index(end)
        return framed if pad == end else framed[: first_end + 1] + [pad] * (76 - first_end)

    def _learned(self, chunks: Sequence[Chunk]) -> list[tuple[int, int, Tensor]]:
        """Return row, first position and vectors of each learned word."""
        return [
            (row, position + 1, self._vectors[name])  # the start token comes first
            for row, chunk in enumerate(chunks)
            for position, name in chunk.embeddings
        ]


def _emphasize(hidden: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    """Scale the tokens of each chunk by their weights, then restore the chunk's mean.

    Args:
        hidden: Hidden states, float32 (chunks, 77, width).
        chunks: Weights of the tokens.

    Returns:
        float32 (chunks, 77, width).

    Source: AUTOMATIC1111, emphasis mode "Original" (`modules/sd_emphasis.py`).
    """
    rows = list(hidden)
    for i, chunk in enumerate(chunks):
        if any(weight != 1.0 for weight in chunk.weights):
            weights = torch.ones(len(rows[i]), 1, device=hidden.device)
            weights[1 : 1 + len(chunk.weights), 0] = torch.tensor(chunk.weights)
            weighted = rows[i] * weights
            rows[i] = weighted * (rows[i].mean() / weighted.mean())
    return torch.stack(rows)


@dataclass(frozen=True)
class PromptPlan:
    """Conditionings of a prompt at each step.

    Attributes:
        parts: Weight and schedule of each part. AND separates the parts. A schedule is a list of
            (last step, conditioning).
    """

    parts: Sequence[tuple[float, Sequence[tuple[int, Conditioning]]]]

    def at(self, step: int) -> list[tuple[Conditioning, float]]:
        """Return the conditionings of a step, counted from 0, with their weights."""
        return [
            (next((entry for last, entry in schedule if step <= last), schedule[-1][1]), weight)
            for weight, schedule in self.parts
        ]


def plan_prompt(
    encoders: TextEncoders,
    prompt: str,
    steps: int,
    clip_skip: int = 1,
    check: Callable[[], None] = lambda: None,
) -> PromptPlan:
    """Encode all texts of a prompt over the steps, each once.

    Args:
        encoders: Text encoders.
        prompt: Prompt with weights, BREAK, schedules and AND.
        steps: Sampling steps.
        clip_skip: See `TextEncoders.encode`.
        check: Called before each text. Its exceptions stop the encoding.

    Raises:
        InvalidRequest: The texts have more than `MAX_CHUNKS` chunks, or one has more than its
            length allows, see `max_chunks`.
    """
    return _plan(encoders, split_and(prompt), steps, clip_skip, check, "prompt")


def plan_negative(
    encoders: TextEncoders,
    prompt: str,
    steps: int,
    clip_skip: int = 1,
    check: Callable[[], None] = lambda: None,
) -> PromptPlan:
    """Encode all texts of a negative prompt over the steps.

    AND is plain text here, and an empty prompt gives zeros. The rest is as in `plan_prompt`.
    """
    if prompt == "":
        return PromptPlan([(1.0, [(steps, encoders.empty())])])
    return _plan(encoders, [(prompt, 1.0)], steps, clip_skip, check, "negative_prompt")


def is_cached(
    encoders: TextEncoders, prompt: str, negative_prompt: str, steps: int, clip_skip: int
) -> bool:
    """Check whether the cache holds all conditionings of both prompts."""
    parts = [part for part, _ in split_and(prompt)]
    parts += [negative_prompt] if negative_prompt else []
    return (bool(negative_prompt) or encoders.is_cached(_BLANK, 1)) and all(
        encoders.is_cached(text, clip_skip)
        for part in parts
        for _, text in schedule_prompt(part, steps)
    )


def _plan(
    encoders: TextEncoders,
    parts: Sequence[tuple[str, float]],
    steps: int,
    clip_skip: int,
    check: Callable[[], None],
    field: str,
) -> PromptPlan:
    schedules = [(weight, schedule_prompt(part, steps)) for part, weight in parts]
    encoded: dict[str, Conditioning] = {}
    chunks = 0
    for text in dict.fromkeys(text for _, schedule in schedules for _, text in schedule):
        check()
        count = encoders.count_chunks(text)
        if count > max_chunks(text):
            raise InvalidRequest(
                f"its embeddings fill {count} chunks of 75 tokens; at most {max_chunks(text)} "
                "for a text of this length.",
                hint="Use fewer or smaller embeddings.",
                field=field,
            )
        chunks += count
        if chunks > MAX_CHUNKS:
            raise InvalidRequest(
                f"its texts over {steps} steps have more than {MAX_CHUNKS} chunks of 75 tokens.",
                hint="Shorten it, or use fewer BREAKs or fewer changes between steps, as in [a|b].",
                field=field,
            )
        encoded[text] = encoders.encode(text, clip_skip)
    return PromptPlan(
        [
            (weight, [(last, encoded[text]) for last, text in schedule])
            for weight, schedule in schedules
        ]
    )
