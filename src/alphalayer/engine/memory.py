"""Device, number formats and memory modes, and the rules to choose them.

This module is independent of the content of models. `Residency` moves modules to the device while
a stage of the pipeline runs.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from alphalayer.core.errors import CommandHint, SetupFailed

GIB = 1024**3
SDXL_GIB = 6.7
"""Weights of SDXL and LayerDiffuse's decoder in GiB, in 16 bit [counted]."""
SAMPLING_GIB = 0.32
"""Activations of the UNet in GiB for a megapixel with guidance, in 16 bit [counted]."""
MARGIN_GIB = 2.0
"""GPU memory in GiB beside what is counted, see `memory_count` [estimated].

The context of CUDA takes about 0.5 GiB. cuDNN may copy inputs and outputs of a convolution into
another order: 0.5 GiB in the VAE, 1.5 GiB in 8 passes of the decoder. The rest is fragmentation.
"""
MAX_BATCH_MEGAPIXELS = 8


@dataclass(frozen=True)
class Precision:
    """Number formats of the stages. Latent, schedule and guidance are always float32."""

    unet: torch.dtype
    vae: torch.dtype
    decoder: torch.dtype
    memory_format: torch.memory_format = torch.contiguous_format
    """Order of the weights of convolutions in memory. Activations follow it."""


@dataclass(frozen=True)
class MemoryMode:
    """Limits of what stays on the device between stages and of what one call computes."""

    name: str
    keep_text: bool
    keep_unet: bool
    unet_megapixels: int
    """Limit of all rows of one UNet call. A single row may have more."""
    passes_at_once: int
    """Passes in one call of the transparent decoder, out of 8."""
    sdxl_gib: float
    """GiB of a transparent SDXL image of 1024x1024: weights and activations [counted]."""

    def rows_at_once(self, width: int, height: int, together: int = 1) -> int:
        """Return the rows of one UNet call for images of a size in pixels.

        They are a multiple of `together`, the rows that no call may separate.
        """
        rows = self.unet_megapixels * 1024**2 // (width * height)
        return max(1, rows // together) * together


MEMORY_MODES = {
    mode.name: mode
    for mode in (
        MemoryMode(
            "high",
            keep_text=True,
            keep_unet=True,
            unet_megapixels=16,
            passes_at_once=8,
            sdxl_gib=10.7,
        ),
        MemoryMode(
            "balanced",
            keep_text=False,
            keep_unet=True,
            unet_megapixels=4,
            passes_at_once=2,
            sdxl_gib=6.7,
        ),
        MemoryMode(
            "low",
            keep_text=False,
            keep_unet=False,
            unet_megapixels=0,
            passes_at_once=1,
            sdxl_gib=5.0,
        ),
    )
}
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, MPS
    "allocate memory",  # torch on Linux's CPU, and ENOMEM
    "not enough memory",  # torch on Windows' CPU
    "paging file is too small",  # Windows
    "alloc_failed",  # cuBLAS, cuDNN
)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def modes_down_from(mode: MemoryMode) -> list[MemoryMode]:
    """Return a memory mode and the smaller ones, down to "low"."""
    modes = list(MEMORY_MODES.values())
    return modes[modes.index(mode) :]


def choose_device(name: str) -> torch.device:
    """Choose the device.

    Args:
        name: "auto" for CUDA, else MPS, else the CPU. Or the name of a device in torch.

    Raises:
        SetupFailed: The named device is unknown or not available.
    """
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SetupFailed(
            f'unknown device "{name}".', hint='Use "auto", "cuda", "cuda:0", "mps" or "cpu".'
        ) from None
    available = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
    }
    if not available.get(device.type, False):
        raise SetupFailed(
            f'device "{name}" is not available to torch {torch.__version__}.',
            hint=CommandHint("Use --device cpu. To see what is missing, run:", "doctor"),
        )
    return device


