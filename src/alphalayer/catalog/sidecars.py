"""Settings of a single-file model: a TOML or YAML file beside it, its header, and its name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from alphalayer.catalog.files import open_file, printable
from alphalayer.catalog.headers import Header
from alphalayer.core.errors import CorruptFile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOML = ".toml"
YAML = (".yaml", ".yml")
MAX_BYTES = 64_000
"""Limit of a file of settings: parsing more YAML would take seconds."""
_PREDICTIONS = {
    "eps": "epsilon",
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}
_SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}
_STEPS = re.compile(r"(?<![0-9])([0-9]{1,2})[-_ ]?steps?(?![a-z0-9])")
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_START = "(?:(?<![a-z])|(?<=xl))(?<!^non[-_ ])(?<![^a-z]non[-_ ])"
"""Start of a word, or what follows "xl", and no "non" before it."""
_FEW_STEPS: tuple[tuple[re.Pattern[str], dict[str, Any]], ...] = (
    (
        re.compile("(?<![a-z])sd_?xl_?turbo"),
        {
            "width": 512,
            "height": 512,
            "steps": 4,
            "sampler": "Euler a",
            "scheduler": "SGM Uniform",
            "cfg_scale": 1,
        },
    ),
    (
        re.compile(f"{_START}dmd2"),
        {"steps": 4, "sampler": "LCM", "scheduler": "SGM Uniform", "cfg_scale": 1},
    ),
    (
        re.compile(f"{_START}lcm(?![a-z])"),
        {"steps": 8, "sampler": "LCM", "scheduler": "SGM Uniform", "cfg_scale": 1.5},
    ),
    (
        re.compile(f"{_START}(?:turbo|lightning.*dpm.*sde)"),
        {"steps": 8, "sampler": "DPM++ SDE", "scheduler": "Karras", "cfg_scale": 2},
    ),
    (
        re.compile(f"{_START}(?:lightning|hyper(?=[-_ ]?(?:sd|[0-9]|$)))"),
        {"steps": 8, "sampler": "Euler", "scheduler": "SGM Uniform", "cfg_scale": 1},
    ),
)
"""Words in names of models that were distilled to few steps, and what their authors advise."""


@dataclass(frozen=True)
class FileSettings:
    """Content of a TOML file beside a model. Empty if there is none."""

    prediction: str | None = None
    """"epsilon" or "v_prediction"."""
    zero_snr: bool | None = None
    defaults: dict[str, Any] = field(default_factory=dict[str, Any])


def sidecars(model: Path) -> list[Path]:
    """Return the files of settings beside a single-file model."""
    return [path for ending in (TOML, *YAML) if (path := model.with_suffix(ending)).is_file()]


def read_settings(model: Path) -> FileSettings:
    """Return the settings of the TOML file beside a model.

    Raises:
        CorruptFile: The file cannot be read, or a value is wrong.
    """
    path = model.with_suffix(TOML)
    if not path.is_file():
        return FileSettings()
    try:
        content = tomllib.loads(_read(path))
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits
        raise _damaged(path, f"it is not TOML ({error})") from None
    prediction, zero_snr = content.get("prediction_type"), content.get("zero_snr")
    defaults = content.get("defaults", {})
    if prediction is not None and _known_prediction(prediction) is None:
        raise _damaged(path, 'prediction_type: expected "epsilon" or "v_prediction"')
    if not isinstance(zero_snr, (bool, type(None))):
        raise _damaged(path, "zero_snr: expected true or false")
    if not isinstance(defaults, dict):
        raise _damaged(path, "defaults: expected a table")
    known = _known_prediction(prediction)
    return FileSettings(known, zero_snr, cast("dict[str, Any]", defaults))


def _known_prediction(value: Any) -> str | None:
    return _PREDICTIONS.get(value) if isinstance(value, str) else None


def few_step_defaults(name: str) -> dict[str, Any]:
    """Return the defaults of a model distilled to few steps, by its name or title."""
    name = _CAPITAL.sub("_", name).lower()
    for word, defaults in _FEW_STEPS:
        if word.search(name):
            steps = _STEPS.search(name)
            return {**defaults, **({"steps": max(int(steps[1]), 1)} if steps else {})}
    return {}


def scheduler_of(model: Path, header: Header) -> dict[str, Any]:
    """Return prediction type and noise schedule of a single file.

    The result is like a scheduler_config.json of diffusers.

    The first of these counts: the TOML file beside it, marker tensors, the header
    (`modelspec.prediction_type`), a .yaml or .yml file beside it.

    Raises:
        CorruptFile: A file beside it cannot be read.
    """
    own = read_settings(model)
    prediction = (
        own.prediction
        or ("v_prediction" if "v_pred" in header.shapes else None)
        or _PREDICTIONS.get(header.metadata.get("modelspec.prediction_type", "").lower())
        or _prediction_in_yaml(model)
        or "epsilon"
    )
    zero_snr = "ztsnr" in header.shapes if own.zero_snr is None else own.zero_snr
    return {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}


def _prediction_in_yaml(model: Path) -> str | None:
    """Return the prediction type in a YAML config, None if there is none."""
    path = next((path for path in map(model.with_suffix, YAML) if path.is_file()), None)
    if path is None:
        return None
    try:
        # all values stay texts: building a date or a number of a damaged file may fail in any way
        content = yaml.load(_read(path), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise _damaged(path, f"it is not YAML ({str(error).splitlines()[0]})") from None
    values = [*_values(content)]
    for key, value in values:
        if key == "parameterization" and (prediction := _known_prediction(value)):
            return prediction
    for key, value in values:
        if key == "target" and (scaling := str(value).rpartition(".")[2]) in _SCALINGS:
            return _SCALINGS[scaling]
    return None


def _values(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield keys and plain values at any depth.

    Each container counts once, because aliases may repeat it.
    """
    pending, seen = [content], set[int]()
    while pending:
        value = pending.pop()
        if id(value) in seen or not isinstance(value, (dict, list)):
            continue
        seen.add(id(value))
        items = cast("dict[Any, Any]", value).items() if isinstance(value, dict) else ()
        yield from ((key, item) for key, item in items if not isinstance(item, (dict, list)))
        pending += [item for _, item in items] if isinstance(value, dict) else value


def _read(path: Path) -> str:
    try:
        with open_file(path) as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _damaged(path, f"it cannot be read: {error.strerror}") from None
    if len(text) > MAX_BYTES:
        raise _damaged(path, f"it has more than {MAX_BYTES:,} bytes")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _damaged(path, "it is not UTF-8") from None


def _damaged(path: Path, reason: str) -> CorruptFile:
    return CorruptFile(
        f"{printable(f'{path}: {reason}')[:1000]}.", hint="Correct the file, or remove it."
    )
