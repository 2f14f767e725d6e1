"""Patch files in every published form against the formula, and their removal bit for bit.

`W' = W + strength * scale * up @ down`, `W' = W + strength * offset`, or a replacement. The sum is
computed in float32 and cast once.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support import tiny_models
from tests.support.tiny_models import unet_name_in_ldm

from alphalayer.core.errors import CorruptFile, LayerDiffuseMissing, ModelUnusable
from alphalayer.engine.parameter_names import ldm_to_diffusers
from alphalayer.engine.transparency.patch import (
    Delta,
    Patch,
    PatchFile,
    WeightPatcher,
    patchers,
    read_patch,
)

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
PAIRS: Pairs = tiny_models.lora_pairs()


UNET = tiny_models.unet()
TEXT_ENCODERS = [encoder.half() for encoder in tiny_models.text_encoders()]


@pytest.fixture
def unet():
    return copy.deepcopy(UNET)


def _weights(unet) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in unet.named_parameters()}


def _parameters(unet) -> dict[str, torch.Tensor]:
    return dict(unet.named_parameters())


def _patcher(unet) -> WeightPatcher:
    return patchers(unet, TEXT_ENCODERS)[0]


def _expected(
    weights: dict[str, torch.Tensor], pairs: Pairs, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Evaluate the formula in float64."""
    changed = {
        name: weights[name].double() + scale * (up.double() @ down.double())
        for name, (up, down) in pairs.items()
    }
    return {name: changed.get(name, tensor.double()) for name, tensor in weights.items()}


def _patched(
    unet, tmp_path: Path, tensors: dict[str, torch.Tensor], strength: float = 1.0
) -> dict[str, torch.Tensor]:
    file = tmp_path / "patch.safetensors"
    save_file(tensors, file)
    _patcher(unet).ensure([(PatchFile.at(file), strength)])
    return _weights(unet)


