"""Find the slots whose values still influence an output of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_fscreen.slimming.multiples import Multiples
from lightning_fscreen.slimming.readers import DenseReader, NormReader, Reader
from lightning_fscreen.slimming.slots import PINNED, SlotGraph

# A carrier much weaker than the constants that it carries would need huge weights, and lose digits in float32.
_WEAK = 0.1


def live_slots(
    slots: SlotGraph, readers: Sequence[Reader], multiples: Multiples | None = None
) -> tuple[Tensor, Tensor]:
    """Least set of slots that has to stay for the network to compute the same function.

    A slot lives if it is pinned, or if a living output of some layer reads it, unless it is a known constant that can
    be carried into that layer's bias. Where zero padding meets a constant no bias is exact; there one constant input
    stays, and carries all the others. No dimension is emptied: where nothing lives, one slot is kept for the shape
    alone; so are those that make widths multiples.

    Args:
        slots: the slots, from the walk over the graph.
        readers: in the order of the graph; they know only the constants that can be carried (see `carriable`).
        multiples: blocks of slots, by their representatives; None if widths need not be multiples.

    Returns:
        live, kept: (number of slots,) bool; `kept` has those kept for the shape in addition.
    """
    root = slots.components()
    live = torch.zeros(len(root), dtype=torch.bool)  # by representative
    live[root[PINNED]] = True
    _spread(readers, root, live)
    _keep_carriers(readers, root, live)
    return live[root], _keep_shapes(slots, readers, root, live, multiples)[root]


def removed_constants(reader: DenseReader, live: Tensor, kept: Tensor) -> tuple[Tensor, int | None]:
    """Inputs of a layer that go and whose constant it has to carry, (in,) bool, and the input that carries them.

    The carrier is None where the bias takes the constants.
    """
    constants = reader.known & (reader.constant != 0)
    rows = reader.reads((kept if reader.foldable else live)[reader.outputs])  # others' values are for the shape alone
    gone = constants & rows & ~kept[reader.inputs]
    if not reader.padded or not bool(gone.any()):
        return gone, None
    return gone, int(torch.where(constants & live[reader.inputs], reader.constant.abs(), -1.0).argmax())


def _spread(readers: Sequence[Reader], root: Tensor, live: Tensor) -> None:
    """From living outputs backward to the inputs that they depend on, to the fixed point."""
    changed = True
    while changed:
        changed = False
        for reader in reversed(readers):
            rows = live[root[reader.outputs]]
            if not bool(rows.any()):
                continue
            needed = root[reader.inputs[reader.reads(rows) & ~reader.spared()]]
            if not bool(live[needed].all()):
                live[needed] = True
                changed = True


def _spread_from(
    slot: int, writers: Mapping[int, Sequence[int]], readers: Sequence[Reader], root: Tensor, live: Tensor
) -> None:
    """The same from one slot that lives from now on; `writers`: slot → the readers whose output it is."""
    waiting = [slot]
    while waiting:
        for index in writers.get(waiting.pop(), ()):
            reader = readers[index]
            needed = root[reader.inputs[reader.reads(live[root[reader.outputs]]) & ~reader.spared()]]
            fresh = needed[~live[needed]].unique()
            live[fresh] = True
            waiting += fresh.tolist()


def _keep_carriers(readers: Sequence[Reader], root: Tensor, live: Tensor) -> None:
    """Let a constant live wherever a padded layer needs one to carry the others, and what it depends on."""
    padded = [
        reader
        for reader in reversed(readers)
        if isinstance(reader, DenseReader) and reader.padded and bool((reader.known & (reader.constant != 0)).any())
    ]
    writers: dict[int, list[int]] = {}
    for index, reader in enumerate(readers if padded else ()):
        for slot in root[reader.outputs].tolist():
            writers.setdefault(slot, []).append(index)
    changed = True
    while changed:  # once, unless a layer is called again by those that it feeds
        changed = False
        for reader in padded:
            carrier = _missing_carrier(reader, root, live)
            if carrier is not None:
                changed = live[carrier] = True
                _spread_from(carrier, writers, readers, root, live)


def _missing_carrier(reader: DenseReader, root: Tensor, live: Tensor) -> int | None:
    """The input whose constant has to live to carry those that go; None if there is one that does, or none goes."""
    constants = reader.known & (reader.constant != 0)
    rows = reader.reads(live[root[reader.outputs]])
    alive = live[root[reader.inputs]]
    strength = reader.constant.abs()
    gone = torch.where(constants & rows & ~alive, strength, 0.0)
    if float(gone.max()) * _WEAK > float(torch.where(constants & alive, strength, 0.0).max()):
        return int(root[reader.inputs[gone.argmax()]])
    return None


def _keep_shapes(
    slots: SlotGraph, readers: Sequence[Reader], root: Tensor, live: Tensor, multiples: Multiples | None
) -> Tensor:
    """Living slots, one slot of every dimension or a multiple, and the inputs that kept channels normalise."""
    kept = live.clone()
    while True:
        before = int(kept.sum())
        for labels in slots.dims.values():
            if not bool(kept[root[labels]].any()):
                kept[root[labels[0]]] = True
        for reader in readers:
            if isinstance(reader, NormReader):
                kept[root[reader.inputs[kept[root[reader.outputs]] & ~reader.off]]] = True
        kept = kept if multiples is None else multiples.filled(kept)
        if int(kept.sum()) == before:
            return kept
