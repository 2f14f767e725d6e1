"""Construction of a model's VAE from its tensors and its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alphalayer.engine.families.configs import check_counts
from alphalayer.engine.networks.dc_autoencoder import AutoencoderDC
from alphalayer.engine.networks.vae import AutoencoderKL
from alphalayer.engine.networks.weights import build

Vae = AutoencoderKL | AutoencoderDC
CLASSES: Mapping[str, type[Vae]] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderDC": AutoencoderDC,
}
"""Networks by `_class_name` of their config."""


def read_vae(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Vae:
    """Return a VAE for inference on the CPU.

    Args:
        tensors: Its tensors by canonical name, see `vae_names`.
        config: Content of its `config.json` in the layout of diffusers.
        dtype: dtype of the network.
        memory_format: Order of the weights of convolutions in memory.

    Raises:
        ValueError: The class or an entry of the config is not supported. Or the tensors are not
            those of the config.
    """
    kind = str(config.get("_class_name"))
    if kind not in CLASSES:
        raise ValueError(f"its VAE has the class {kind}; supported: {', '.join(CLASSES)}")
    network = CLASSES[kind]
    for name, value in network.FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"its VAE has {name}: {config[name]}; supported: {value}")
    check_counts(config, "norm_num_groups")
    vae = build(lambda: network(config), tensors, dtype, memory_format)
    # with channels last, torch's group norm on the CPU loses digits of flat areas
    for weight in vae.encoder.parameters():
        weight.data = weight.contiguous()
    return vae
