"""Products of float32 matrices with all digits, where a device or the user would have them rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Products of float32 matrices are float32, whatever autocast and torch's switches say.

    Args:
        device_type: where the matrices are.
    """
    with torch.autocast(device_type, enabled=False), without_tf32(layers=False):
        yield


@contextlib.contextmanager
def without_tf32(layers: bool = True) -> Iterator[None]:
    """float32 products with all digits, where the device would round them to TF32 or bfloat16; put back as it was.

    torch has an older and a newer set of switches, which raise or warn if one is read after the other was set.

    Args:
        layers: whether those inside convolutions and recurrent layers, too.
    """
    backends = torch.backends
    if not hasattr(backends.cudnn, "conv"):  # torch before 2.9
        matmul, cudnn = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = cudnn and not layers
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            backends.cudnn.allow_tf32 = cudnn
        return
    on_cpu: Any = backends.mkldnn  # whose types lack what it has
    switches = [backends.cuda.matmul, on_cpu.matmul]
    if layers:
        switches += [backends.cudnn.conv, backends.cudnn.rnn, on_cpu.conv, on_cpu.rnn]
    # Where nothing rounds, nothing is set: a value that is put back no longer follows the switch for all operators.
    rounding = [(switch, value) for switch in switches if (value := switch.fp32_precision) not in ("none", "ieee")]
    for switch, _ in rounding:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, value in rounding:
            switch.fp32_precision = value
