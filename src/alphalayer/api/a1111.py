"""The AUTOMATIC1111 dialect, `/sdapi/v1`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from alphalayer.api.deps import ServiceDep, User

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])


class SdModel(BaseModel):
    """One checkpoint."""

    title: str
    model_name: str
    hash: str | None
    sha256: str | None
    filename: str
    config: str | None


@router.get("/sd-models", summary="The models that can be asked for", response_model=list[SdModel])
def sd_models(service: ServiceDep, _user: User) -> list[dict[str, Any]]:
    """Also the health check that operators of the old stack use."""
    return [entry.webui_json() for entry in service.list_models() if entry.problem is None]
