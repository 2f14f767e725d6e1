"""Weights by canonical name: rows of fused layers, assignment, devices and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alphalayer.engine.networks.weights import FusedLinear, NamedWeights

NAMES = {
    "norm.weight": (4,),
    "norm.bias": (4,),
    "block.q.weight": (2, 4),
    "block.deep.k.weight": (3, 4),
    "block.q.bias": (2,),
    "block.deep.k.bias": (3,),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fused = FusedLinear(4, {"q": 2, "deep.k": 3})


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.block = Block()


def make_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in NAMES.items()
    }


def test_fused_layers_keep_their_names():
    weights = NamedWeights(Network())
    assert weights.shapes() == NAMES
    assert len(weights) == len(NAMES)


def test_fused_layers_compute_as_the_separate_ones():
    network, tensors = Network(), make_tensors()
    NamedWeights(network).assign(tensors, torch.float32)
    x = torch.randn(5, 4)
    q, k = network.block.fused(x).split([2, 3], dim=-1)
    assert torch.allclose(q, x @ tensors["block.q.weight"].T + tensors["block.q.bias"])
    assert torch.allclose(k, x @ tensors["block.deep.k.weight"].T + tensors["block.deep.k.bias"])


def test_write_into_rows_changes_only_their_layer():
    network, tensors = Network(), make_tensors()
    weights = NamedWeights(network)
    weights.assign(tensors, torch.float32)
    weights["block.deep.k.weight"].copy_(torch.ones(3, 4))
    assert torch.equal(network.block.fused.weight[2:], torch.ones(3, 4))
    assert torch.equal(network.block.fused.weight[:2], tensors["block.q.weight"])


def test_network_on_the_meta_device_is_filled_in_one_dtype():
    with torch.device("meta"):
        network = Network()
    NamedWeights(network).assign(make_tensors(), torch.float16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}
    assert not any(
        parameter.is_meta or parameter.requires_grad for parameter in network.parameters()
    )


def test_values_follow_the_network_to_another_dtype():
    network = Network()
    weights = NamedWeights(network)
    network.half()
    assert weights["block.q.weight"].dtype == torch.float16


def test_missing_tensor_is_named():
    tensors = make_tensors()
    del tensors["block.deep.k.bias"]
    with pytest.raises(KeyError, match=r"block\.deep\.k\.bias"):
        NamedWeights(Network()).assign(tensors, torch.float32)
