"""List of models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from alphalayer.api.deps import Service, ServiceDep
from alphalayer.api.guard import GuardedRoute, Reader
from alphalayer.catalog import ModelEntry, missing_files, model_defaults, shorten_paths
from alphalayer.core.errors import CorruptFile
from alphalayer.core.layers import Want, find_chains
from alphalayer.core.modes import MODES, ConditionRole
from alphalayer.core.request import ModelDefaults

router = APIRouter(route_class=GuardedRoute)


class LayerChoice(BaseModel):
    """Layers that a model can generate from the given ones."""

    given: Annotated[
        list[ConditionRole], Field(description="Layers that the request has as images.")
    ]
    want: Annotated[Want, Field(description="Value of `want`.")]
    pull: Annotated[
        list[str],
        Field(description="Names for `alphalayer models pull`, if files are missing."),
    ]


class Model(BaseModel):
    """One model: its defaults, or why it cannot be used."""

    name: Annotated[str, Field(description="Name for requests.")]
    title: Annotated[str, Field(description="Name, with the short hash once it is known.")]
    is_default: Annotated[bool, Field(description="Used if a request names none.")]
    defaults: Annotated[
        ModelDefaults, Field(description="Values of fields that a request leaves out.")
    ]
    problem: Annotated[str | None, Field(description="Why it cannot be used.")] = None
    modes: Annotated[
        list[str], Field(description="Modes of LayerDiffuse whose files are there.")
    ] = []
    layers: Annotated[
        list[LayerChoice], Field(description="Layers that it can generate, see /alpha/v1/layers.")
    ] = []


class ModelList(BaseModel):
    """The models of this service."""

    models: Annotated[list[Model], Field(description="Sorted by name.")]


@router.get("/models", summary="List models")
def models(service: ServiceDep, _user: Reader) -> ModelList:
    """Return all models. Unusable ones have a reason."""
    default = service.readiness()["model"]
    return ModelList(models=[_model(entry, default, service) for entry in service.list_models()])


def _model(entry: ModelEntry, default: str | None, service: Service) -> Model:
    problem, defaults = entry.problem, ModelDefaults()
    try:
        defaults = model_defaults(entry.path, entry.family)
    except CorruptFile as error:
        problem = problem or shorten_paths(error, service.models_dir)
    missing = {} if problem else _missing_downloads(entry, service.models_dir)
    return Model(
        name=entry.name,
        title=entry.title,
        is_default=entry.title == default,
        defaults=defaults,
        problem=f"{problem.message} {problem.hint}".strip() if problem else None,
        modes=[name for name, downloads in missing.items() if not downloads],
        layers=[
            LayerChoice(
                given=list(roles),
                want=want,
                pull=list(dict.fromkeys(one for mode in chain for one in missing[mode.name])),
            )
            for roles, chains in find_chains(entry.family).items()
            for want, chain in chains.items()
            if all(mode.name in missing for mode in chain)
        ],
    )


def _missing_downloads(entry: ModelEntry, models_dir: Path) -> dict[str, list[str]]:
    """Return the modes that a model can have, each with the downloads that it lacks."""
    return {
        mode.name: [file.download for file in files]
        for mode in MODES.values()
        if mode.files and (files := missing_files(entry, mode, models_dir)) is not None
    }
