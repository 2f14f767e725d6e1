"""Chains: the modes that make the requested layers from the given ones. Free of torch and HTTP."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from alphalayer.core.errors import InvalidRequest
from alphalayer.core.modes import MODES, ConditionRole, LayerRole, Mode

Want = Literal["layers", "foreground", "background", "blended"]
"""Layer to generate, with those that it needs, or all layers."""
WANTS: tuple[Want, ...] = get_args(Want)
STACK: tuple[LayerRole, ...] = ("background", "foreground", "blended", "composite")
"""Roles of the layers of a document, bottom to top."""
CONDITIONS: tuple[ConditionRole, ...] = get_args(ConditionRole)
DEFAULT_FAMILY = "sdxl"

Chain = tuple[str, ...]
_Chains = dict[frozenset[ConditionRole], tuple[Chain, ...]]

_CHAINS: dict[str, _Chains] = {
    "sdxl": {
        frozenset(): (
            ("attention",),
            ("attention", "fg2ble"),
            ("attention", "fg2ble", "fgble2bg"),
        ),
        frozenset({"foreground"}): (("fg2ble",), ("fg2ble", "fgble2bg")),
        frozenset({"background"}): (("bg2ble",), ("bg2ble", "bgble2fg")),
        frozenset({"foreground", "blended"}): (("fgble2bg",),),
        frozenset({"background", "blended"}): (("bgble2fg",),),
    },
    "sd15": {
        frozenset(): (("sd15_attention",), ("sd15_joint",)),
        frozenset({"foreground"}): (("sd15_fg2bg",),),
        frozenset({"background"}): (("sd15_bg2fg",),),
    },
}
"""Chains of each family by the given layers, shortest first. The last makes all layers."""


def plan_chain(
    want: Want, inputs: Collection[ConditionRole], family: str = DEFAULT_FAMILY
) -> tuple[Mode, ...]:
    """Return the modes that make the requested layers, in their order.

    Args:
        want: Layer to generate.
        inputs: Roles of the given layers.
        family: Family of the model.

    Raises:
        InvalidRequest: The layer is given already, or no mode makes it from the given ones.
    """
    if want in inputs:
        raise InvalidRequest(
            f"the {want} is given already.",
            hint=f"Leave {want} out, or want another.",
            field="want",
        )
    chains = _CHAINS.get(family, {})
    key = frozenset(inputs)
    if key not in chains:
        accepted = ", or ".join(_names_of(roles) for roles in chains if roles)
        raise InvalidRequest(
            f"no mode of {family} starts from {_names_of(inputs) or 'a prompt alone'}.",
            hint=f"Send no images, or {accepted}." if accepted else "Use a model of SDXL.",
            field=_first_of(inputs),
        )
    plans = [tuple(MODES[name] for name in chain) for chain in chains[key]]
    if want == "layers":
        return plans[-1]
    return next(
        plan for plan in plans if want in {role for mode in plan for role in mode.layer_roles}
    )


def find_chains(family: str) -> dict[tuple[ConditionRole, ...], dict[Want, tuple[Mode, ...]]]:
    """Return the chains of a family by the given layers and the requested ones."""
    return {
        tuple(role for role in CONDITIONS if role in inputs): {
            want: plan_chain(want, inputs, family) for want in WANTS if want not in inputs
        }
        for inputs in _CHAINS.get(family, {})
    }


def _names_of(roles: Collection[ConditionRole]) -> str:
    return " and ".join(role for role in CONDITIONS if role in roles)


def _first_of(roles: Collection[ConditionRole]) -> str:
    return next((role for role in CONDITIONS if role in roles), "model")