def _check(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        # float32 sums of four products
        torch.testing.assert_close(
            weights[name].double(),
            tensor,
            rtol=1e-6,
            atol=1e-6,
            msg=lambda m, name=name: f"{name}: {m}",
        )


# --- the forms


def _published(pairs: Pairs) -> dict[str, torch.Tensor]:
    keys = {name: f"diffusion_model.{unet_name_in_ldm(name)}::lora::" for name in pairs}
    return {
        f"{keys[name]}{i}": tensor for name, pair in pairs.items() for i, tensor in enumerate(pair)
    }


def _named(pairs: Pairs, up: str, down: str, stem=lambda name: name) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (first, second) in pairs.items():
        start = stem(name.removesuffix(".weight"))
        tensors |= {start + up: first, start + down: second}
    return tensors


def _kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def _ldm(name: str) -> str:
    return unet_name_in_ldm(name + ".weight").removesuffix(".weight")


def _kohya_ldm(name: str) -> str:
    return _kohya(_ldm(name))


FORMS = {
    "LayerDiffuse as published": _published,
    "PEFT": lambda pairs: _named(
        pairs, ".lora_B.weight", ".lora_A.weight", lambda name: "unet." + name
    ),
    "PEFT, wrapped": lambda pairs: _named(
        pairs, ".lora_B.weight", ".lora_A.weight", lambda name: "base_model.model." + name
    ),
    "ComfyUI": lambda pairs: _named(
        pairs, ".lora_up.weight", ".lora_down.weight", lambda name: "diffusion_model." + _ldm(name)
    ),
    "PEFT without prefix": lambda pairs: _named(pairs, ".lora_B.weight", ".lora_A.weight"),
    "kohya, LDM names": lambda pairs: _named(
        pairs, ".lora_up.weight", ".lora_down.weight", _kohya_ldm
    ),
    "kohya, diffusers names": lambda pairs: _named(
        pairs, ".lora_up.weight", ".lora_down.weight", _kohya
    ),
    "diffusers": lambda pairs: _named(
        pairs, ".lora.up.weight", ".lora.down.weight", lambda name: "unet." + name
    ),
    "old diffusers": lambda pairs: _named(
        pairs,
        "_lora.up.weight",
        "_lora.down.weight",
        lambda name: _processor(name.removesuffix(".0")),
    ),
}


def _processor(name: str) -> str:
    block, layer = name.rsplit(".", 1)
    return f"unet.{block}.processor.{layer}"


@pytest.mark.parametrize("form", FORMS)
def test_low_rank_patch_in_every_form_follows_the_formula(unet, tmp_path: Path, form: str):
    before = _weights(unet)
    assert len(PAIRS) > 50, "all attention projections"
    _check(_patched(unet, tmp_path, FORMS[form](PAIRS)), _expected(before, PAIRS))


@pytest.mark.parametrize("strength", [0.5, 2.0, -1.0])
def test_patch_strength_scales_the_change(unet, tmp_path: Path, strength: float):
    before = _weights(unet)
    _check(
        _patched(unet, tmp_path, _published(PAIRS), strength), _expected(before, PAIRS, strength)
    )


def test_published_alpha_is_divided_by_the_rank(unet, tmp_path: Path):
    before = _weights(unet)
    tensors = _published(PAIRS)
    tensors |= {
        key.replace("::0", "::2"): torch.tensor(1.0) for key in tensors if key.endswith("::0")
    }
    _check(_patched(unet, tmp_path, tensors), _expected(before, PAIRS, 1 / tiny_models.RANK))


def test_kohya_alpha_is_divided_by_the_rank(unet, tmp_path: Path):
    before = _weights(unet)
    tensors = FORMS["kohya, LDM names"](PAIRS)
    tensors |= {
        key.replace(".lora_up.weight", ".alpha"): torch.tensor(2.0)
        for key in tensors
        if "lora_up" in key
    }
    _check(_patched(unet, tmp_path, tensors), _expected(before, PAIRS, 2 / tiny_models.RANK))


def _offsets(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: (torch.randn(tensor.shape, generator=generator) / 10).half()
        for name, tensor in weights.items()
    }


def test_published_full_differences_reach_every_parameter(unet, tmp_path: Path):
    """Cover all names: also convolutions, norms, embeddings and biases."""
    before = _weights(unet)
    offsets = _offsets(before)
    tensors = {
        f"diffusion_model.{unet_name_in_ldm(name)}::diff::0": tensor
        for name, tensor in offsets.items()
    }
    _check(
        _patched(unet, tmp_path, tensors, 0.5),
        {name: before[name].double() + 0.5 * offsets[name].double() for name in before},
    )


def test_published_set_replaces_the_weight(unet, tmp_path: Path):
    before = _weights(unet)
    name = "down_blocks.1.resnets.0.conv1.weight"
    new = _offsets(before)[name]
    result = _patched(unet, tmp_path, {f"diffusion_model.{unet_name_in_ldm(name)}::set::0": new})
    _check(
        result, {**{name: tensor.double() for name, tensor in before.items()}, name: new.double()}
    )


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_offsets_with_diffusers_names_are_added(unet, tmp_path: Path, prefix: str):
    before = _weights(unet)
    offsets = {name: tensor for name, tensor in _offsets(before).items() if ".attn" in name}
    result = _patched(unet, tmp_path, {prefix + name: tensor for name, tensor in offsets.items()})
    _check(
        result,
        {
            name: tensor.double() + offsets[name].double() if name in offsets else tensor.double()
            for name, tensor in before.items()
        },
    )


def test_ldm_to_diffusers_renames_names_of_the_ldm_layout_only(unet):
    names = [name for name, _ in unet.named_parameters()]
    assert [ldm_to_diffusers(unet_name_in_ldm(name)) for name in names] == names
    assert [ldm_to_diffusers(name) for name in names] == names


@pytest.mark.parametrize("stem", [_kohya_ldm, _kohya], ids=["LDM names", "diffusers names"])
def test_kohya_lora_of_convolutions_and_other_layers_is_merged(unet, tmp_path: Path, stem):
    before = _weights(unet)
    generator = torch.Generator().manual_seed(6)
    tensors, expected = {}, {name: tensor.double() for name, tensor in before.items()}
    for name, weight in before.items():
        if name.endswith(".weight") and weight.ndim > 1:
            up = torch.randn(weight.shape[0], 2, *[1] * (weight.ndim - 2), generator=generator) / 10
            down = torch.randn(2, *weight.shape[1:], generator=generator) / 10
            start = stem(name.removesuffix(".weight"))
            tensors |= {f"{start}.lora_up.weight": up, f"{start}.lora_down.weight": down}
            expected[name] = expected[name] + torch.einsum(
                "or...,ri...->oi...", up.double(), down.double()
            )
    _check(_patched(unet, tmp_path, tensors), expected)


# --- text encoders


def _text_pairs() -> Pairs:
    """Return a change of every linear layer of both encoders.

    The names are those of published files, with `text_model.`.
    """
    generator = torch.Generator().manual_seed(7)
    pairs = {}
    for part, encoder in zip(("text_encoder", "text_encoder_2"), TEXT_ENCODERS, strict=True):
        for name, weight in encoder.named_parameters():
            if name.endswith("weight") and (
                ".mlp." in name or ("_proj." in name and ".self_attn." in name)
            ):
                up = torch.randn(weight.shape[0], 2, generator=generator) / 10
                down = torch.randn(2, weight.shape[1], generator=generator) / 10
                inside = name if name.startswith("text_model.") else f"text_model.{name}"
                pairs[f"{part}.{inside}"] = up, down
    return pairs


def _kohya_text(name: str) -> str:
    part, inside = name.split(".", 1)
    return f"lora_te{2 if part.endswith('2') else 1}_{inside.replace('.', '_')}"


@pytest.mark.parametrize(
    ("up", "down", "stem"),
    [
        (".lora_up.weight", ".lora_down.weight", _kohya_text),
        (".lora_B.weight", ".lora_A.weight", lambda name: name),
        (".lora.up.weight", ".lora.down.weight", lambda name: name),
    ],
    ids=["kohya", "PEFT", "diffusers"],
)
def test_text_encoder_lora_is_merged_and_rounded_as_stored(unet, tmp_path: Path, up, down, stem):
    encoders = copy.deepcopy(TEXT_ENCODERS)
    before = [_weights(module) for module in (unet, *encoders)]
    text, file = _text_pairs(), tmp_path / "lora.safetensors"
    assert len(text) == 6 * 3 * 2
    unet_part = FORMS["PEFT"](PAIRS) if stem("x.y") == "x.y" else FORMS["kohya, LDM names"](PAIRS)
    save_file({**_named(text, up, down, stem), **unet_part}, file)
    for_unet, for_text = patchers(unet, encoders)
    for_text.ensure([(PatchFile.at(file), 0.5)])
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in _weights(unet).items())
    for part, encoder, weights in zip(
        ("text_encoder", "text_encoder_2"), encoders, before[1:], strict=True
    ):
        changed = 0
        for name, result in _weights(encoder).items():
            pair = text.get(f"{part}.{name}") or text.get(f"{part}.text_model.{name}")
            if pair is None:
                assert torch.equal(result, weights[name])
                continue
            changed += 1
            exact = weights[name].double() + 0.5 * (pair[0].double() @ pair[1].double())
            expected = exact.half()
            torch.testing.assert_close(result, expected, rtol=2**-10, atol=1e-6)
        assert changed == 18
    for_unet.ensure([(PatchFile.at(file), 1.0)])
    _check(_weights(unet), _expected(before[0], PAIRS))
    for_text.remove()
    for encoder, weights in zip(encoders, before[1:], strict=True):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in _weights(encoder).items())


