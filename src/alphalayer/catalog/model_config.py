"""A model folder's own LayerDiffuse files, method and defaults: `layerdiffuse/config.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import ValidationError

from alphalayer.catalog.entries import ModelEntry
from alphalayer.catalog.files import printable
from alphalayer.catalog.folders import read_config
from alphalayer.catalog.headers import summarize
from alphalayer.catalog.sidecars import TOML, few_step_defaults, read_settings
from alphalayer.core.errors import CorruptFile, InvalidRequest
from alphalayer.core.modes import DEFAULT_MODE, mode_for
from alphalayer.core.request import ModelDefaults

LAYER_CONFIG = Path("layerdiffuse", "config.json")
"""Path in a model's folder of the description of its own patch, decoder and defaults."""

_FILES = ("patch", "decoder", "encoder")
_KINDS = {"patch": str, "decoder": str, "encoder": str, "method": str, "decoder_config": dict}
_EXPECTED = {str: "a text", dict: "an object"}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "sd15": {"width": 512, "height": 512, "sampler": "DPM++ 2M", "cfg_scale": 7},
}
"""Defaults of families that differ from SDXL's."""


def layer_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a model's own LayerDiffuse files, or an empty one.

    Raises:
        CorruptFile: The configuration cannot be read.
    """
    file = path / LAYER_CONFIG
    if not file.is_file():
        return {}
    config = read_config(file)
    for key, kind in _KINDS.items():
        value = config.get(key)
        is_path = key in _FILES and isinstance(value, str) and ".." in Path(value).parts
        if not isinstance(value, (kind, NoneType)) or is_path:
            raise CorruptFile(
                f"{printable(str(file))}: {key}: expected {_EXPECTED[kind]}"
                f"{' in this folder' if key in _FILES else ''}.",
                hint="Get the model again.",
            )
    return config


def model_defaults(path: Path, family: str = "sdxl") -> ModelDefaults:
    """Return the default parameters of a model.

    Those of a folder are in its configuration. Those of a single file are in a TOML file beside
    it, or follow from its name or the title in its header. The others are those of its family.

    Raises:
        CorruptFile: The model's configuration cannot be read or has a wrong value.
    """
    if path.is_dir():
        source, defaults = path / LAYER_CONFIG, layer_config(path).get("defaults", {})
    else:
        source = path.with_suffix(TOML)
        known = few_step_defaults(path.stem) or few_step_defaults(_title(path))
        defaults = known | read_settings(path).defaults
    try:
        return ModelDefaults.model_validate(_FAMILY_DEFAULTS.get(family, {}) | defaults)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = printable(f"{source}: defaults.{field}: {first['msg']}")
        raise CorruptFile(f"{reason[:1000]}.") from None


def _title(path: Path) -> str:
    """Return the title in the header of a single file, "" if there is none."""
    try:
        return summarize(path).title
    except CorruptFile:
        return ""


def check_layerdiffuse_mode(entry: ModelEntry, mode: str) -> None:
    """Check a requested mode against the model's family and its own patch.

    The model's configuration names the mode of its patch.
    The default mode fits every patch.

    Raises:
        InvalidRequest: The mode is one of another family. Or the model has its own patch, and it is
            of another mode.
    """
    mode_for(entry.family, mode)
    if mode == DEFAULT_MODE:
        return
    config = layer_config(entry.path)
    if "patch" in config and mode != config.get("method"):
        raise InvalidRequest(
            f'{entry.name} brings its own LayerDiffuse patch, which is not one of "{mode}".',
            hint=f'Use "{DEFAULT_MODE}" (of layers "foreground"), or a model without a patch.',
            field="mode",
        )


def layer_file(model: Path, names: Sequence[str], configured: str | None, models_dir: Path) -> Path:
    """Return the path of a LayerDiffuse file of a model, whether it exists or not.

    Args:
        model: Path of the model.
        names: Published names of the file. The first that exists is used.
        configured: Name of the file in the model's own configuration, which has priority.
        models_dir: The models folder with the shared `layer_model/`.
    """
    own, shared = (model / LAYER_CONFIG).parent, models_dir / "layer_model"
    if configured is not None:
        return own / configured
    paths = [folder / name for folder in (own, shared) for name in names]
    return next((path for path in paths if path.is_file()), shared / names[0])
