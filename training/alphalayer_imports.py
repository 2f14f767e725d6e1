"""Import what the training needs from the package, in one place."""

from alphalayer.catalog import EMBEDDED_MODEL as MODEL_FOLDER
from alphalayer.core.request import GenerationRequest
from alphalayer.engine.networks.transparent import TransparentDecoder
from alphalayer.engine.networks.weights import NamedWeights
from alphalayer.engine.pipeline import LocalEngine

SDXL_FOLDER = MODEL_FOLDER.parent / "sdxl"

__all__ = [
    "MODEL_FOLDER",
    "SDXL_FOLDER",
    "GenerationRequest",
    "LocalEngine",
    "NamedWeights",
    "TransparentDecoder",
]
