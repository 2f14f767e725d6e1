"""Import what the training needs from the package, in one place."""

from alphalayer.catalog import EMBEDDED_MODEL as MODEL_FOLDER
from alphalayer.core.request import GenerationRequest
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.transparency.decode import TransparentDecoder

SDXL_FOLDER = MODEL_FOLDER.parent / "sdxl"

__all__ = [
    "MODEL_FOLDER",
    "SDXL_FOLDER",
    "GenerationRequest",
    "LocalEngine",
    "TransparentDecoder",
]
