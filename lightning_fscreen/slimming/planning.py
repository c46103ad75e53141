"""From slots to a plan: which indices stay in every tensor, and which weights take over the constants that go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_fscreen.slimming.capture import Capture, named_tensors
from lightning_fscreen.slimming.interpreter import Off, Walk
from lightning_fscreen.slimming.layers import HANDLERS as LAYERS
from lightning_fscreen.slimming.liveness import live_slots, removed_constants
from lightning_fscreen.slimming.operators import HANDLERS as OPERATORS
from lightning_fscreen.slimming.plan import SlimmingPlan, join, parameters_by_name
from lightning_fscreen.slimming.readers import DenseReader
from lightning_fscreen.slimming.select import selected
from lightning_fscreen.slimming.slots import SlotGraph


def find_slots(
    network: nn.Module, captured: Capture, off: Mapping[str, Off] | None = None, literal: bool = False
) -> SlotGraph:
    """Walk over a captured network; see `Walk`."""
    return Walk(network, captured, {**OPERATORS, **LAYERS}, off, literal).run()


@dataclass(frozen=True)
class Change:
    """A plan, and what it puts in place.

    Attributes:
        plan: what stays of every tensor.
        tensors: the cut tensors and the new ones; in float64 where they are floating.
    """

    plan: SlimmingPlan
    tensors: dict[str, Tensor] = field(repr=False)


def make_change(network: nn.Module, slots: SlotGraph) -> Change:
    """The plan that removes all dead slots."""
    tensors = named_tensors(network)
    foldable = _foldable(network, slots)
    live, kept = live_slots(slots, foldable)
    cuts: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, dim), labels in slots.dims.items():
        if not bool(kept[labels].all()):
            cuts.setdefault(name, {})[dim] = tuple(kept[labels].nonzero().flatten().tolist())
    folded: dict[str, Tensor] = {}
    biases = []
    removed: dict[str, int] = {}
    for reader in slots.readers:
        if not isinstance(reader, DenseReader):
            continue
        if reader.module is not None and (count := int((~kept[reader.outputs]).sum())):
            removed[reader.module] = count
        gone, carrier = removed_constants(reader, live, kept)
        if not bool(gone.any()):
            continue
        weight = tensors[reader.weight].detach()
        columns = gone.nonzero().flatten().to(weight.device)
        constants = reader.constant.to(weight.device, torch.float64)
        taken = weight.index_select(reader.input_dim, columns).double().movedim(reader.input_dim, -1)
        lost = taken @ constants[columns]
        if carrier is not None:
            carrying = weight.to(torch.float64, copy=True)
            carrying.select(reader.input_dim, carrier).add_(lost / constants[carrier])
            folded[reader.weight] = carrying
            continue
        assert reader.module is not None  # it is foldable
        addition = lost.flatten(1).sum(1) if lost.ndim > 1 else lost
        if reader.bias is None:  # the new one is not cut by the plan, so it has its final length here
            biases.append(reader.module)
            folded[join(reader.module, "bias")] = addition[kept[reader.outputs].to(weight.device)]
        else:
            folded[reader.bias] = tensors[reader.bias].detach().double() + addition
    groups = {}
    for name, labels in slots.depthwise.items():
        if not bool(kept[labels].all()):
            groups[name] = int(kept[labels].sum())
            removed[name] = len(labels) - groups[name]
    modules = dict(network.named_modules())
    selects = _selects(modules, slots, kept)
    for name in selects:
        removed[name] = int((~kept[slots.gates[name]]).sum())
    shapes = {name: tuple(tensors[name].shape) for name in cuts}
    removed = {name: removed[name] for name in modules if removed.get(name)}  # in the network's order
    plan = SlimmingPlan(shapes, cuts, groups, tuple(biases), selects, dict(slots.pinned), removed)
    new = {name: plan.cut(name, tensor) for name, tensor in folded.items()}
    new |= {name: plan.cut(name, tensors[name].detach()) for name in cuts if name not in folded}
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in new.items()}
    return Change(plan, exact)


def _selects(modules: Mapping[str, nn.Module], slots: SlotGraph, kept: Tensor) -> dict[str, tuple[int, ...]]:
    """Channels that batch norms select of what is left of their streams; none where they read all."""
    selects = {}
    for name, stream in slots.streams.items():
        present = kept[stream.labels]
        places = present.cumsum(0) - 1
        indices = places[stream.indices[kept[slots.gates[name]]]].tolist()
        present_select = selected(modules[name])
        now = list(range(int(present.sum()))) if present_select is None else present_select.tolist()
        if indices != now:
            selects[name] = tuple(indices)
    return selects


def _foldable(network: nn.Module, slots: SlotGraph) -> set[str]:
    """Weights of the layers that can take constants into their bias, which nobody else must use.

    In weights that are read more than once, constants cannot be carried at all: they meet different ones in each call.
    Nor can those that training changes where padding meets them: what carries them would learn for all of them.
    """
    readers = [reader for reader in slots.readers if isinstance(reader, DenseReader)]
    weights = Counter(reader.weight for reader in readers)
    biases = Counter(reader.bias for reader in readers)
    places = parameters_by_name(network)

    def has_own_bias(reader: DenseReader) -> bool:
        return reader.bias is None or (biases[reader.bias] == 1 and len(places[reader.bias]) == 1)

    root = slots.components()
    trained = torch.zeros(len(root), dtype=torch.bool)
    if slots.trained:
        trained[root[torch.cat(slots.trained)]] = True
    for reader in readers:
        if weights[reader.weight] > 1:
            reader.known = reader.silent()
        elif reader.padded:
            reader.known = reader.known & (reader.silent() | ~trained[root[reader.inputs]])
    return {
        reader.weight
        for reader in readers
        if reader.module is not None and not reader.padded and weights[reader.weight] == 1 and has_own_bias(reader)
    }
