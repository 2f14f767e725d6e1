"""Requests as Forge reads them: final latents against those that Forge generated."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.parity.forge_model import make_models
from torch import Tensor

from alphalayer.api.a1111.schemas import Txt2ImgRequest
from alphalayer.api.a1111.settings import OverrideSettings
from alphalayer.engine.pipeline import LocalEngine

DATA = Path(__file__).parent / "data" / "forge"
CASES: dict[str, dict[str, Any]] = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))
TOLERANCE = 5e-3
"""See `data/forge/README.md`."""


class LatentEngine(LocalEngine):
    """Engine that keeps the latents and decodes none."""

    latents: Tensor

    def _compose(self, _requests, _mode, _decoding, latents, _reporter):
        self.latents = latents
        return [[] for _ in latents]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LatentEngine:
    return LatentEngine(make_models(tmp_path_factory.mktemp("models")), device="cpu")


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(DATA / "latents.npz") as latents:
        return dict(latents)


@pytest.mark.parametrize("name", CASES)
def test_request_gives_the_latents_of_forge(
    engine: LatentEngine, expected: dict[str, np.ndarray], name: str
):
    body = Txt2ImgRequest.model_validate(
        {**CASES[name], "layerdiffuse_enabled": "alwayson_scripts" in CASES[name]}
    )
    service: Any = SimpleNamespace(noise="nv", decode="forge2", prompt_comments=True)
    engine.generate(body.to_spec(service, OverrideSettings()).generation)
    difference = np.abs(engine.latents.numpy() - expected[name]).max()
    assert difference <= TOLERANCE
