"""Sets of layers of a chain: given, generated and composited images, bottom to top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from alphalayer.core.job import JobSpec
from alphalayer.core.layers import CONDITIONS, STACK
from alphalayer.core.modes import MODES, InputRole, LayerRole
from alphalayer.engine.base import GeneratedImage, GenerationResult, RgbaImage
from alphalayer.images.layered import composite_layers
from alphalayer.images.resampling import fit_layer

Described = tuple[GeneratedImage, str]
"""A layer and its settings text. Given layers and composites have none."""


def stack_layers(
    spec: JobSpec, results: Sequence[GenerationResult], inputs: Mapping[InputRole, RgbaImage]
) -> list[Described]:
    """Return the layers of all sets, those of each set bottom to top.

    Args:
        spec: The job.
        results: Results of its iterations, and of the stages of each.
        inputs: Given layers. They are fitted to the size of the others.
    """
    size = results[0].request.size
    resize_mode = spec.generation.resize_mode
    fitted: dict[InputRole, RgbaImage] = {
        role: fit_layer(rgba, size, resize_mode) for role, rgba in inputs.items()
    }
    generated = iter([(one, result.infotext(one)) for result in results for one in result.images])
    modes = [MODES[request.mode] for request in spec.requests]
    layers: list[Described] = []
    for _ in range(spec.iterations):
        sets: list[dict[LayerRole, Described]] = [{} for _ in range(spec.sets)]
        for mode in modes:
            for made in sets:
                made |= {role: next(generated) for role in mode.layer_roles}
        for made in sets:
            layers += _stack(made, fitted)
    return layers


def _stack(
    made: Mapping[LayerRole, Described], fitted: Mapping[InputRole, RgbaImage]
) -> list[Described]:
    """Return the layers of one set, bottom to top, with the composite on top."""
    (first, _), *_ = made.values()
    stack = {role: (replace(image, role=role), text) for role, (image, text) in made.items()}
    for role in CONDITIONS:
        if role in fitted:
            stack[role] = replace(first, rgba=fitted[role], role=role), ""
    if {"background", "foreground"} <= stack.keys():
        pixels = [stack[role][0].rgba for role in ("background", "foreground")]
        stack["composite"] = replace(first, rgba=composite_layers(pixels), role="composite"), ""
    return [stack[role] for role in STACK if role in stack]
