"""Which slots have to live: those that something that lives reads as more than a constant."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fscreen.slimming.readers import DenseReader, NormReader
from lightning_fscreen.slimming.slots import PINNED, SlotGraph

# A carrier much weaker than what it carries would need huge weights, and lose digits in float32.
_WEAK = 0.1


def live_slots(slots: SlotGraph, foldable: set[str]) -> tuple[Tensor, Tensor]:
    """Least set of slots that has to stay for the network to compute the same function.

    A slot lives if it is pinned, or if a living output of some layer reads it, unless it is a known constant that can
    be carried into that layer's bias. Where zero padding meets a constant no bias is exact; there one constant input
    stays, and carries all the others. No dimension is emptied: where nothing lives, one slot is kept for the shape
    alone.

    Args:
        slots: what the walk over the graph found.
        foldable: names of the weights whose layer can take constants into its bias.

    Returns:
        live, kept: (number of slots,) bool; `kept` has those kept for the shape in addition.
    """
    root = slots.components()
    live = torch.zeros(len(root), dtype=torch.bool)  # by representative
    live[root[PINNED]] = True
    while True:
        _spread(slots, root, live, foldable)
        if not _keep_one_carrier(slots, root, live):
            break
    return live[root], _keep_shapes(slots, root, live)[root]


def removed_constants(reader: DenseReader, live: Tensor, kept: Tensor) -> tuple[Tensor, int | None]:
    """Inputs of a layer that go and whose constant it has to carry, (in,) bool, and the input that carries them.

    The carrier is None where the bias takes the constants.
    """
    constants = reader.known & (reader.constant != 0)
    rows = reader.reads((live if reader.padded else kept)[reader.outputs])
    gone = constants & rows & ~kept[reader.inputs]
    if not reader.padded or not bool(gone.any()):
        return gone, None
    return gone, int(torch.where(constants & live[reader.inputs], reader.constant.abs(), -1.0).argmax())


def _spread(slots: SlotGraph, root: Tensor, live: Tensor, foldable: set[str]) -> None:
    """Backward from what lives to what it reads, to the fixed point."""
    changed = True
    while changed:
        changed = False
        for reader in reversed(slots.readers):
            rows = live[root[reader.outputs]]
            if not bool(rows.any()):
                continue
            needed = root[reader.inputs[reader.reads(rows) & ~reader.spared(foldable)]]
            if not bool(live[needed].all()):
                live[needed] = True
                changed = True


def _keep_one_carrier(slots: SlotGraph, root: Tensor, live: Tensor) -> bool:
    """Let a constant live where a padded layer needs one to carry the others; whether there was such a layer."""
    for reader in reversed(slots.readers):
        if not isinstance(reader, DenseReader) or not reader.padded:
            continue
        constants = reader.known & (reader.constant != 0)
        if not bool(constants.any()):
            continue
        rows = reader.reads(live[root[reader.outputs]])
        alive = live[root[reader.inputs]]
        strength = reader.constant.abs()
        gone = torch.where(constants & rows & ~alive, strength, 0.0)
        if float(gone.max()) * _WEAK > float(torch.where(constants & alive, strength, 0.0).max()):
            live[root[reader.inputs[gone.argmax()]]] = True
            return True
    return False


def _keep_shapes(slots: SlotGraph, root: Tensor, live: Tensor) -> Tensor:
    """What lives, and what no dimension and no batch norm could do without."""
    kept = live.clone()
    while True:
        before = int(kept.sum())
        for labels in slots.dims.values():
            if not bool(kept[root[labels]].any()):
                kept[root[labels[0]]] = True
        for reader in slots.readers:
            if isinstance(reader, NormReader):
                kept[root[reader.inputs[kept[root[reader.outputs]]]]] = True
        if int(kept.sum()) == before:
            return kept
