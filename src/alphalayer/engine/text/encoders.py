"""Prompts into conditioning: both text encoders of the SDXL family, chunk by chunk, and the plan of a prompt over the steps.

The encoders compute in float32 with weights as stored (float16 in published checkpoints). What comes out is what the UNet's
cross-attention and its added conditioning read. Knows nothing of sampling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphalayer.core.errors import InvalidRequest
from alphalayer.engine.text.chunks import Chunk, LearnedWord, chunk_fragments
from alphalayer.engine.text.grammar import parse_weights, schedule_prompt, split_and
from alphalayer.engine.text.textual_inversion import TextualInversion

CACHE_BYTES = 64 * 1024**2
"""QueueStats for what was encoded, on the device: about a hundred short prompts of SDXL, or four of the longest."""
MAX_CHUNKS = 600
"""Of a prompt, over all steps: 380 MB of SDXL's, and more than 10,000 characters fill without BREAK."""
_SOME_TEXT = " "
CHUNKS_AT_ONCE = 32
"""Of one call of an encoder, which keeps what all of its layers say."""


@dataclass(frozen=True)
class Conditioning:
    """`context` (1, 77 n, width of both encoders) and `pooled` (1, projection width), float32."""

    context: Tensor
    pooled: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of both."""
        return self.context.nbytes + self.pooled.nbytes


class TextEncoders:
    """Both encoders with their tokenizers; `encode` remembers the last prompts, as many as `CACHE_BYTES` hold."""

    def __init__(
        self,
        tokenizer: Any,
        tokenizer_2: Any,
        text_encoder: nn.Module,
        text_encoder_2: nn.Module,
        embeddings: Mapping[str, TextualInversion] | None = None,
    ):
        self._parts = (tokenizer, text_encoder), (tokenizer_2, text_encoder_2)
        self._known: OrderedDict[tuple[str, int], Conditioning] = OrderedDict()
        self._words: Mapping[str, TextualInversion] | None = None
        self.set_embeddings(embeddings or {})

    def set_embeddings(self, words: Mapping[str, TextualInversion]) -> None:
        """Know these learned words and no others, as far as they fit; nothing is done if they are the same object as before."""
        if words is self._words:
            return
        widths = tuple(_width(model) for _, model in self._parts)
        fitting = [
            each
            for each in words.values()
            if (each.clip_l.shape[1], each.clip_g.shape[1]) == widths
        ]
        first, second = self._parts
        self._encoders = (
            _Encoder(*first, {each.name: each.clip_l for each in fitting}),
            _Encoder(*second, {each.name: each.clip_g for each in fitting}),
        )
        self._words = words
        self.forget()

    def encode(self, text: str, clip_skip: int = 1) -> Conditioning:
        """What one text of any length says; see `_encode`."""
        key = text, clip_skip
        if key not in self._known:
            self._known[key] = self._encode(text, clip_skip)
        self._known.move_to_end(key)
        found = self._known[key]
        while sum(each.nbytes for each in self._known.values()) > CACHE_BYTES:
            self._known.popitem(last=False)
        return found

    def is_cached(self, text: str, clip_skip: int) -> bool:
        """Whether a text is remembered."""
        return (text, clip_skip) in self._known

    def forget(self) -> None:
        """Encode every text anew."""
        self._known.clear()

    def chunks(self, text: str) -> int:
        """How many chunks a text fills."""
        return len(self._laid(text)[0])

    def _laid(self, text: str) -> list[list[Chunk]]:
        """The chunks of a text for each encoder, as many for both: where its tokenizer makes fewer of a text, empty ones follow."""
        laid = [encoder.lay(text) for encoder in self._encoders]
        count = max(len(each) for each in laid)
        return [[*each, *(Chunk() for _ in range(count - len(each)))] for each in laid]

    @torch.inference_mode()
    def _encode(self, text: str, clip_skip: int) -> Conditioning:
        """Encode one text of any length: weights and BREAK are understood, schedules and AND are not.

        Chunks of 75 tokens are encoded apart and laid side by side. The hidden state is the last but one, or that many layers
        back, without the final norm; `pooled` is the first chunk's, by the second encoder.
        """
        layer = max(clip_skip, 2)
        hidden = [
            encoder.encode(chunks, layer)
            for encoder, chunks in zip(self._encoders, self._laid(text), strict=True)
        ]
        context = torch.cat([each for each, _ in hidden], dim=-1)
        return Conditioning(context.flatten(0, 1)[None], hidden[1][1][:1])

    def empty(self) -> Conditioning:
        """Zeros in place of an empty negative prompt, as SDXL was trained."""
        some = self.encode(_SOME_TEXT)
        return Conditioning(torch.zeros_like(some.context), torch.zeros_like(some.pooled))


class _Encoder:
    """One tokenizer with its text encoder and its share of the learned vectors."""

    def __init__(self, tokenizer: Any, model: nn.Module, vectors: Mapping[str, Tensor]):
        self._tokenizer, self._model, self._vectors = tokenizer, model, vectors
        comma = self._tokenize(",")
        self._comma = comma[0] if len(comma) == 1 else -1
        words = [
            LearnedWord(name, tuple(self._tokenize(name)), len(each))
            for name, each in vectors.items()
        ]
        # a name of nothing that can be read is in no prompt
        self._words = [word for word in words if word.tokens]

    def lay(self, text: str) -> list[Chunk]:
        """The chunks of a text."""
        return chunk_fragments(parse_weights(text), self._tokenize, self._comma, self._words)

    def encode(self, chunks: Sequence[Chunk], layer: int) -> tuple[Tensor, Tensor]:
        """Hidden states `layer` from the end (chunks, 77, width) and pooled (chunks, projection)."""
        batches = [chunks[i : i + CHUNKS_AT_ONCE] for i in range(0, len(chunks), CHUNKS_AT_ONCE)]
        hidden, pooled = zip(*(self._encode(batch, layer) for batch in batches), strict=True)
        return torch.cat(hidden), torch.cat(pooled)

    def _encode(self, chunks: Sequence[Chunk], layer: int) -> tuple[Tensor, Tensor]:
        """The same in one call of the model."""
        device = next(self._model.parameters()).device
        ids = torch.tensor([self._framed(chunk.tokens) for chunk in chunks], device=device)
        with ExitStack() as stack:
            if any(chunk.embeddings for chunk in chunks):
                hook = _token_embedding(self._model).register_forward_hook(
                    self._substitution(chunks)
                )
                stack.callback(hook.remove)
            output = self._model(input_ids=ids, output_hidden_states=True)
        hidden = output.hidden_states[-layer].float()
        return torch.stack(
            [_emphasize(each, chunk) for each, chunk in zip(hidden, chunks, strict=True)]
        ), output[0]

    def _tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)[
            "input_ids"
        ]

    def _framed(self, tokens: list[int]) -> list[int]:
        """Start, tokens, end, padding. After an end token inside the prompt everything is padding."""
        start, end, pad = (
            getattr(self._tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
        )
        framed = [start, *tokens, end] + [pad] * (75 - len(tokens))
        first_end = framed.index(end)
        return framed if pad == end else framed[: first_end + 1] + [pad] * (76 - first_end)

    def _substitution(self, chunks: Sequence[Chunk]) -> Any:
        def put_vectors(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            for row, chunk in enumerate(chunks):
                for at, name in chunk.embeddings:
                    vectors = self._vectors[name]
                    output[row, at + 1 : at + 1 + len(vectors)] = vectors.to(
                        output.device, output.dtype
                    )
            return output

        return put_vectors


def _emphasize(hidden: Tensor, chunk: Chunk) -> Tensor:
    """Scale the tokens of a chunk (77, width) by their weights and bring the mean back to what it was."""
    if all(weight == 1.0 for weight in chunk.weights):
        return hidden
    weights = torch.ones(len(hidden), 1, device=hidden.device)
    weights[1 : 1 + len(chunk.weights), 0] = torch.tensor(chunk.weights, device=hidden.device)
    weighted = hidden * weights
    return weighted * (hidden.mean() / weighted.mean())


def _token_embedding(model: nn.Module) -> nn.Module:
    return next(
        module for name, module in model.named_modules() if name.endswith("token_embedding")
    )


def _width(model: nn.Module) -> int:
    return model.config.hidden_size  # type: ignore[union-attr,return-value]


@dataclass(frozen=True)
class PromptPlan:
    """What a prompt says at each step: one or, with AND, several schedules with a weight each."""

    parts: Sequence[tuple[float, Sequence[tuple[int, Conditioning]]]]

    def at(self, step: int) -> list[tuple[Conditioning, float]]:
        """The conditionings of a step, counted from 0, with their weights."""
        return [
            (next((each for last, each in schedule if step <= last), schedule[-1][1]), weight)
            for weight, schedule in self.parts
        ]


def plan_prompt(
    encoders: TextEncoders,
    prompt: str,
    steps: int,
    clip_skip: int = 1,
    check: Callable[[], None] = lambda: None,
) -> PromptPlan:
    """Encode every text that a prompt stands for over the steps, each once. `check` is asked before each and may raise.

    Raises:
        InvalidRequest: all of them fill more than `MAX_CHUNKS`.
    """
    return _plan(encoders, split_and(prompt), steps, clip_skip, check, "prompt")


def plan_negative(
    encoders: TextEncoders,
    prompt: str,
    steps: int,
    clip_skip: int = 1,
    check: Callable[[], None] = lambda: None,
) -> PromptPlan:
    """The same for a negative prompt: AND is text there, and an empty one is zeros."""
    if prompt == "":
        return PromptPlan([(1.0, [(steps, encoders.empty())])])
    return _plan(encoders, [(prompt, 1.0)], steps, clip_skip, check, "negative_prompt")


def is_cached(
    encoders: TextEncoders, prompt: str, negative_prompt: str, steps: int, clip_skip: int
) -> bool:
    """Whether both plans can be made of what is remembered, without a call of an encoder."""
    parts = [part for part, _ in split_and(prompt)]
    parts += [negative_prompt] if negative_prompt else []
    return (bool(negative_prompt) or encoders.is_cached(_SOME_TEXT, 1)) and all(
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
        chunks += encoders.chunks(text)
        if chunks > MAX_CHUNKS:
            raise InvalidRequest(
                f"the texts that it stands for over {steps} steps fill more than {MAX_CHUNKS} chunks of 75 tokens.",
                hint="Shorten it, or use fewer BREAKs, or fewer changes from step to step such as [a|b].",
                field=field,
            )
        encoded[text] = encoders.encode(text, clip_skip)
    return PromptPlan(
        [
            (weight, [(last, encoded[text]) for last, text in schedule])
            for weight, schedule in schedules
        ]
    )
