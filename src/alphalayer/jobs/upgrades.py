"""Conversion of journal rows that an earlier version wrote."""

from __future__ import annotations

import json
from typing import Any

from alphalayer.core.job import JobSpec
from alphalayer.core.modes import OPAQUE
from alphalayer.core.request import ModelDefaults


def upgrade_6_to_7(row: dict[str, Any]) -> dict[str, Any]:
    """Return the changed columns of a row of version 6.

    In version 6 the specification held delivery and trace beside the request, the result
    repeated the request, and transparency was a nested object.
    """
    spec = json.loads(row["spec"])
    _flatten_transparency(spec["generation"])
    delivery = {"webhook": spec.pop("webhook", None), "with_data": spec.pop("with_data", False)}
    traceparent = spec.pop("traceparent", None)
    spec.pop("asked_digest", None)
    columns = {
        "spec": JobSpec.model_validate(spec).with_seeds().model_dump_json(),
        "delivery": json.dumps(delivery, separators=(",", ":")),
        "traceparent": traceparent,
    }
    if row["result"]:
        result = json.loads(row["result"])
        request = result.pop("generation")
        result["settings"] = {name: request[name] for name in ModelDefaults.model_fields}
        for image in result["images"]:
            image.pop("parameters", None)
        columns["result"] = json.dumps(result)
    return columns


def _flatten_transparency(generation: dict[str, Any]) -> None:
    options = generation.pop("layerdiffuse", None) or {}
    generation["mode"] = (
        options.get("method", "attention") if options.get("enabled", True) else OPAQUE
    )
    generation["layerdiffuse_weight"] = options.get("weight", 1.0)
    generation["layerdiffuse_stop_at"] = options.get("stop_at", 1.0)
