"""Depthwise convolutions in float64 on CPUs, without torch's loop over channels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

Sizes = int | Sequence[int]


def is_slow(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> bool:
    """Whether torch goes from channel to channel, and `depthwise_conv` does not."""
    depthwise = input.ndim == weight.ndim and groups == len(weight) == input.shape[1] > 1
    return depthwise and input.device.type == "cpu" and not isinstance(padding, str)


def depthwise_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """y[n, c, p] = Σ over offsets o of the kernel of weight[c, 0, o] · x[n, c, stride · p + dilation · o], plus a bias.

    For float64 torch has only the general convolution, one channel after the other. Several threads wait for each other
    at every one; where they share their cores with others, that takes minutes. Here they do so at every offset.

    Args:
        input: (N, C, …).
        weight: (C, 1, …).
        bias: (C,).
        stride: one number, or one for every dimension.
        padding: likewise, of zeros.
        dilation: likewise.
        groups: C.
    """
    dims = weight.ndim - 2
    stride, padding, dilation = (_each(sizes, dims) for sizes in (stride, padding, dilation))
    input = F.pad(input, [width for size in reversed(padding) for width in (size, size)])
    reach = [by * (size - 1) + 1 for by, size in zip(dilation, weight.shape[2:], strict=True)]
    places = [(size - own) // by + 1 for size, own, by in zip(input.shape[2:], reach, stride, strict=True)]
    output = input.new_zeros(*input.shape[:2], *places)
    offsets = itertools.product(*(range(size) for size in weight.shape[2:]))
    for offset, factors in zip(offsets, weight.flatten(2).unbind(-1), strict=True):
        steps = zip(offset, dilation, stride, places, strict=True)
        ranges = (slice(at * by, at * by + step * (count - 1) + 1, step) for at, by, step, count in steps)
        window: tuple[Any, ...] = (..., *ranges)
        output.addcmul_(input[window], factors.reshape(-1, *[1] * dims))
    return output if bias is None else output.add_(bias.reshape(-1, *[1] * dims))


def _each(sizes: Sizes, dims: int) -> list[int]:
    """One for every dimension."""
    return [sizes] * dims if isinstance(sizes, int) else list(sizes) * (dims // len(sizes))