# --- number formats


@pytest.mark.parametrize(
    ("dtype", "ulp"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float32, 2**-22)]
)
def test_patch_is_added_in_float32_and_cast_once(tmp_path: Path, dtype: torch.dtype, ulp: float):
    unet = copy.deepcopy(UNET).to(dtype)
    before = _weights(unet)
    result = _patched(unet, tmp_path, _published(PAIRS))
    expected = _expected(before, PAIRS)
    differing = total = 0
    for name in PAIRS:
        assert result[name].dtype == dtype
        rounded = expected[name].to(dtype)
        torch.testing.assert_close(result[name], rounded, rtol=ulp, atol=1e-6)
        differing += int((result[name] != rounded).sum())
        total += rounded.numel()
    # A float32 sum is rounded differently for one in a few thousand values. A sum in 16 bit is
    # rounded differently far more often.
    if dtype != torch.float32:
        assert differing / total < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_patcher_remove_restores_every_bit(tmp_path: Path, dtype: torch.dtype):
    unet = copy.deepcopy(UNET).to(dtype)
    before = _weights(unet)
    save_file(_published(PAIRS), tmp_path / "first.safetensors")
    save_file(
        {"unet." + name: tensor for name, tensor in _offsets(before).items()},
        tmp_path / "second.safetensors",
    )
    patcher = _patcher(unet)
    first, second = (PatchFile.at(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    patcher.ensure([(first, 1.0)])
    patcher.ensure([(second, 1.7), (first, -0.3)])
    assert any(not torch.equal(before[name], tensor) for name, tensor in unet.named_parameters())
    patcher.remove()
    for name, tensor in unet.named_parameters():
        assert torch.equal(tensor, before[name]), name


class _FailingDelta(Delta):
    """Change that runs out of memory."""

    def apply(self, weight: torch.Tensor, strength: float) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_patcher_keeps_originals_of_a_float16_file_in_16_bit():
    """Weights that float16 cannot hold are kept as they are, and both are restored exactly."""
    stored = torch.randn(64, 64).half().float()
    weights = {"stored": stored.clone(), "own": stored + 2**-20}
    expected = {name: weight.clone() for name, weight in weights.items()}
    patch = Patch({name: Delta(torch.ones(64, 64)) for name in weights})
    patcher = WeightPatcher(weights, lambda _: patch)
    patcher.apply([(patch, 1.0)])
    kept = {name: original.dtype for name, original in patcher._originals.items()}
    assert kept == {"stored": torch.float16, "own": torch.float32}
    patcher.remove()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


@pytest.mark.parametrize("place", [0, 1, 40, -1])
def test_patcher_out_of_memory_restores_every_bit(tmp_path: Path, place: int):
    unet = copy.deepcopy(UNET).half()
    before = _weights(unet)
    file = tmp_path / "patch.safetensors"
    save_file(_published(PAIRS), file)
    patcher = _patcher(unet)
    patcher.ensure([(PatchFile.at(file), 1.0)])
    whole = _weights(unet)
    patcher.remove()
    patch = read_patch(file, _parameters(unet))
    name = list(patch.deltas)[place]
    failing = Patch({**patch.deltas, name: _FailingDelta(patch.deltas[name].up)})
    with pytest.raises(torch.OutOfMemoryError):
        patcher.apply([(failing, 1.0)])
    for name, tensor in unet.named_parameters():
        assert torch.equal(tensor, before[name]), name
    patcher.ensure([(PatchFile.at(file), 1.0)])
    assert all(torch.equal(tensor, whole[name]) for name, tensor in unet.named_parameters())


def test_patcher_several_patches_are_added_in_one_pass(tmp_path: Path):
    unet = copy.deepcopy(UNET).half()
    before = _weights(unet)
    offsets = {
        name: tensor
        for name, tensor in _offsets(before).items()
        if ".attn" in name and name in PAIRS
    }
    lora, layer = tmp_path / "lora.safetensors", tmp_path / "layer.safetensors"
    save_file({"unet." + name: tensor for name, tensor in offsets.items()}, lora)
    save_file(_published(PAIRS), layer)
    _patcher(unet).ensure([(PatchFile.at(lora), 0.7), (PatchFile.at(layer), 1.0)])
    merged = _expected(before, PAIRS)
    for name, tensor in offsets.items():
        torch.testing.assert_close(
            dict(unet.named_parameters())[name],
            (merged[name] + 0.7 * tensor.double()).half(),
            rtol=2**-10,
            atol=1e-6,
        )


def test_patcher_ensure_starts_from_the_original_weights(unet, tmp_path: Path):
    before = _weights(unet)
    file = tmp_path / "patch.safetensors"
    save_file(_published(PAIRS), file)
    patcher = _patcher(unet)
    for strength in (1.0, 0.25, 0.25, 2.0):
        patcher.ensure([(PatchFile.at(file), strength)])
        _check(_weights(unet), _expected(before, PAIRS, strength))
    patcher.ensure([(PatchFile.at(file), 0.0)])
    _check(_weights(unet), _expected(before, {}))


# --- files that cannot be used


def test_read_patch_missing_file_is_named(unet, tmp_path: Path):
    with pytest.raises(LayerDiffuseMissing, match=r"absent\.safetensors"):
        read_patch(tmp_path / "absent.safetensors", _parameters(unet))


def test_read_patch_damaged_file_is_named(unet, tmp_path: Path):
    file = tmp_path / "damaged.safetensors"
    save_file(_published(PAIRS), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptFile, match=r"damaged\.safetensors"):
        read_patch(file, _parameters(unet))


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.out.2.weight::diff",
        "diffusion_model.out.2.weight::diff::zero",
        "a::b::c::0",
    ],
)
def test_read_patch_malformed_keys_are_refused(unet, tmp_path: Path, key: str):
    file = tmp_path / "odd.safetensors"
    save_file({key: torch.zeros(1)}, file)
    with pytest.raises(ModelUnusable, match=r"odd\.safetensors"):
        read_patch(file, _parameters(unet))


