"""Choose the number format of a training step."""

from __future__ import annotations

import torch


def mixed_precision(device_type: str = "cpu") -> torch.autocast:
    """Return a bfloat16 autocast context, turned off on CPUs without bfloat16 instructions.

    Convolutions in bfloat16 are ten times slower than float32 on such CPUs.
    """
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    enabled = device_type != "cpu" or bool(fast)
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled)
