"""Family of a diffusers folder, from its JSON files, and a check that its weights exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alphalayer.core.errors import CorruptFile

PIPELINE = "StableDiffusionXLPipeline"
PREDICTIONS = ("epsilon", "v_prediction")
_WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_AGAIN = "Download the folder again."


def family_of_folder(path: Path) -> str:
    """Return the family of a model: "sdxl", or another name.

    The name of an unknown family is the class of its pipeline.

    Raises:
        CorruptFile: A part is missing or damaged. The message names it.
    """
    pipeline = str(read_json(path / "model_index.json").get("_class_name", ""))
    if "InstructPix2Pix" in pipeline:
        return "edit"
    if pipeline != PIPELINE:
        return pipeline
    scheduler = read_json(path / "scheduler/scheduler_config.json")
    # trained over continuous noise levels: the UNet's input and output are scaled differently
    if "sigma_data" in scheduler or str(scheduler.get("_class_name")).startswith("EDM"):
        return "sdxl-edm"
    if scheduler.get("prediction_type", PREDICTIONS[0]) not in PREDICTIONS:
        return "sdxl-other"
    unet = read_json(path / "unet/config.json")
    if unet.get("in_channels") != unet.get("out_channels"):
        return "sdxl-inpaint" if unet.get("in_channels") == 9 else "edit"
    for part in _WITH_WEIGHTS:
        read_json(path / part / "config.json")
        if not any((path / part).glob("*.safetensors")):
            raise CorruptFile(f"{path / part} holds no .safetensors file.", hint=_AGAIN)
    return "sdxl"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file of a model's folder.

    Raises:
        CorruptFile: The file is missing, cannot be read, or does not hold an object.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptFile(f"{path} is not there.", hint=_AGAIN) from None
    except (OSError, ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict):
        raise CorruptFile(f"{path} is damaged.", hint=_AGAIN)
    return loaded
