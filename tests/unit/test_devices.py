"""What the log says about the device."""

from __future__ import annotations

import torch

from alphalayer.engine.devices import MEMORY_MODES, choose_precision, describe


def test_the_device_is_described_with_what_was_chosen_for_the_user():
    cpu = torch.device("cpu")
    precision = choose_precision(cpu, "auto")
    unasked = describe(cpu, precision, MEMORY_MODES["high"], asked=("auto", "auto"))
    assert unasked == 'cpu (torch sees no GPU), float32, memory mode "high"'
    assert describe(cpu, precision, MEMORY_MODES["high"], asked=("cpu", "high")) == 'cpu, float32, memory mode "high"'
