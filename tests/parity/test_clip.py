"""CLIP's text models, compared with those of transformers in float32.

A fused product of q, k and v may round otherwise than three products. So values differ by at most
1e-6 of the largest one after 32 layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support import tiny_models
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from alphalayer.catalog import EMBEDDED_MODEL
from alphalayer.engine.families.clip_files import (
    build_text_model,
    read_text_folder,
    read_text_models,
    transformers_names,
)
from alphalayer.engine.networks.clip import ClipTextModel
from alphalayer.engine.networks.weights import NamedWeights

TOLERANCE = 1e-6
VOCABULARY, END = 1000, 999
# depth and heads as published, narrow
VIT_L = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 48}
BIG_G = {"num_hidden_layers": 32, "num_attention_heads": 20, "hidden_size": 80}
CASES = {
    "ViT-L": (CLIPTextModel, {**VIT_L, "hidden_act": "quick_gelu", "eos_token_id": 2}),
    "bigG": (
        CLIPTextModelWithProjection,
        {**BIG_G, "hidden_act": "gelu", "eos_token_id": 2, "projection_dim": 72},
    ),
    "ViT-L with projection": (
        CLIPTextModelWithProjection,
        {**VIT_L, "hidden_act": "quick_gelu", "eos_token_id": END, "projection_dim": 48},
    ),
    "bigG without projection": (
        CLIPTextModel,
        {**BIG_G, "hidden_act": "gelu", "eos_token_id": END, "layer_norm_eps": 1e-3},
    ),
}
Reference = CLIPTextModel | CLIPTextModelWithProjection


def _reference(kind: type[Reference], config: Mapping[str, object]) -> Reference:
    torch.manual_seed(7)
    model = kind(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            bos_token_id=END - 1,
            intermediate_size=4 * int(config["hidden_size"]),
            initializer_factor=4.0,
            **config,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms are trivial at first
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.half().float().eval().requires_grad_(False)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def models(request: pytest.FixtureRequest) -> tuple[ClipTextModel, Reference]:
    reference = _reference(*request.param)
    tensors = transformers_names(reference.state_dict(), "")
    return build_text_model(tensors, reference.config.to_dict()), reference


def _ids(rows: int, end: int = END) -> Tensor:
    """Return rows of random ids from 10 on, with an end token at different positions."""
    ids = torch.randint(10, end, (rows, 77), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = end - 1
    for row in range(rows):
        ids[row, 76 - 9 * row] = end
        ids[row, 77 - 9 * row :] = end if row % 2 else 0
    return ids


def _assert_equal(own: ClipTextModel, reference: Reference, ids: Tensor, layer: int) -> None:
    with torch.inference_mode():
        expected = reference(input_ids=ids, output_hidden_states=True)
        hidden = own(ids, layer)
        pooled = own.pool(hidden, ids, layer)
    pooled_expected = (
        expected.pooler_output if own.text_projection is None else expected.text_embeds
    )
    for value, other in ((hidden, expected.hidden_states[-layer]), (pooled, pooled_expected)):
        assert value.shape == other.shape
        assert (value - other).abs().max() <= TOLERANCE * other.abs().max()


@pytest.mark.parametrize("layer", [1, 2, 3, 12])
def test_hidden_states_and_pooled_output_equal_transformers(models, layer: int):
    _assert_equal(*models, _ids(5), layer)


def test_model_with_fewer_layers_returns_its_embeddings(models):
    own, reference = models
    with torch.inference_mode():
        expected = reference(input_ids=_ids(2), output_hidden_states=True).hidden_states[0]
        assert torch.equal(own(_ids(2), layer=99), expected)


def test_later_layers_are_not_computed(models):
    own, _ = models
    calls: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(own.encoder.layers)
    ]
    with torch.inference_mode():
        hidden = own(_ids(1), layer=3)
        computed = len(calls)
        own.pool(hidden, _ids(1), layer=3)
    for handle in handles:
        handle.remove()
    assert computed == len(handles) - 2
    assert calls == list(range(len(handles)))


def test_learned_vectors_replace_token_embeddings(models):
    own, reference = models
    vectors = torch.randn(3, own.width, generator=torch.Generator().manual_seed(4))
    ids, spare = _ids(2), [5, 6, 7]
    ids[1, 10:13] = torch.tensor(spare)
    table = reference.get_input_embeddings().weight
    original = table.clone()
    table[spare] = vectors
    with torch.inference_mode():
        expected = reference(input_ids=ids, output_hidden_states=True).hidden_states[-2][1]
        ids[1, 10:13] = 0
        hidden = own(ids, 2, [(1, 10, vectors)])[1]
    table.copy_(original)
    assert (hidden - expected).abs().max() <= TOLERANCE * expected.abs().max()


# --- files


@pytest.mark.parametrize(
    ("part", "kind"),
    [("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)],
)
def test_encoders_of_the_embedded_model_equal_transformers(part: str, kind: type[Reference]):
    folder = EMBEDDED_MODEL / part
    own, reference = read_text_folder(folder), kind.from_pretrained(folder, dtype=torch.float32)
    assert all(weight.dtype == torch.float16 for weight in own.parameters())
    for layer in (1, 2, 3):
        _assert_equal(own, reference, _ids(3, reference.config.vocab_size - 1), layer)


def _assert_same_weights(own: ClipTextModel, reference: Reference) -> None:
    expected = transformers_names(reference.state_dict(), "")
    weights = NamedWeights(own)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_text_models_of_a_single_file_equal_those_of_a_folder():
    first, second = references = tiny_models.text_encoders()
    tensors = tiny_models.single_file_tensors(first, second, tiny_models.unet(), tiny_models.vae())
    # old versions of transformers stored it, which are behind many files
    prefix = "conditioner.embedders.0.transformer.text_model."
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    for own, reference in zip(read_text_models(tensors), references, strict=True):
        _assert_same_weights(own, reference)
        _assert_equal(own, reference, _ids(2, 49407), 2)


@pytest.mark.parametrize("level", ["", "text_model."])
def test_folder_of_another_version_of_transformers_is_read(tmp_path: Path, level: str):
    first, _ = tiny_models.text_encoders()
    tensors = {f"{level}{name}": tensor for name, tensor in first.state_dict().items()}
    tensors[f"{level}embeddings.position_ids"] = torch.arange(77)[None]
    first.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    _assert_same_weights(read_text_folder(tmp_path), first)


def test_weights_are_rounded_to_float16_and_computed_in_float32():
    first, _ = tiny_models.text_encoders()
    exact = {name: tensor + 1e-5 for name, tensor in first.state_dict().items()}
    for name, weight in NamedWeights(build_text_model(exact, first.config.to_dict())).items():
        assert weight.dtype == torch.float16
        assert torch.equal(weight, exact[name].half())


@pytest.mark.parametrize("name", ["encoder.layers.1.mlp.fc2.bias", "final_layer_norm.weight"])
def test_missing_or_misshapen_weight_is_named(name: str):
    first, _ = tiny_models.text_encoders()
    tensors = dict(first.state_dict())
    weight = tensors.pop(name)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        build_text_model(tensors, first.config.to_dict())
    with pytest.raises(ValueError, match=f"{name} has the shape 1, expected {len(weight)}"):
        build_text_model({**tensors, name: weight[:1]}, first.config.to_dict())
