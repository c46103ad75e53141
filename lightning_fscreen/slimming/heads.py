"""Gates whose units are the heads of an attention, switched off by the columns of the layer that projects them.

Heads go as a whole. Channels within them would have to go in equal numbers from every head of a layer, with the scale
of the scores kept, and leave sizes that attention kernels are not made for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fscreen.modules import is_transposed_linear, own_tensors
from lightning_fscreen.slimming.kinds import Kind, register_kind
from lightning_fscreen.slimming.readers import DenseReader, NormReader
from lightning_fscreen.slimming.sizes import repeated
from lightning_fscreen.slimming.slots import Heads, SlotGraph


@register_kind
class HeadColumns(Kind):
    """Heads; the layer of such a gate is the one that projects them, so that no module is a gate by itself."""

    name = "head"
    layers = "attention layers"
    gate = "weight"

    def is_gate(self, module: nn.Module) -> bool:
        """Only the graph shows heads."""
        return False

    def units(self, module: nn.Module) -> int:
        """Only the graph shows how many there are."""
        raise NotImplementedError

    def fixed_reasons(self, modules: Mapping[str, Any]) -> dict[str, str]:
        """None: a projection that has no weight of its own, or a frozen one, can still lose columns."""
        return {}

    def shift(self, module: nn.Module) -> None:
        """None: what belongs to the projection's own outputs."""

    def dim(self, module: nn.Module) -> int:
        """Columns; those of transposed layers stand in the first dimension."""
        return 0 if is_transposed_linear(module) else 1

    def entries(self, module: nn.Module, units: Tensor) -> Tensor:
        """The columns that read the units: as many for each of them, in their order."""
        weight = own_tensors(module)[0]
        assert weight is not None
        columns = units.repeat_interleave(weight.shape[self.dim(module)] // len(units))
        return columns.view([-1 if dim == self.dim(module) else 1 for dim in range(weight.ndim)]).expand(weight.shape)


def find_heads(slots: SlotGraph, layers: Mapping[str, nn.Module]) -> dict[str, Heads]:
    """The heads of a network: name of the gate → what it switches off.

    A gate has the name of the module that combines the heads, if that is one, and not of another gate; else that of the
    projection, followed by ".heads". Where the projection reads heads in turns (a channel of each, the next channel of
    each, …), every one of its columns counts as a unit, and those of a head share their fate.

    Args:
        slots: of the network.
        layers: its modules by name.
    """
    if not slots.attended:
        return {}
    _couple_norms(slots)
    root = slots.components(pinned=False)
    found: dict[str, tuple[str, Tensor]] = {}  # projection → the module that combines its heads, and these
    for place, reader in enumerate(slots.readers):
        if not isinstance(reader, DenseReader) or reader.module is None or reader.module in found:
            continue
        inputs = root[reader.inputs]
        for module, labels, before in slots.attended:
            units = _read_by(inputs, repeated(labels), root) if place >= before else None
            if units is not None:
                found[reader.module] = module, units
                break
    modules = Counter(module for module, _ in found.values())
    named = {}
    for projection, (module, heads) in found.items():
        own = modules[module] == 1 and module and not isinstance(layers[module], nn.Linear)
        named[module if own else f"{projection}.heads"] = Heads(projection, heads)
    return named


def _read_by(inputs: Tensor, heads: Tensor, root: Tensor) -> Tensor | None:
    """The units of a layer that reads heads, by whose columns these are switched off; None if it reads something else.

    Args:
        inputs: what it reads, by representatives.
        heads: their slots.
        root: representatives of all slots.
    """
    size, rest = divmod(len(inputs), len(heads))
    if not rest and torch.equal(root[heads].repeat_interleave(size), inputs):
        return heads
    in_turns = heads.repeat(size)
    return in_turns if not rest and torch.equal(root[in_turns], inputs) else None


def _couple_norms(slots: SlotGraph) -> None:
    """Batch norms between heads and the layer that reads them go with the heads."""
    root = slots.components(pinned=False)
    heads = root[torch.cat([labels for _, labels, _ in slots.attended])]
    for reader in slots.readers:
        if isinstance(reader, NormReader) and bool(torch.isin(root[reader.inputs], heads).all()):
            slots.unify(reader.outputs, reader.inputs)
            slots.streams.pop(reader.layer, None)


def mute(slots: SlotGraph, off: Mapping[str, Tensor]) -> None:
    """Switch off heads: what their columns read is not read.

    Args:
        slots: changed in place.
        off: gate of heads → (heads,) bool, True where switched off.
    """
    projections = {slots.heads[name].projection: (slots.heads[name].labels, pruned) for name, pruned in off.items()}
    for name in off:
        slots.gates[name] = slots.heads[name].labels
    for place, reader in enumerate(slots.readers):
        if isinstance(reader, DenseReader) and reader.module in projections:
            labels, pruned = projections[reader.module]
            size = len(reader.inputs) // len(pruned)
            muted, switches = pruned.repeat_interleave(size), labels.repeat_interleave(size)
            slots.readers[place] = replace(reader, muted=muted, switches=switches)
