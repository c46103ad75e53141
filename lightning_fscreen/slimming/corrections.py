"""What takes over where a mean over channels has lost some that are always zero: eps and gain of its layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_fscreen.slimming.attributes import Attributes
from lightning_fscreen.slimming.double import default_eps
from lightning_fscreen.slimming.slots import SlotGraph


def corrections(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], slots: SlotGraph, kept: Tensor
) -> tuple[dict[str, Tensor], Attributes]:
    """With n channels left of D: eps · D/n, and gain · (D/n)^power. See `Average`.

    Args:
        modules: the network's modules.
        tensors: its parameters and buffers.
        slots: its slots.
        kept: (number of slots,) bool.

    Returns:
        Gains by name, in float64 and not yet cut; attributes, before and after.
    """
    gains: dict[str, Tensor] = {}
    attributes: Attributes = {}
    for average in slots.averages:
        before, left = len(average.labels), int(kept[average.labels].sum())
        if left == before:
            continue
        gain = tensors[average.gain].detach()
        gains[average.gain] = gain.double() * (before / left) ** average.power
        own: Any = modules[average.module]
        eps = getattr(own, average.eps)
        new = (default_eps(gain.dtype) if eps is None else eps) * before / left
        values = attributes.setdefault(average.module, {})
        values[average.eps] = (eps, new)
        if average.size is not None:
            values[average.size] = ((before,), (left,))
    return gains, attributes
