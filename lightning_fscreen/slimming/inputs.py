"""Gates whose units are the inputs of a layer that reads a stream as it is, beside batch norms that select from it.

A channel of a residual stream can go when nobody reads it. Batch norms leave it to others by themselves; where the
block is narrowed or widened, a convolution reads the whole stream, and does not when its columns are switched off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fscreen.slimming.heads import HeadColumns
from lightning_fscreen.slimming.kinds import register_kind
from lightning_fscreen.slimming.readers import DenseReader, NormReader
from lightning_fscreen.slimming.slots import PINNED, Heads, SlotGraph


@register_kind
class InputColumns(HeadColumns):
    """Inputs, switched off one by one like heads; the layer of such a gate is the one that reads them."""

    name = "input"
    layers = "layers that read a stream beside batch norms"
    alone = False


def find_inputs(slots: SlotGraph) -> dict[str, Heads]:
    """The gates of inputs: name, that of the layer and ".inputs" → what it switches off, with slots of its own.

    Args:
        slots: of the network; gets these slots.
    """
    root = slots.components()
    selected = _marked(slots, root, [reader.inputs for reader in slots.readers if _selects(reader, root)])
    found = {}
    for reader in slots.readers:
        if isinstance(reader, DenseReader) and reader.module is not None and bool(selected[root[reader.inputs]].all()):
            found[f"{reader.module}.inputs"] = Heads(reader.module, slots.new(len(reader.inputs)), "input")
    return found


def _selects(reader: object, root: Tensor) -> bool:
    return isinstance(reader, NormReader) and not torch.equal(root[reader.inputs], root[reader.outputs])


def _marked(slots: SlotGraph, root: Tensor, labels: list[Tensor]) -> Tensor:
    """(slots,) bool: those of some classes, but for what has to stay, or what a gate switches off."""
    marked = torch.zeros(slots.count, dtype=torch.bool)
    for own in labels:
        marked[root[own]] = True
    for others in (torch.tensor([PINNED]), *slots.gates.values()):
        marked[root[others]] = False
    return marked
