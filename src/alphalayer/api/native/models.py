"""List of models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from alphalayer.api.deps import Service, ServiceDep
from alphalayer.api.guard import GuardedRoute, Reader
from alphalayer.catalog import ModelEntry, model_defaults, shorten_paths
from alphalayer.core.errors import CorruptFile
from alphalayer.core.request import ModelDefaults

router = APIRouter(route_class=GuardedRoute)


class Model(BaseModel):
    """One model: its defaults, or why it cannot be used."""

    name: Annotated[str, Field(description="Name for requests.")]
    title: Annotated[str, Field(description="Name, with the short hash once it is known.")]
    is_default: Annotated[bool, Field(description="Used if a request names none.")]
    defaults: Annotated[
        ModelDefaults, Field(description="Values of fields that a request leaves out.")
    ]
    problem: Annotated[str | None, Field(description="Why it cannot be used.")] = None


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
    return Model(
        name=entry.name,
        title=entry.title,
        is_default=entry.title == default,
        defaults=defaults,
        problem=f"{problem.message} {problem.hint}".strip() if problem else None,
    )
