"""Which device, which number formats, and what stays on the device: three small tables and the rules to choose.

Knows nothing of models' contents; the pipeline asks `Residency` to bring a module to the device for as long as it works.
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
SDXL_GIB = 8.2
"""Weights of SDXL with LayerDiffuse's decoder as they are held: UNet, VAE and decoder in 16 bit, text encoders in float32."""


@dataclass(frozen=True)
class Precision:
    """Number formats of the stages. The latent, the schedule and guidance are always float32."""

    unet: torch.dtype
    vae: torch.dtype
    decoder: torch.dtype


@dataclass(frozen=True)
class MemoryMode:
    """What may stay on the device between stages, and how much is worked on at once."""

    name: str
    keep_text: bool
    keep_unet: bool
    unet_megapixels: int
    """Of all rows of one UNet call; a single row may have more."""
    passes_at_once: int
    """Transparent decoder passes in one call, out of 8."""

    def rows_at_once(self, width: int, height: int) -> int:
        """Rows of one UNet call for pictures of that size, at least 1."""
        return max(1, self.unet_megapixels * 1024**2 // (width * height))


MEMORY_MODES = {
    mode.name: mode
    for mode in (
        MemoryMode("high", keep_text=True, keep_unet=True, unet_megapixels=16, passes_at_once=8),
        MemoryMode(
            "balanced", keep_text=False, keep_unet=True, unet_megapixels=4, passes_at_once=2
        ),
        MemoryMode("low", keep_text=False, keep_unet=False, unet_megapixels=0, passes_at_once=1),
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
    """A memory mode and the smaller ones, down to "low"."""
    modes = list(MEMORY_MODES.values())
    return modes[modes.index(mode) :]


def choose_device(name: str) -> torch.device:
    """Resolve "auto" to CUDA, MPS or the CPU, whichever is there; check that a named device exists.

    Raises:
        SetupFailed: the named device is not there.
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
            f'device "{name}" was asked for and torch {torch.__version__} does not see it.',
            hint=CommandHint("Use --device cpu. To see what is missing, run:", "doctor"),
        )
    return device


def choose_precision(device: torch.device, dtype: str) -> Precision:
    """Number formats for a device; `dtype` is "auto", "fp16", "bf16" or "fp32" and rules UNet and decoder.

    The VAE overflows in float16, so it works in bfloat16 where the GPU has it and in float32 elsewhere. Who asks for "fp32" gets it in
    convolutions, too, where GPUs else round to TF32; that holds for the process.
    """
    if dtype == "fp32":
        torch.backends.cudnn.allow_tf32 = False
    on_gpu = device.type != "cpu"
    main = _DTYPES[dtype] if dtype != "auto" else (torch.float16 if on_gpu else torch.float32)
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    vae = torch.bfloat16 if has_bf16 and main != torch.float32 else torch.float32
    return Precision(unet=main, vae=vae, decoder=main)


def choose_memory_mode(device: torch.device, name: str) -> MemoryMode:
    """Resolve "auto" by the device's total memory: 16 GiB and more "high", 10 and more "balanced", less "low"."""
    if name != "auto":
        return MEMORY_MODES[name]
    if device.type != "cuda":
        return MEMORY_MODES["high"]
    total = torch.cuda.get_device_properties(device).total_memory
    return MEMORY_MODES[
        "high" if total >= 15.5 * GIB else "balanced" if total >= 9.5 * GIB else "low"
    ]


def choose_batch_pixels(device: torch.device, mode: MemoryMode) -> int:
    """How many pixels to draw together at most: what an SDXL leaves of the GPU, at about 2.2 GB a megapixel under guidance [computed],
    and at most 8 megapixels. 0 for the smaller memory modes, and on the CPU."""
    if device.type != "cuda" or mode.name != "high":
        return 0
    room = torch.cuda.get_device_properties(device).total_memory - SDXL_GIB * GIB
    return int(min(max(room / 2.2e9, 0), 8) * 1024**2)


def describe(
    device: torch.device, precision: Precision, mode: MemoryMode, *, asked: tuple[str, str]
) -> str:
    """What will be drawn with, in words, and whether it was chosen here; `asked` is what the settings say of device and memory."""
    what = str(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        what = f"{properties.name} ({properties.total_memory / GIB:.1f} GiB)"
    elif device.type == "cpu" and asked[0] == "auto":
        what = "cpu (torch sees no GPU)"
    chosen = " (by its memory)" if asked[1] == "auto" and device.type == "cuda" else ""
    return (
        f'{what}, {str(precision.unet).removeprefix("torch.")}, memory mode "{mode.name}"{chosen}'
    )


def free_memory(device: torch.device) -> None:
    """Give back what the allocator holds and nobody uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error of torch, of a library below it or of the system says."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(
        each in str(error).lower() for each in _OUT_OF_MEMORY
    )


def memory_needed(
    unet_bytes: int, width: int, height: int, mode: MemoryMode, batch_size: int
) -> int:
    """Rough need of the largest stage in bytes: the weights that stay, plus activations that grow with the pixels.

    Activations: about 1.1 GB a UNet row and 1.6 GB a decoder pass at 1024x1024 in 16 bit [computed]. An estimate for
    error messages only; nothing is refused because of it.
    """
    megapixels = width * height / 1024**2
    rows = min(2 * batch_size, mode.rows_at_once(width, height))
    sampling = unet_bytes + 1.1e9 * megapixels * rows
    decoding = (unet_bytes if mode.keep_unet else 0) + 1.6e9 * megapixels * max(
        mode.passes_at_once, 2
    )
    return int(max(sampling, decoding))


@dataclass
class Residency:
    """Brings modules to the device for as long as a stage works, and sends away what the memory mode will not keep."""

    device: torch.device
    mode: MemoryMode

    @contextmanager
    def of(self, *modules: nn.Module, keep: bool = True) -> Generator[None]:
        """Hold `modules` on the device inside the block; afterwards they stay, or go to the CPU if not `keep`."""
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            if modules and not keep and self.device.type != "cpu":
                for module in modules:
                    module.to("cpu")
                free_memory(self.device)
