"""Text of prompts: limits, comments, and tags such as `<lora:name:0.8>`.

`alphalayer.engine.text.grammar` reads the rest of the grammar.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.values import Frozen

MAX_PROMPT_CHARACTERS = 10_000
MAX_PROMPT_BYTES = 10_000
"""Limit of a prompt in UTF-8. CLIP's tokenizer returns at most one token a byte."""
AND = re.compile(r"\bAND\b")
"""Separates parts of a prompt that are mixed. Each part is another UNet pass at every step."""
MAX_PROMPT_PARTS = 8
MAX_LORAS = 16
MAX_LORA_WEIGHT = 100
_COMMENT = re.compile(r"(?m)^#.*\n?|#.*")
_TAG = re.compile(r"<(\w+):([^>]+)>")
_EMPTY = 'empty. Describe the image, for instance "an apple, high quality"'


def check_prompt(prompt: str) -> str:
    """Return a prompt that is not blank. Raises `ValueError`."""
    if not prompt.strip():
        raise ValueError(_EMPTY)
    return prompt


LoraWeight = Annotated[
    float,
    Field(ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT, description="Strength of the LoRA."),
]


class Lora(Frozen, frozen=True):
    """A LoRA file of `models/Lora` and its weight."""

    name: Annotated[
        str, Field(min_length=1, max_length=200, description="File name without extension.")
    ]
    weight: LoraWeight = 1.0
    text_weight: (
        Annotated[LoraWeight, Field(description="Strength in the text encoders. Null: weight.")]
        | None
    ) = None

    @property
    def weights(self) -> tuple[float, float]:
        """Return the weights of the text encoders and of the denoiser."""
        return self.weight if self.text_weight is None else self.text_weight, self.weight

    @property
    def tag(self) -> str:
        """Return the LoRA as a tag of a prompt."""
        text, weight = (f"{value:.12g}" for value in self.weights)
        return (
            f"<lora:{self.name}:{text}:{weight}>"
            if text != weight
            else f"<lora:{self.name}:{weight}>"
        )


def remove_comments(prompt: str) -> str:
    """Return a prompt without the text from each "#" to the end of its line."""
    return _COMMENT.sub("", prompt)


def check_text(prompt: str, field: str) -> None:
    """Check a prompt without comments and tags. Raises `InvalidRequest`."""
    if not prompt:
        raise InvalidRequest(f"{_EMPTY}.", field=field)
    parts = len(AND.findall(prompt)) + 1
    if parts > MAX_PROMPT_PARTS:
        raise InvalidRequest(
            f"got {parts} parts between ANDs; at most {MAX_PROMPT_PARTS}. "
            "Write the word in small letters.",
            field=field,
        )


def remove_tags(prompt: str) -> str:
    """Return a prompt without its tags, which are not parsed."""
    # without a closing bracket each "<" would be read to the end
    end = prompt.rfind(">") + 1
    return _TAG.sub("", prompt[:end]) + prompt[end:]


def split_tags(prompt: str, field: str) -> tuple[str, list[Lora], list[str]]:
    """Split a prompt into its text, its LoRAs and what of the tags is ignored.

    Args:
        prompt: The prompt.
        field: Field of the prompt, for errors.

    Raises:
        InvalidRequest: A tag is malformed.
    """
    loras: list[Lora] = []
    ignored: list[str] = []
    end = prompt.rfind(">") + 1
    for tag in _TAG.finditer(prompt, endpos=end):
        if tag[1] in ("lora", "lyco"):
            lora, unknown = _parse_lora(tag[0], tag[2], field)
            loras.append(lora)
            ignored += unknown
        else:
            ignored.append(tag[0])
    return remove_tags(prompt).strip(), loras, ignored


def _parse_lora(tag: str, values: str, field: str) -> tuple[Lora, list[str]]:
    """Parse a LoRA's tag.

    Args:
        tag: The whole tag.
        values: Its inside: "name", "name:weight" or "name:te:unet". Weights may be named: "te=0.5".
        field: Field of the prompt, for errors.

    Returns:
        The LoRA and the values that have no meaning here.

    Raises:
        InvalidRequest: The tag is malformed.
    """
    name, *rest = values.split(":")
    plain = [value for value in rest if "=" not in value]
    named = dict(value.split("=", 1) for value in rest if "=" in value)
    text, weight, *others = plain + [""] * (2 - len(plain))
    try:
        text_weight = float(named.pop("te", text) or 1)
        unet_weight = float(named.pop("unet", weight) or text_weight)
        lora = Lora(
            name=name.strip(),
            weight=unet_weight,
            text_weight=None if text_weight == unet_weight else text_weight,
        )
    except ValueError:
        raise InvalidRequest(
            f'"{tag[:106]}" is not a LoRA with its weight.',
            hint=f"Write <lora:name:0.8>, with a weight from -{MAX_LORA_WEIGHT} to "
            f"{MAX_LORA_WEIGHT}.",
            field=field,
        ) from None
    return lora, [*others, *(f"{key}={value}" for key, value in named.items())]
