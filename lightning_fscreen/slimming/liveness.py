"""Which slots have to live: those that something that lives reads as more than a constant."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fscreen.slimming.slots import PINNED, Reader, SlotGraph


def live_slots(slots: SlotGraph, foldable: set[str]) -> Tensor:
    """Least set of slots that has to stay for the network to compute the same function.

    A slot lives if it is pinned, or if a living output of some layer multiplies it by a weight that is not zero, unless
    it is a known constant that can be carried into that layer's bias. Where zero padding meets a constant no bias is
    exact; there one constant input stays, and carries all the others. No dimension is emptied.

    Args:
        slots: what the walk over the graph found.
        foldable: names of the weights whose layer can take constants into its bias.

    Returns:
        (number of slots,) bool.
    """
    root = slots.components()
    live = torch.zeros(len(root), dtype=torch.bool)  # by representative
    live[root[PINNED]] = True
    while True:
        _spread(slots, root, live, foldable)
        if not _keep_one_carrier(slots, root, live, foldable) and not _keep_one_each(slots, root, live):
            return live[root]


def removed_constants(reader: Reader, live: Tensor, foldable: bool) -> tuple[Tensor, Tensor | None]:
    """Inputs of a layer that go and whose constant it has to carry, (in,) bool, and the input that carries them.

    The carrier is None where the bias takes the constants.
    """
    rows = reader.nonzero[live[reader.outputs]].any(0)
    constants = reader.known & (reader.constant != 0) & rows
    gone = constants & ~live[reader.inputs]
    if not (reader.padded or not foldable) or not bool(gone.any()):
        return gone, None
    staying = reader.known & (reader.constant != 0) & live[reader.inputs]
    return gone, torch.where(staying, reader.constant.abs(), -1.0).argmax()


def _spread(slots: SlotGraph, root: Tensor, live: Tensor, foldable: set[str]) -> None:
    """Backward from what lives to what it reads, to the fixed point."""
    changed = True
    while changed:
        changed = False
        for reader in reversed(slots.readers):
            rows = reader.nonzero[live[root[reader.outputs]]].any(0)
            silent = reader.known & (reader.constant == 0)
            carried = reader.known if reader.weight in foldable or reader.padded else silent
            needed = root[reader.inputs[rows & ~carried]]
            if not bool(live[needed].all()):
                live[needed] = True
                changed = True


def _keep_one_carrier(slots: SlotGraph, root: Tensor, live: Tensor, foldable: set[str]) -> bool:
    for reader in reversed(slots.readers):
        if not reader.padded:
            continue
        rows = reader.nonzero[live[root[reader.outputs]]].any(0)
        constants = reader.known & (reader.constant != 0)
        alive = live[root[reader.inputs]]
        if bool((constants & rows & ~alive).any()) and not bool((constants & alive).any()):
            strongest = torch.where(constants, reader.constant.abs(), -1.0).argmax()
            live[root[reader.inputs[strongest]]] = True
            return True
    return False


def _keep_one_each(slots: SlotGraph, root: Tensor, live: Tensor) -> bool:
    for labels in slots.dims.values():
        if not bool(live[root[labels]].any()):
            live[root[labels[0]]] = True
            return True
    return False
