"""What an engine is. The rest of the program knows this protocol and no more; importing it does not import torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alphalayer.core.modes import InputRole, LayerRole
from alphalayer.core.request import GenerationRequest, ImageSeed, ResolvedRequest
from alphalayer.images.infotext import write_parameters

# the libraries below greet every start with notices and progress bars; both can be asked for in the environment
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

RgbaImage = NDArray[np.uint8]
"""Straight (not premultiplied) RGBA, shape (height, width, 4)."""


@dataclass(frozen=True)
class Progress:
    """Where a request stands. `preview` is a small RGB picture (height, width, 3) of the latent, if asked for."""

    stage: str
    step: int = 0
    steps: int = 0
    preview: NDArray[np.uint8] | None = None

    def within(self, iteration: int, iterations: int) -> Progress:
        """The same of a request that is one of several, drawn one after another: steps counted over all of them."""
        return replace(self, step=iteration * self.steps + self.step, steps=iterations * self.steps)


@dataclass(frozen=True)
class GeneratedImage:
    """One generated layer: its pixels, its seeds and its role."""

    rgba: RgbaImage
    seed: int
    subseed: int
    role: LayerRole = "image"


@dataclass(frozen=True)
class GenerationResult:
    """The pictures of one request, the request with nothing left open, and how long each stage took in seconds."""

    request: ResolvedRequest
    model_name: str
    model_hash: str
    images: list[GeneratedImage]
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def infotext(self, image: GeneratedImage) -> str:
        """Return the settings of one of the images, as they stand in its file."""
        return write_parameters(
            self.request, self.model_name, self.model_hash, image.seed, image.subseed
        )


@dataclass(frozen=True)
class RenderTask:
    """A request, whom to tell how far it is, and whether it is still wanted."""

    request: GenerationRequest
    images: tuple[ImageSeed, ...] = ()
    """Seeds of the images; default: those of one batch of the request."""
    on_progress: Callable[[Progress], None] = lambda _: None
    is_cancelled: Callable[[], bool] = lambda: False
    previews: bool = False
    inputs: Mapping[InputRole, RgbaImage] = field(default_factory=dict[InputRole, RgbaImage])
    """Pixels of the request's input images by role."""


class Engine(Protocol):
    """Draws pictures. One engine holds one device and is called by one thread at a time."""

    @property
    def description(self) -> str:
        """What it draws with, in words: device, number format, memory mode."""
        ...

    @property
    def batch_pixels(self) -> int:
        """How many pixels it draws together well; 0: each request alone."""
        ...

    def warm_up(self) -> None:
        """Make the first request as quick as the second: load the default model and draw once. Raises what is no `AlphalayerError`."""
        ...

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        """Draw the pictures of one request, or of several with the same `batch_key` together; each comes out as it would alone.
        After what it raises besides `AlphalayerError` the engine is not used again.

        Raises:
            Cancelled: nobody wants any of them any more; checked at every step.
            InvalidRequest, ModelNotFound, ModelUnusable, LayerDiffuseMissing, OutOfMemory: see `alphalayer.core.errors`. Of several
                requests it is not said which is to blame.
        """
        ...

    def memory_bytes(self) -> int:
        """Memory held on the device in bytes; 0 where there is no device of its own."""
        ...
