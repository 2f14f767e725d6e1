"""Choices of device, number formats and memory mode."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from alphalayer.engine.families.configs import SHIPPED
from alphalayer.engine.memory import (
    GIB,
    MEMORY_MODES,
    SDXL_GIB,
    choose_precision,
    describe,
    is_out_of_memory,
)
from alphalayer.engine.networks.transparent import TransparentDecoder


def test_describe_gives_the_reason_of_automatic_choices():
    cpu = torch.device("cpu")
    precision = choose_precision(cpu, "auto")
    automatic = describe(cpu, precision, MEMORY_MODES["high"], requested=("auto", "auto"))
    assert automatic == 'cpu (torch sees no GPU), float32, memory mode "high"'
    assert (
        describe(cpu, precision, MEMORY_MODES["high"], requested=("cpu", "high"))
        == 'cpu, float32, memory mode "high"'
    )


def test_fp32_switches_off_tf32_in_convolutions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    choose_precision(torch.device("cpu"), "auto")
    assert torch.backends.cudnn.allow_tf32
    choose_precision(torch.device("cpu"), "fp32")
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 99 bytes."
        ),
        RuntimeError(
            "[enforce fail] data. DefaultCPUAllocator: not enough memory: "
            "you tried to allocate 99 bytes."
        ),
        OSError(12, "Cannot allocate memory"),
        OSError("The paging file is too small for this operation to complete. (os error 1455)"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_recognized_in_all_messages(error: Exception):
    assert is_out_of_memory(error)


def test_out_of_memory_is_not_recognized_in_other_errors():
    for error in (
        RuntimeError("a shape is wrong"),
        OSError(2, "No such file"),
        ValueError("out of memory"),
    ):
        assert not is_out_of_memory(error)


def test_rows_at_once_are_limited_in_every_mode():
    """Allow one call on a large GPU for 8 images of 1024x1024 with guidance.

    Many small images are one call, too.
    """
    bounds = {
        name: [mode.rows_at_once(side, side) for side in (256, 1024, 2048)]
        for name, mode in MEMORY_MODES.items()
    }
    assert bounds == {"high": [256, 16, 4], "balanced": [64, 4, 1], "low": [1, 1, 1]}


def test_sdxl_gib_is_the_size_of_the_shipped_configs():
    """Count the weights of the shipped configs on the meta device.

    Bytes of a weight are those of `choose_precision` and of loading.
    """
    parts = [
        (UNet2DConditionModel, "unet", 2),
        (AutoencoderKL, "vae", 2),
        (CLIPTextModel, "text_encoder", 4),
        (CLIPTextModelWithProjection, "text_encoder_2", 4),
    ]
    total = 0
    with torch.device("meta"):
        for kind, name, size in parts:
            config = json.loads((SHIPPED / name / "config.json").read_text())
            module = (
                kind(CLIPTextConfig(**config))
                if name.startswith("text")
                else kind.from_config(config)
            )
            total += size * sum(weight.numel() for weight in module.parameters())
        total += 2 * sum(weight.numel() for weight in TransparentDecoder().parameters())
    assert total / GIB == pytest.approx(SDXL_GIB, abs=0.05)
