"""Import what the training needs from the package, in one place."""

from alphalayer.catalog import EMBEDDED_MODEL as MODEL_FOLDER
from alphalayer.catalog import find_models
from alphalayer.core.request import GenerationRequest
from alphalayer.engine.families.base import DiffusionModel
from alphalayer.engine.families.sdxl import load_model
from alphalayer.engine.memory import Precision
from alphalayer.engine.networks.transparent import TransparentDecoder, TransparentEncoder
from alphalayer.engine.networks.weights import NamedWeights
from alphalayer.engine.pipeline import LocalEngine
from alphalayer.engine.transparency.decode import decode_transparent
from alphalayer.engine.transparency.encode import (
    load_encoder,
    on_grey,
    pad_colours,
)

SDXL_FOLDER = MODEL_FOLDER.parent / "sdxl"

__all__ = [
    "MODEL_FOLDER",
    "SDXL_FOLDER",
    "DiffusionModel",
    "GenerationRequest",
    "LocalEngine",
    "NamedWeights",
    "Precision",
    "TransparentDecoder",
    "TransparentEncoder",
    "decode_transparent",
    "find_models",
    "load_encoder",
    "load_model",
    "on_grey",
    "pad_colours",
]
