"""Family of a diffusers folder, from its JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alphalayer.catalog.files import open_file, parse_json, printable
from alphalayer.catalog.kinds import INPAINT_CHANNELS
from alphalayer.core.errors import CorruptFile

PIPELINES = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionInpaintPipeline": "sd15",
}
"""Families by the class of their pipeline."""
PREDICTIONS = ("epsilon", "v_prediction")
AGAIN = "Download the folder again."
MAX_JSON_BYTES = 16_000_000
"""Limit of a JSON file: the largest, a tokenizer, has about 4 MB."""
MAX_NUMBER = 1_000_000
"""Limit of a whole number in a configuration: more than any size of a network."""


def family_of_folder(path: Path) -> str:
    """Return the family of a model: one of `kinds.SUPPORTED`, or another name.

    The name of an unknown family is the class of its pipeline.

    Raises:
        CorruptFile: A part is missing or damaged. The message names it.
    """
    pipeline = printable(str(read_json(path / "model_index.json").get("_class_name", "")))[:100]
    if "InstructPix2Pix" in pipeline:
        return "edit"
    if pipeline not in PIPELINES:
        return pipeline
    family = PIPELINES[pipeline]
    scheduler = read_json(path / "scheduler/scheduler_config.json")
    unet = read_json(path / "unet/config.json")
    # SD 2 has the same pipeline as SD 1.5, and another text encoder
    if family == "sd15" and unet.get("use_linear_projection"):
        return "sd2"
    # trained over continuous noise levels: the UNet's input and output are scaled differently
    if "sigma_data" in scheduler or str(scheduler.get("_class_name")).startswith("EDM"):
        return "sdxl-edm"
    if scheduler.get("prediction_type", PREDICTIONS[0]) not in PREDICTIONS:
        return f"{family}-other"
    if unet.get("in_channels") not in (unet.get("out_channels"), INPAINT_CHANNELS):
        return "edit"
    return family


def read_json(path: Path, **hooks: Any) -> dict[str, Any]:
    """Return the object in a small JSON file of a model's folder.

    Args:
        path: The file.
        hooks: Keywords of `json.loads`.

    Raises:
        CorruptFile: The file is missing, cannot be read, or does not hold an object.
    """
    shown = printable(str(path))
    try:
        with open_file(path) as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
        loaded = parse_json(text, **hooks)
        if not isinstance(loaded, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError:
        raise CorruptFile(f"{shown} is not there.", hint=AGAIN) from None
    except OSError as error:
        raise CorruptFile(f"{shown} cannot be read: {error.strerror}.", hint=AGAIN) from None
    except ValueError as error:
        raise CorruptFile(f"{shown} is damaged: {error}.", hint=AGAIN) from None
    return loaded


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a network.

    Raises:
        CorruptFile: See `read_json`, or a whole number is too large for the size of a network.
    """
    return read_json(path, parse_int=_read_size)


def _read_size(digits: str) -> int:
    if len(digits) > len(str(MAX_NUMBER)) + 1 or abs(number := int(digits)) > MAX_NUMBER:
        raise ValueError(f"it holds the number {digits[:20]}; at most {MAX_NUMBER}")
    return number
