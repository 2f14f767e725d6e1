"""Routes of the native dialect."""

from __future__ import annotations

from fastapi import APIRouter

from alphalayer.api.dialect import Dialect
from alphalayer.api.errors import PROBLEMS
from alphalayer.api.guard import GuardedRoute
from alphalayer.api.native import documents, files, img2img, layers, models, txt2img
from alphalayer.api.native.fields import FIELDS

router = APIRouter(
    prefix="/alpha/v1", tags=["Alphalayer"], responses=PROBLEMS, route_class=GuardedRoute
)
for module in (txt2img, img2img, layers, documents, files, models):
    router.include_router(module.router)
DIALECT = Dialect("/alpha", router, field_names=FIELDS)
