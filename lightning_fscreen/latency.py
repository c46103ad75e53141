"""How long a network takes, measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.benchmark import Timer

from lightning_fscreen.slimming.capture import evaluating

BATCH_SIZES = (1, 64)
_SECONDS = 0.3  # of measuring each, at least


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
            times[batch_size] = 1000 * timer.blocked_autorange(min_run_time=_SECONDS).median
    return times