def choose_precision(device: torch.device, dtype: str) -> Precision:
    """Choose the number formats and the memory format for a device.

    The VAE overflows in float16. So it runs in bfloat16 if the GPU supports it, else in float32.
    "fp32" also switches off TF32 rounding in convolutions, for the whole process.

    Args:
        device: Where the stages run.
        dtype: "auto", "fp16", "bf16" or "fp32", for UNet and decoder.
    """
    if dtype == "fp32":
        torch.backends.cudnn.allow_tf32 = False
    on_gpu = device.type != "cpu"
    main = _DTYPES[dtype] if dtype != "auto" else (torch.float16 if on_gpu else torch.float32)
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    vae = torch.bfloat16 if has_bf16 and main != torch.float32 else torch.float32
    # on the CPU convolutions are faster with channels last, and a GPU is not yet measured
    memory_format = torch.contiguous_format if on_gpu else torch.channels_last
    return Precision(main, vae, main, memory_format)


def choose_memory_mode(device: torch.device, name: str) -> MemoryMode:
    """Choose the memory mode.

    Args:
        device: Where the stages run.
        name: A key of `MEMORY_MODES`. Or "auto": the first mode in which a GPU holds SDXL with
            `MARGIN_GIB`, else "low". Other devices have "high".
    """
    if name != "auto":
        return MEMORY_MODES[name]
    if device.type != "cuda":
        return MEMORY_MODES["high"]
    available = _total_gib(device) - MARGIN_GIB
    fitting = (mode for mode in MEMORY_MODES.values() if mode.sdxl_gib <= available)
    return next(fitting, MEMORY_MODES["low"])


def choose_batch_pixels(device: torch.device, mode: MemoryMode) -> int:
    """Choose how many pixels to render together at most.

    This is what the GPU's memory holds beside the weights of SDXL and the margin, and at most
    `MAX_BATCH_MEGAPIXELS`.

    Returns:
        0 for the smaller memory modes and other devices: each request is rendered alone.
    """
    if device.type != "cuda" or mode.name != "high":
        return 0
    megapixels = (_total_gib(device) - SDXL_GIB - MARGIN_GIB) / SAMPLING_GIB
    return int(min(max(megapixels, 0), MAX_BATCH_MEGAPIXELS) * 1024**2)


def _total_gib(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory / GIB


def describe(
    device: torch.device, precision: Precision, mode: MemoryMode, *, requested: tuple[str, str]
) -> str:
    """Describe the device, number format and memory mode for the log.

    Args:
        device: Chosen device.
        precision: Chosen number formats.
        mode: Chosen memory mode.
        requested: Settings of device and memory mode. "auto" adds the reason of the choice.
    """
    hardware = str(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware = f"{properties.name} ({properties.total_memory / GIB:.1f} GiB)"
    elif device.type == "cpu" and requested[0] == "auto":
        hardware = "cpu (torch sees no GPU)"
    reason = " (by its memory)" if requested[1] == "auto" and device.type == "cuda" else ""
    return (
        f"{hardware}, {str(precision.unet).removeprefix('torch.')}, "
        f'memory mode "{mode.name}"{reason}'
    )


def free_memory(device: torch.device) -> None:
    """Release unused memory of torch's allocator."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an error of torch or the system means "out of memory"."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(
        phrase in str(error).lower() for phrase in _OUT_OF_MEMORY
    )


def move(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device, unless it is there.

    `nn.Module.to` takes milliseconds even if nothing moves.
    """
    if any(weight.device.type != device.type for weight in module.parameters()):
        module.to(device)


@dataclass
class Residency:
    """Placement of modules on the device while a stage runs."""

    device: torch.device
    mode: MemoryMode

    @contextmanager
    def of(self, *modules: nn.Module, keep: bool = True) -> Generator[None]:
        """Move modules to the device for a block.

        Args:
            modules: Modules to move.
            keep: Leave them there after the block. Else they move to the CPU.
        """
        for module in modules:
            move(module, self.device)
        try:
            yield
        finally:
            if modules and not keep and self.device.type != "cpu":
                for module in modules:
                    move(module, torch.device("cpu"))
                free_memory(self.device)
