"""Fields of requests that change an image or generate several layers. Free of torch and HTTP."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from alphalayer.core.prompts import MAX_PROMPT_CHARACTERS
from alphalayer.core.values import Frozen

AlphaSource = Literal["new", "keep", "multiply"]
"""Alpha of a changed image: generated, that of the input image, or the product of both."""
InitResizeMode = Literal["Just Resize", "Crop and Resize", "Resize and Fill", "Latent"]
"""How the image to change is fitted to the size. "Latent" stretches its latent."""
INIT_RESIZE_MODES: tuple[InitResizeMode, ...] = get_args(InitResizeMode)
MaskFill = Literal["fill", "original", "latent noise", "latent nothing"]
"""What the masked part holds before noise is added. The names are those of AUTOMATIC1111."""
MASK_FILLS: tuple[MaskFill, ...] = get_args(MaskFill)

Strength = Annotated[
    float,
    Field(ge=0, le=1, description="Share of the noise that is added to the image: 1 keeps little."),
]
MaskBlur = Annotated[
    int, Field(ge=0, le=64, description="Radius in pixels by which the mask is softened.")
]
MaskPadding = Annotated[
    int, Field(ge=0, le=256, description="Pixels around the box of `masked_only`.")
]


class EditFields(Frozen, frozen=True):
    """Fields that have an effect with an "init" image alone, each declared here once."""

    strength: Strength = 0.75
    exact_steps: Annotated[
        bool,
        Field(description="Make all `steps`. Otherwise their share of the strength."),
    ] = False
    alpha: Annotated[
        AlphaSource,
        Field(
            description="Alpha of the result: new is generated, keep is that of the image, "
            "multiply is the product of both."
        ),
    ] = "new"
    init_resize_mode: Annotated[
        InitResizeMode, Field(description="How the image is fitted to width and height.")
    ] = "Crop and Resize"
    mask_blur: MaskBlur = 4
    mask_fill: Annotated[
        MaskFill,
        Field(description="What the masked part holds before noise is added."),
    ] = "original"
    masked_only: Annotated[
        bool,
        Field(description="Generate the box around the mask at full size, and paste it back."),
    ] = False
    mask_padding: MaskPadding = 32


_LayerPrompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]


class LayerFields(Frozen, frozen=True):
    """Additional prompts of the modes that generate several layers, each declared here once.

    The name of a field is the role of its layer with "_prompt".
    """

    foreground_prompt: Annotated[
        _LayerPrompt, Field(description="Put before the prompt for the foreground alone.")
    ] = ""
    background_prompt: Annotated[
        _LayerPrompt, Field(description="Put before the prompt for the background alone.")
    ] = ""
    blended_prompt: Annotated[
        _LayerPrompt, Field(description="Put before the prompt for the blended image alone.")
    ] = ""
