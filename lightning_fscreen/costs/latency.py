"""How long a network takes, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from lightning_fscreen.modules import evaluating, with_instances

BATCH_SIZES = (1, 64)
_BLOCK = 0.02  # seconds of calls that are timed together: many clock ticks
_BLOCKS = (3, 10)
_SECONDS = 0.3


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is none.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises depends on the device
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(name)!r} is not there; name one that is, or none: {reason}") from error
    return device


def measure_latency(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict[int, float]:
    """Median time of a forward pass in eval mode, by batch size, with as many threads as torch uses now.

    Args:
        network: the network, on any device.
        args: example inputs, of one instance or more.
        kwargs: likewise, those given by name.
        batch_sizes: how many at once.

    Returns:
        batch size → milliseconds.
    """
    device, threads = next(network.parameters()).device, torch.get_num_threads()
    times = {}
    with evaluating(network), torch.inference_mode():
        for batch_size in batch_sizes:
            given, named = with_instances((args, dict(kwargs or {})), batch_size, device)
            names = {"network": network, "args": given, "kwargs": named}
            timer = Timer("network(*args, **kwargs)", globals=names, num_threads=threads)
            times[batch_size] = 1000 * median_time(timer, _BLOCK, _BLOCKS, _SECONDS)
    return times


def median_time(timer: Timer, block: float, blocks: tuple[int, int], seconds: float) -> float:
    """Median seconds of a call.

    Args:
        timer: of the call.
        block: seconds of calls that are timed together.
        blocks: at least, at most; between them what fits into the time below.
        seconds: of all blocks.
    """
    # Not blocked_autorange: where a call takes microseconds it spends seconds on finding the size of a block.
    once = timer.timeit(1).mean
    calls, (least, most) = max(1, int(block / once)), blocks
    number = min(most, max(least, int(seconds / (calls * once))))
    return median(timer.timeit(calls).mean for _ in range(number))
