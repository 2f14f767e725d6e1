"""Protocol of an engine, and the values that it takes and returns. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alphalayer.core.modes import InputRole, LayerRole
from alphalayer.core.request import GenerationRequest, ImageSeed, ResolvedRequest
from alphalayer.images.infotext import write_parameters

RgbaImage = NDArray[np.uint8]
"""Straight (not premultiplied) RGBA, shape (height, width, 4)."""


@dataclass(frozen=True)
class Progress:
    """Progress of a request."""

    stage: str
    step: int = 0
    steps: int = 0
    preview: NDArray[np.uint8] | None = None
    """Small RGB image (height, width, 3) of the latent, if requested."""

    def within(self, iteration: int, iterations: int) -> Progress:
        """Return the progress over several iterations, with the steps of all of them."""
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
    """The images of one request, the resolved request, and the seconds of each stage."""

    request: ResolvedRequest
    model_name: str
    model_hash: str
    images: list[GeneratedImage]
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    warnings: tuple[str, ...] = ()
    """What was ignored of the request's files, one sentence each."""

    def infotext(self, image: GeneratedImage) -> str:
        """Return the settings text of one of the images, as it is written into the file."""
        return write_parameters(
            self.request, self.model_name, self.model_hash, image.seed, image.subseed
        )


@dataclass(frozen=True)
class RenderTask:
    """A request with its callbacks: progress, and whether it was cancelled."""

    request: GenerationRequest
    images: tuple[ImageSeed, ...] = ()
    """Seeds of the images; default: those of one batch of the request."""
    on_progress: Callable[[Progress], None] = lambda _: None
    is_cancelled: Callable[[], bool] = lambda: False
    previews: bool = False
    inputs: Mapping[InputRole, RgbaImage] = field(default_factory=dict[InputRole, RgbaImage])
    """Pixels of the request's input images by role."""


class Engine(Protocol):
    """Generator of images on one device. It is called by one thread at a time."""

    @property
    def description(self) -> str:
        """Return the device, number format and memory mode in words."""
        ...

    @property
    def batch_pixels(self) -> int:
        """Return how many pixels are generated together; 0: each request alone."""
        ...

    def warm_up(self) -> None:
        """Load the default model and generate once, so that the first request is fast.

        An `AlphalayerError` is logged. Other errors are raised.
        """
        ...

    def render(self, tasks: Sequence[RenderTask]) -> list[GenerationResult]:
        """Generate the images of one request, or of several with one `batch_key`.

        Each image is as it would be alone. After an error that is no `AlphalayerError` the engine
        is not used again.

        Raises:
            Cancelled: All of them were cancelled. This is checked at every step.
            InvalidRequest, ModelNotFound, ModelUnusable, LayerDiffuseMissing, OutOfMemory: See
                `alphalayer.core.errors`. Of several requests, the cause is unknown.
        """
        ...

    @property
    def unload_after_s(self) -> float:
        """Return the seconds without a job after which models are unloaded; 0: never."""
        ...

    def unload(self) -> None:
        """Release the memory of all models. The next image reads its model again."""
        ...

    def memory_bytes(self) -> int:
        """Memory held on the device in bytes; 0 where there is no device of its own."""
        ...
