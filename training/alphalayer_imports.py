"""Import what the training needs from the package, in one place."""

from alphalayer.catalog import EMBEDDED_MODEL as MODEL_FOLDER
from alphalayer.engine.transparency import TransparentDecoder

__all__ = ["MODEL_FOLDER", "TransparentDecoder"]
