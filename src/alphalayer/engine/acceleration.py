"""Faster calls of the denoiser on a GPU: CUDA graphs, and kernels of torch.compile.

An eager call of SDXL launches some 1,400 kernels. At batch 1 a GPU waits for the launches. A graph
launches all kernels of a recorded call at once. Neither graphs nor torch.compile have been measured
on a GPU yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from alphalayer.core.errors import SetupFailed
from alphalayer.engine.networks.unet import Prepared

Acceleration = Literal["off", "graphs", "compile"]
Run = Callable[[Tensor, Tensor, Prepared, Tensor | None], Tensor]
"""Call of the denoiser, see `UNet.forward`."""
Replay = Callable[[], object]
Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records a call. Returns a function that repeats it on the same memory, and its output."""

MAX_RECORDINGS = 8
"""Limit of recorded shapes. The least recently used one is dropped."""
WARM_UPS = 3
"""Calls before a recording, in which libraries choose kernels and allocate their workspaces."""


def check_acceleration(kind: Acceleration, device: torch.device) -> None:
    """Raise `SetupFailed` if the device cannot run an acceleration."""
    if kind != "off" and device.type != "cuda":
        raise SetupFailed(
            f'acceleration "{kind}" needs a CUDA GPU, and the device is {device}.',
            hint='Use "off".',
        )


def accelerate(unet: nn.Module, kind: Acceleration) -> Run:
    """Return a faster call of a UNet on a CUDA GPU.

    Args:
        unet: The UNet. Its weights may change in place between calls.
        kind: "graphs" records the eager kernels; results do not change. "compile" records those of
            torch.compile; results change by rounding.
    """
    if kind == "off":
        return unet
    if kind == "compile":
        channels_last(unet)
        return GraphRunner(unet, torch.compile(unet, fullgraph=True, dynamic=False), record_cuda)
    return GraphRunner(unet, unet, record_cuda)


def channels_last(network: nn.Module) -> None:
    """Store the weights of convolutions with their channels last."""
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def record_cuda(call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Record a call on the current CUDA device as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads may use the GPU meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call()
    return graph.replay, output


class GraphRunner:
    """Denoiser whose calls are recorded for each shape and then replayed.

    A replay reads the memory of the recorded call. So inputs are copied there, text only after a
    change. Patches write weights in place, which keeps recordings valid. A denoiser that moved to
    another device, or that shares attention by another file, has other memory. Its recordings are
    dropped. Sharing that is switched off meanwhile keeps them.

    Args:
        unet: The UNet that holds the weights.
        run: Its call.
        record: Records a call.
    """

    def __init__(self, unet: nn.Module, run: Run, record: Record):
        self._unet, self._run, self._record = unet, run, record
        self._recordings: OrderedDict[object, _Recording] = OrderedDict()
        self._weight: Tensor | None = None
        self._sharing: object = None

    def __call__(
        self, x: Tensor, timestep: Tensor, prepared: Prepared, condition: Tensor | None
    ) -> Tensor:
        """Return the output of the UNet, see `UNet.forward`."""
        weight = next(self._unet.parameters()).detach()
        shared = getattr(self._unet, "sharing", None)
        sharing, is_shared = getattr(shared, "spec", None), getattr(shared, "is_on", False)
        is_moved = self._weight is None or weight.data_ptr() != self._weight.data_ptr()
        if is_moved or sharing is not self._sharing:
            self._recordings.clear()
            # kept, so that no other weight gets its address
            self._weight, self._sharing = weight, sharing
        key = x.shape, x.dtype, prepared.keys_values[0].shape, condition is not None, is_shared
        recording = self._recordings.pop(key, None)
        if recording is None:
            while len(self._recordings) >= MAX_RECORDINGS:
                self._recordings.popitem(last=False)
            recording = self._record_call(x, timestep, prepared, condition)
        self._recordings[key] = recording
        return recording.repeat(x, timestep, prepared, condition)

    def forget(self) -> None:
        """Release all recordings and their memory."""
        self._recordings.clear()

    def _record_call(
        self, x: Tensor, timestep: Tensor, prepared: Prepared, condition: Tensor | None
    ) -> _Recording:
        own, time, text = x.clone(), timestep.clone(), prepared.clone()
        added = None if condition is None else condition.clone()
        replay, output = self._record(lambda: self._run(own, time, text, added))
        return _Recording(own, time, text, added, replay, output, prepared)


@dataclass
class _Recording:
    """Recorded call: the memory of its inputs and output, and its replay."""

    x: Tensor
    timestep: Tensor
    text: Prepared
    condition: Tensor | None
    replay: Replay
    output: Tensor
    source: Prepared
    """Source of the values of `text`."""

    def repeat(
        self, x: Tensor, timestep: Tensor, prepared: Prepared, condition: Tensor | None
    ) -> Tensor:
        self.x.copy_(x)
        self.timestep.copy_(timestep)
        if prepared is not self.source:
            self.text.copy_(prepared)
            self.source = prepared
        if self.condition is not None and condition is not None:
            self.condition.copy_(condition)
        self.replay()
        # the next replay writes into the same memory
        return self.output.clone()
