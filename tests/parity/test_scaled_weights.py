"""Checkpoints in fp8 with scales, and a VAE in a file of its own, against their plain weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support import tiny_models

from alphalayer import catalog
from alphalayer.engine.families.scaled import apply_scales
from alphalayer.engine.families.sdxl import load_model
from alphalayer.engine.families.stable_diffusion import StableDiffusion
from alphalayer.engine.memory import choose_precision
from alphalayer.engine.networks.weights import NamedWeights
from alphalayer.engine.parameter_names import ldm_to_diffusers

FP8 = torch.float8_e4m3fn
LINEAR = ".transformer_blocks."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    path = tmp_path_factory.mktemp("single") / "cup.safetensors"
    return load_file(tiny_models.make_single_file(path))


def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp8 numbers over their whole range, and the scale that makes them the weight."""
    scale = weight.float().abs().max() / torch.finfo(FP8).max
    return (weight.float() / scale).to(FP8), scale


def _quant_config(kind: str) -> torch.Tensor:
    return torch.tensor([*json.dumps({"format": kind}).encode()], dtype=torch.uint8)


def _load(folder: Path, **files: Tensors) -> StableDiffusion:
    (folder / "Stable-diffusion").mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / "Stable-diffusion" / f"{name.replace('__', '.')}.safetensors")
    entry = next(entry for entry in catalog.find_models(folder) if entry.name == "cup")
    assert entry.problem is None
    return load_model(entry, choose_precision(torch.device("cpu"), "fp32"), folder)


@pytest.mark.parametrize("layout", ["scale_weight", "weight_scale"])
def test_scaled_checkpoint_is_multiplied_by_its_scales(
    tmp_path: Path, single: Tensors, layout: str
):
    scaled, expected = dict(single), dict[str, torch.Tensor]()
    for name in [name for name in single if LINEAR in name and name.endswith("to_q.weight")]:
        stored, scale = _quantize(single[name])
        scaled[name], layer = stored, name.removesuffix(".weight")
        scaled[f"{layer}.{layout}"] = scale
        if layout == "weight_scale":
            scaled[f"{layer}.comfy_quant"] = _quant_config("float8_e4m3fn")
        own = ldm_to_diffusers(name.removeprefix("model.diffusion_model."))
        expected[own] = (stored.float() * scale).half().float()
        # fp8 has four significant bits
        torch.testing.assert_close(expected[own], single[name].float(), rtol=2**-4, atol=1e-3)
    if layout == "scale_weight":
        scaled["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    actual = NamedWeights(_load(tmp_path, cup=scaled).unet)
    assert len(expected) > 10
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


def test_scales_of_each_output_are_applied_by_row():
    weight, scales = torch.randn(3, 4), torch.tensor([[1.0], [2.0], [0.5]])
    stored = weight.to(FP8)
    applied = apply_scales({"a.weight": stored, "a.weight_scale": scales, "a.bias": weight[0]})
    assert applied.keys() == {"a.weight", "a.bias"}
    assert torch.equal(applied["a.weight"], (stored.float() * scales).half())


def test_scaled_number_keeps_its_shape():
    applied = apply_scales({"a.weight": torch.tensor(2.0).to(FP8), "a.scale_weight": torch.ones(1)})
    assert applied["a.weight"].shape == ()


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"a.comfy_quant": _quant_config("nvfp4")}, "nvfp4"),
        ({"a.comfy_quant": _quant_config("int8_tensorwise")}, "int8_tensorwise"),
        ({"a.weight_scale_2": torch.ones(())}, "nvfp4"),
        ({"a.weight.quant_state.bitsandbytes__nf4": torch.ones(1)}, "nf4"),
        ({"a.weight": torch.ones(2, 2), "a.weight_scale": torch.ones(())}, "not in fp8"),
        ({"a.weight": torch.ones(2, 2).to(FP8), "a.scale_weight": torch.ones(3)}, "one scale"),
        ({"a.comfy_quant": torch.zeros(2, dtype=torch.uint8)}, "not JSON"),
        (
            {"a.weight": torch.full((2, 2), 448.0).to(FP8), "a.scale_weight": torch.tensor(200.0)},
            "beyond those of float16",
        ),
    ],
)
def test_other_quantized_weights_are_refused_by_name(tensors: Tensors, kind: str):
    with pytest.raises(ValueError, match=kind):
        apply_scales(tensors)


def test_vae_beside_a_checkpoint_replaces_its_own(tmp_path: Path, single: Tensors):
    prefix = "first_stage_model."
    vae = {
        name.removeprefix(prefix): tensor + 1 if name.endswith("conv_in.bias") else tensor
        for name, tensor in single.items()
        if name.startswith(prefix)
    }
    rest = {name: tensor for name, tensor in single.items() if not name.startswith(prefix)}
    loaded = NamedWeights(_load(tmp_path, cup=rest, cup__vae=vae).vae)
    for part in ("encoder", "decoder"):
        expected = single[f"{prefix}{part}.conv_in.bias"] + 1
        assert torch.equal(loaded[f"{part}.conv_in.bias"], expected.float())
