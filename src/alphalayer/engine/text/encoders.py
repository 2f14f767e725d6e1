"""Conditioning from prompts: text encoders of a model, and the plan of a prompt over the steps.

The encoders compute in float32 with weights as stored (float16 in published checkpoints). The
UNet's cross-attention and its added conditioning read the result. This module is independent of
sampling.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphalayer.core.cost import max_chunks
from alphalayer.core.errors import InvalidRequest
from alphalayer.core.request import Emphasis
from alphalayer.engine.networks.clip import ClipTextModel
from alphalayer.engine.text.chunks import Chunk, LearnedWord, chunk_fragments
from alphalayer.engine.text.grammar import parse_weights, schedule_prompt, split_and
from alphalayer.engine.text.textual_inversion import TextualInversion
from alphalayer.engine.text.tokenizer import ClipTokenizer

CACHE_BYTES = 64 * 1024**2
"""Size of the cache of conditionings, on the device: about 100 short prompts of SDXL."""
MAX_CHUNKS = 600
"""Limit of the chunks of a prompt that are encoded over all steps: 380 MB for SDXL.

A prompt of 10,000 characters without BREAK has fewer chunks.
"""
CHUNKS_AT_ONCE = 32
"""Limit of one call of an encoder."""


@dataclass(frozen=True)
class Conditioning:
    """Encoded text of n chunks.

    Attributes:
        context: float32 (1, 77 n, sum of the encoders' widths).
        pooled: float32 (1, projection width of the last encoder), or (1, 0).
        padding: Tokens after the text. Each repeats the last vector of `context`.
    """

    context: Tensor
    pooled: Tensor
    padding: int = 0

    @property
    def tokens(self) -> int:
        """Return the length in tokens, with the padding."""
        return self.context.shape[1] + self.padding

    def padded_context(self) -> Tensor:
        """Return the context with its padding, (1, tokens, width). Padded, it is a copy."""
        if not self.padding:
            return self.context
        last = self.context[:, -1:].expand(-1, self.padding, -1)
        return torch.cat([self.context, last], dim=1)

    @property
    def nbytes(self) -> int:
        """Return the memory of both tensors in bytes."""
        return self.context.nbytes + self.pooled.nbytes


@dataclass(frozen=True)
class TextOutputs:
    """What a denoiser reads of its text encoders.

    Attributes:
        last_layer: Last layer whose hidden states it can read, counted from the end, which is 1.
        normed: Whether the final norm follows.
        pooled: Whether it reads the pooled output of the last encoder, too. Such a denoiser was
            trained with zeros for an empty text.
    """

    last_layer: int
    normed: bool
    pooled: bool


SDXL_OUTPUTS = TextOutputs(last_layer=2, normed=False, pooled=True)
"""Source: Podell et al. 2023, "SDXL", arXiv 2307.01952."""
SD15_OUTPUTS = TextOutputs(last_layer=1, normed=True, pooled=False)
"""Source: Rombach et al. 2022, arXiv 2112.10752. AUTOMATIC1111 for the norm of other layers."""


class TextEncoders:
    """Text encoders with their tokenizers, and a cache of the latest conditionings.

    Args:
        parts: Tokenizer and model of each encoder.
        outputs: What the denoiser reads of them.
        embeddings: Textual inversions by name.
    """

    def __init__(
        self,
        parts: Sequence[tuple[ClipTokenizer, ClipTextModel]],
        outputs: TextOutputs = SDXL_OUTPUTS,
        embeddings: Mapping[str, TextualInversion] | None = None,
    ):
        self._parts, self._outputs = parts, outputs
        self._cache: OrderedDict[_Key, Mapping[str, Conditioning]] = OrderedDict()
        self._embeddings: Mapping[str, TextualInversion] | None = None
        self.set_embeddings(embeddings or {})

    def set_embeddings(self, embeddings: Mapping[str, TextualInversion]) -> None:
        """Replace the textual inversions and clear the cache.

        Embeddings of other widths are ignored. The same object as before changes nothing.

        Args:
            embeddings: Textual inversions by name.
        """
        if embeddings is self._embeddings:
            return
        widths = tuple(model.width for _, model in self._parts)
        fitting = [
            embedding
            for embedding in embeddings.values()
            if tuple(vectors.shape[1] for vectors in embedding.vectors) == widths
        ]
        self._encoders = [
            _Encoder(*part, {embedding.name: embedding.vectors[i] for embedding in fitting})
            for i, part in enumerate(self._parts)
        ]
        self._embeddings = embeddings
        self.forget()

    def encode(
        self, text: str, clip_skip: int = 1, emphasis: Emphasis = "Original"
    ) -> Conditioning:
        """Return the conditioning of a single text; see `encode_schedule`."""
        return self.encode_schedule([text], clip_skip, emphasis)[text]

    def encode_schedule(
        self,
        texts: Sequence[str],
        clip_skip: int = 1,
        emphasis: Emphasis = "Original",
        check: Callable[[], None] = lambda: None,
        splits: Mapping[str, Split] | None = None,
    ) -> Mapping[str, Conditioning]:
        """Return the conditioning of each text of a schedule, from the cache or new.

        Attention weights and BREAK are applied. Schedules and AND are plain text here. All
        conditionings have the length of the longest text.

        Args:
            texts: Texts of any length, one for each entry of the schedule.
            clip_skip: Layer of the hidden states, counted from the last. 1 means 2 in SDXL.
            emphasis: How attention weights act.
            check: Called before each text. Its exceptions stop the encoding.
            splits: Chunks of the texts, if `split` returned them before.
        """
        key = self._key(texts, clip_skip, emphasis)
        conditionings = self._cache.pop(key, None)
        if conditionings is None:
            splits = splits or {text: self.split(text, emphasis) for text in texts}
            conditionings = self._encode(Counter(texts), clip_skip, emphasis, check, splits)
        if _nbytes(conditionings) <= CACHE_BYTES:
            self._cache[key] = conditionings
        while sum(map(_nbytes, self._cache.values())) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return conditionings

    def is_cached(self, texts: Sequence[str], clip_skip: int, emphasis: Emphasis) -> bool:
        """Check whether the conditionings of a schedule are in the cache."""
        return self._key(texts, clip_skip, emphasis) in self._cache

    def forget(self) -> None:
        """Clear the cache."""
        self._cache.clear()

    def split(self, text: str, emphasis: Emphasis = "Original") -> Split:
        """Split a text into chunks, for each encoder. All get the same number of chunks."""
        splits = [encoder.split(text, emphasis) for encoder in self._encoders]
        count = max(map(len, splits))
        return [_fill(chunks, count) for chunks in splits]

    @torch.inference_mode()
    def _encode(
        self,
        texts: Counter[str],
        clip_skip: int,
        emphasis: Emphasis,
        check: Callable[[], None],
        splits: Mapping[str, Split],
    ) -> Mapping[str, Conditioning]:
        """Encode texts chunk by chunk. Shorter ones are padded with empty chunks.

        `context` joins the chunks. `pooled` is that of the first chunk by the last encoder.

        Source: AUTOMATIC1111 for the chunks.
        """
        layer = self._layer(clip_skip)
        count = max(len(splits[text][0]) for text in texts)
        lists = [
            [_fill(splits[text][i], count) for text in texts] for i in range(len(self._encoders))
        ]
        hidden: list[list[Tensor]] = [[] for _ in self._encoders]
        for split in zip(*lists, strict=True):
            check()
            for encoder, chunks, states in zip(self._encoders, split, hidden, strict=True):
                states.append(encoder.encode(chunks, layer))
        pooled = [
            self._encoders[-1].pool(states[:1], chunks[:1], layer)
            if self._outputs.pooled
            else states.new_empty(1, 0)
            for states, chunks in zip(hidden[-1], lists[-1], strict=True)
        ]
        if self._outputs.normed:
            hidden = [
                [encoder.norm(states) for states in own]
                for encoder, own in zip(self._encoders, hidden, strict=True)
            ]
        if emphasis != "Ignore":
            keep_mean = emphasis != "No norm"
            for states, split in zip(hidden, lists, strict=True):
                _emphasize(states, split, [*texts.values()], keep_mean=keep_mean)
        contexts = [
            torch.cat(states, dim=-1).flatten(0, 1)[None] for states in zip(*hidden, strict=True)
        ]
        return dict(zip(texts, map(Conditioning, contexts, pooled), strict=True))

    @property
    def zeroes_empty(self) -> bool:
        """Return whether the conditioning of an empty negative prompt is `zeros`."""
        return self._outputs.pooled

    def zeros(self) -> Conditioning:
        """Return zeros, the conditioning of an empty text in SDXL's training."""
        blank = self.encode("")
        return Conditioning(torch.zeros_like(blank.context), torch.zeros_like(blank.pooled))

    def are_zeros_cached(self) -> bool:
        """Check whether `zeros` needs no encoder."""
        return self.is_cached([""], 1, "Original")

    def _key(self, texts: Sequence[str], clip_skip: int, emphasis: Emphasis) -> _Key:
        """Return the key of a schedule's texts, with how often each occurs."""
        return frozenset(Counter(texts).items()), self._layer(clip_skip), emphasis

    def _layer(self, clip_skip: int) -> int:
        """Return the layer of the hidden states, counted from the last."""
        return max(clip_skip, self._outputs.last_layer)


Split = Sequence[list[Chunk]]
"""Chunks of a text for each encoder."""
_Key = tuple[frozenset[tuple[str, int]], int, Emphasis]


def _fill(chunks: list[Chunk], count: int) -> list[Chunk]:
    """Add empty chunks up to a number."""
    return [*chunks, *(Chunk() for _ in range(count - len(chunks)))]


def _nbytes(conditionings: Mapping[str, Conditioning]) -> int:
    return sum(conditioning.nbytes for conditioning in conditionings.values())


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

    def split(self, text: str, emphasis: Emphasis) -> list[Chunk]:
        """Split a text into chunks."""
        return chunk_fragments(
            parse_weights(text, emphasis), self._tokenizer.encode, self._comma, self._words
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

    def norm(self, hidden: Tensor) -> Tensor:
        """Return hidden states after the final norm, float32 (chunks, 77, width)."""
        return self._model.norm(hidden)

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


def _emphasize(
    hidden: Sequence[Tensor],
    texts: Sequence[Sequence[Chunk]],
    counts: Sequence[int],
    *,
    keep_mean: bool,
) -> None:
    """Scale the tokens of a schedule's texts by their weights, in place.

    The mean of each chunk over all entries of the schedule is restored.

    Args:
        hidden: Hidden states of each text, float32 (chunks, 77, width).
        texts: Chunks of each text, with the weights of the tokens.
        counts: How often each text occurs in the schedule.
        keep_mean: Whether to restore the mean.

    Source: AUTOMATIC1111, emphasis modes "Original" and "No norm" (`modules/sd_emphasis.py`).
    """
    for i, chunks in enumerate(zip(*texts, strict=True)):
        if all(weight == 1.0 for chunk in chunks for weight in chunk.weights):
            continue
        states = [text[i] for text in hidden]
        before = _mean(states, counts)
        for chunk, state in zip(chunks, states, strict=True):
            weights = torch.tensor(chunk.weights, device=state.device)
            state[1 : 1 + len(weights)] *= weights[:, None]
        if keep_mean:
            ratio = before / _mean(states, counts)
            for state in states:
                state *= ratio


def _mean(states: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Return the mean over tensors of equal shape that occur `counts` times."""
    total = sum(state.mean() * count for state, count in zip(states, counts, strict=True))
    return torch.as_tensor(total) / sum(counts)


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


@dataclass(frozen=True)
class Reading:
    """How the prompts of a request are read.

    Attributes:
        calls: Calls of the network, which the schedules count.
        clip_skip: See `TextEncoders.encode_schedule`.
        emphasis: How attention weights act.
        calls_before: Calls of the first pass, for a second one.
    """

    calls: int
    clip_skip: int = 1
    emphasis: Emphasis = "Original"
    calls_before: int = 0

    def schedule(self, text: str) -> list[tuple[int, str]]:
        """Return the texts of a prompt without AND over the calls, see `schedule_prompt`."""
        return schedule_prompt(text, self.calls, self.calls_before)


def plan_prompt(
    encoders: TextEncoders,
    prompt: str,
    reading: Reading,
    check: Callable[[], None] = lambda: None,
) -> PromptPlan:
    """Encode all texts of a prompt over the steps, each once.

    The texts of each part of AND are encoded together. Shorter parts repeat their last vector.

    Args:
        encoders: Text encoders.
        prompt: Prompt with weights, BREAK, schedules and AND.
        reading: How the prompt is read.
        check: Called before each text. Its exceptions stop the encoding.

    Raises:
        InvalidRequest: The texts have more than `MAX_CHUNKS` chunks, or one has more than its
            length allows, see `max_chunks`.
    """
    return _plan(encoders, split_and(prompt), reading, check, "prompt")


def plan_negative(
    encoders: TextEncoders,
    prompt: str,
    reading: Reading,
    check: Callable[[], None] = lambda: None,
) -> PromptPlan:
    """Encode all texts of a negative prompt over the steps.

    AND is plain text here. For SDXL, the result is zeros if all texts are empty. The rest is as in
    `plan_prompt`.
    """
    if _is_zeroed(encoders, prompt, reading):
        return PromptPlan([(1.0, [(reading.calls, encoders.zeros())])])
    return _plan(encoders, [(prompt, 1.0)], reading, check, "negative_prompt")


def is_cached(encoders: TextEncoders, prompt: str, negative_prompt: str, reading: Reading) -> bool:
    """Check whether the cache holds all conditionings of both prompts."""
    parts = [part for part, _ in split_and(prompt)]
    if _is_zeroed(encoders, negative_prompt, reading):
        if not encoders.are_zeros_cached():
            return False
    else:
        parts.append(negative_prompt)
    return all(
        encoders.is_cached(_texts(reading.schedule(part)), reading.clip_skip, reading.emphasis)
        for part in parts
    )


def _is_zeroed(encoders: TextEncoders, negative_prompt: str, reading: Reading) -> bool:
    return encoders.zeroes_empty and not any(_texts(reading.schedule(negative_prompt)))


def _texts(schedule: Sequence[tuple[int, str]]) -> list[str]:
    return [text for _, text in schedule]


def _plan(
    encoders: TextEncoders,
    parts: Sequence[tuple[str, float]],
    reading: Reading,
    check: Callable[[], None],
    field: str,
) -> PromptPlan:
    schedules = [(weight, reading.schedule(part)) for part, weight in parts]
    parts_texts = [_texts(schedule) for _, schedule in schedules]
    splits = _split_checked(encoders, parts_texts, reading, check, field)
    encoded = [
        encoders.encode_schedule(texts, reading.clip_skip, reading.emphasis, check, splits)
        for texts in parts_texts
    ]
    length = max(text.tokens for texts in encoded for text in texts.values())
    padded = [
        {text: _pad(conditioning, length) for text, conditioning in texts.items()}
        for texts in encoded
    ]
    return PromptPlan(
        [
            (weight, [(last, texts[text]) for last, text in schedule])
            for (weight, schedule), texts in zip(schedules, padded, strict=True)
        ]
    )


def combine_plans(plans: Sequence[PromptPlan], empty: Conditioning) -> PromptPlan:
    """Combine the plans of several images into one with a row for each.

    Args:
        plans: Plan of each image. All have the same parts, with other texts.
        empty: Conditioning of an empty chunk, which fills shorter texts.
    """
    parts: list[tuple[float, list[tuple[int, Conditioning]]]] = []
    for i, (weight, _) in enumerate(plans[0].parts):
        ends = sorted({last for plan in plans for last, _ in plan.parts[i][1]})
        schedule = [(last, _stack([plan.at(last)[i][0] for plan in plans], empty)) for last in ends]
        parts.append((weight, schedule))
    return PromptPlan(parts)


def _stack(texts: Sequence[Conditioning], empty: Conditioning) -> Conditioning:
    """Return one conditioning with a row for each text."""
    length = max(text.tokens for text in texts)
    contexts = [
        torch.cat(
            [
                text.padded_context(),
                empty.context.repeat(1, (length - text.tokens) // empty.tokens, 1),
            ],
            dim=1,
        )
        for text in texts
    ]
    return Conditioning(torch.cat(contexts), torch.cat([text.pooled for text in texts]))


def _pad(conditioning: Conditioning, length: int) -> Conditioning:
    """Repeat the last vector of a text up to a length in tokens, without a copy."""
    missing = length - conditioning.tokens
    return replace(conditioning, padding=missing) if missing else conditioning


def _split_checked(
    encoders: TextEncoders,
    schedules: Sequence[Sequence[str]],
    reading: Reading,
    check: Callable[[], None],
    field: str,
) -> dict[str, Split]:
    """Split all texts into chunks and check their numbers. Raises `InvalidRequest`."""
    splits: dict[str, Split] = {}
    total = 0
    for schedule in schedules:
        longest = 0
        for number, text in enumerate(dict.fromkeys(schedule), start=1):
            if text not in splits:
                check()
                splits[text] = encoders.split(text, reading.emphasis)
            count = len(splits[text][0])
            if count > max_chunks(text):
                raise InvalidRequest(
                    f"its embeddings fill {count} chunks of 75 tokens; at most {max_chunks(text)} "
                    "for a text of this length.",
                    hint="Use fewer or smaller embeddings.",
                    field=field,
                )
            longest = max(longest, count)
            if total + number * longest > MAX_CHUNKS:
                raise InvalidRequest(
                    f"its texts over {reading.calls} steps have more than {MAX_CHUNKS} chunks of "
                    "75 tokens.",
                    hint="Shorten it, or use fewer BREAKs or fewer changes between steps, "
                    "as in [a|b].",
                    field=field,
                )
        total += len(set(schedule)) * longest
    return splits
