"""How long a network takes, measured."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import timer

from lightning_fscreen.modules import evaluating, with_instances

BATCH_SIZES = (1, 64)
_BLOCK = 0.02  # seconds of calls that are timed together: many clock ticks
_BLOCKS = (3, 10)
_SECONDS = 0.3
_TURNS = (7, 15)


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
    times = {}
    for batch_size in batch_sizes:
        with _calls([network], args, kwargs, batch_size) as calls:
            times[batch_size] = 1000 * median(block_times(calls, _BLOCK, _BLOCKS, _SECONDS)[0])
    return times


def compare_latency(
    networks: Sequence[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, batch_size: int
) -> list[float]:
    """Shortest time of a forward pass of each of some networks, in milliseconds; see `measure_latency`.

    They are measured in turns: what disturbs a machine makes them slower, but all of them.
    """
    with _calls(networks, args, kwargs, batch_size) as calls:
        return [1000 * min(own) for own in block_times(calls, _BLOCK, _TURNS, _SECONDS)]


@contextlib.contextmanager
def _calls(
    networks: Sequence[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, batch_size: int
) -> Iterator[list[Callable[[], object]]]:
    """Forward passes of networks on the same device, in eval mode inside."""
    device = next(networks[0].parameters()).device
    given, named = with_instances((args, dict(kwargs or {})), batch_size, device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for network in networks:
            stack.enter_context(evaluating(network))
        yield [functools.partial(network, *given, **named) for network in networks]


def block_times(
    calls: Sequence[Callable[[], object]], block: float, blocks: tuple[int, int], seconds: float
) -> list[tuple[float, ...]]:
    """Seconds of calls that take turns: by call, the mean of each block of them.

    Args:
        calls: what is timed.
        block: seconds of a block.
        blocks: of each call at least, at most; between them what fits into the time below.
        seconds: of all blocks of a call.
    """
    for call in calls:
        _seconds(call, 1)  # the first one takes longer
    once = [_seconds(call, 1) for call in calls]
    numbers, (least, most) = [max(1, int(block / time)) for time in once], blocks
    turns = min(most, max(least, int(seconds * len(calls) / sum(map(operator.mul, numbers, once)))))
    rounds = [[_seconds(call, number) for call, number in zip(calls, numbers, strict=True)] for _ in range(turns)]
    return list(zip(*rounds, strict=True))


def _seconds(call: Callable[[], object], number: int) -> float:
    """Mean time of so many calls, until the device has done them."""
    start = timer()
    for _ in range(number):
        call()
    return max(timer() - start, 1e-9) / number