def test_read_patch_for_another_model_is_refused(unet, tmp_path: Path):
    file = tmp_path / "other.safetensors"
    save_file({"diffusion_model.out.2.weight::diff::0": torch.zeros(4, 320, 3, 3)}, file)
    with pytest.raises(ModelUnusable, match="does not fit"):
        read_patch(file, _parameters(unet))


def test_read_patch_mostly_unfitting_lora_is_refused(unet, tmp_path: Path):
    """Cover LoRAs for SD 1.5: some of their layers have the names and shapes of SDXL."""
    file = tmp_path / "sd15.safetensors"
    fitting = dict(list(PAIRS.items())[:10])
    other = {
        f"unet.down_blocks.0.attentions.{i}.to_q.lora_A.weight": torch.zeros(4, 320)
        for i in range(11)
    }
    other |= {name.replace("lora_A", "lora_B"): torch.zeros(320, 4) for name in other}
    save_file({**FORMS["PEFT"](fitting), **other}, file)
    with pytest.raises(ModelUnusable, match="10 of its 21 changes"):
        read_patch(file, _parameters(unet))


def test_read_patch_unfitting_changes_are_ignored_and_counted(
    unet, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "partly.safetensors"
    extra = {"diffusion_model.input_blocks.77.0.weight::diff::0": torch.zeros(1)}
    save_file({**_published(PAIRS), **extra}, file)
    with caplog.at_level(logging.WARNING):
        patch = read_patch(file, _parameters(unet))
    assert len(patch.deltas) == len(PAIRS)
    assert patch.left_out == ("changes of layers that the model lacks: 1",)
    assert patch.left_out[0] in caplog.text
