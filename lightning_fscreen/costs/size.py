"""The size of a network: parameters and multiply–accumulate operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_fscreen.modules import evaluating


@dataclass(frozen=True)
class Size:
    """Size of a network.

    Attributes:
        params: number of parameter values.
        nonzero: those that are not zero.
        macs: multiply–accumulate operations of one instance, as dense layers compute them; None if no input was seen.
    """

    params: int
    nonzero: int
    macs: int | None


def add_sizes(sizes: Sequence[Size]) -> Size:
    """Size of several networks together; operations are known if all of theirs are."""
    macs = [size.macs for size in sizes if size.macs is not None]
    total = sum(macs) if len(macs) == len(sizes) else None
    return Size(sum(size.params for size in sizes), sum(size.nonzero for size in sizes), total)


def measure_size(network: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None, instances: int) -> Size:
    """Size of a network now.

    Args:
        network: the network.
        inputs: arguments and keyword arguments of its forward, to count operations with; None to leave them out.
        instances: number of instances in `inputs`.
    """
    parameters = list(network.parameters())
    macs = None
    if inputs is not None:
        with evaluating(network), torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(*inputs[0], **inputs[1])
        macs = round(counter.get_total_flops() / 2 / instances)
    return Size(sum(p.numel() for p in parameters), sum(int((p != 0).sum()) for p in parameters), macs)
