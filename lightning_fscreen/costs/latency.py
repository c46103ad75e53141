"""How long a network takes, measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
from torch import nn
from torch.utils.benchmark import Timer

from lightning_fscreen.modules import evaluating

BATCH_SIZES = (1, 64)
_BLOCK = 0.02  # seconds of calls that are timed together: many clock ticks
_BLOCKS = (3, 10)  # at least, at most; between them what fits into the time below
_SECONDS = 0.3


def measure_latency(
    network: nn.Module, shape: Sequence[int], batch_sizes: Sequence[int] = BATCH_SIZES
) -> dict[int, float]:
    """Median time of a forward pass in eval mode, by batch size, with as many threads as torch uses now.

    Args:
        network: the network, on any device.
        shape: of one input.
        batch_sizes: how many at once.

    Returns:
        batch size → milliseconds.
    """
    tensor = next(network.parameters())
    threads = torch.get_num_threads()
    times = {}
    with evaluating(network), torch.inference_mode():
        for batch_size in batch_sizes:
            inputs = torch.zeros(batch_size, *shape, device=tensor.device, dtype=tensor.dtype)
            timer = Timer("network(inputs)", globals={"network": network, "inputs": inputs}, num_threads=threads)
            times[batch_size] = 1000 * _median_time(timer)
    return times


def _median_time(timer: Timer) -> float:
    # Not blocked_autorange: where a call takes microseconds it spends seconds on finding the size of a block.
    once = timer.timeit(1).mean
    calls = max(1, int(_BLOCK / once))
    least, most = _BLOCKS
    blocks = min(most, max(least, int(_SECONDS / (calls * once))))
    return median(timer.timeit(calls).mean for _ in range(blocks))
