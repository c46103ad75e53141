"""From slots to a plan: which indices stay in every tensor, and which weights take over the constants that go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_fscreen.modules import join, named_tensors, parameters_by_name
from lightning_fscreen.slimming.attributes import Attributes, followed, proposed_attributes
from lightning_fscreen.slimming.corrections import corrections
from lightning_fscreen.slimming.double import Exact, Tensors
from lightning_fscreen.slimming.interpreter import Off
from lightning_fscreen.slimming.leftovers import kept_for
from lightning_fscreen.slimming.liveness import live_slots, removed_constants
from lightning_fscreen.slimming.multiples import find_multiples
from lightning_fscreen.slimming.plan import SlimmingPlan
from lightning_fscreen.slimming.readers import DenseReader, Reader
from lightning_fscreen.slimming.select import selected
from lightning_fscreen.slimming.sizes import proposed_sizes
from lightning_fscreen.slimming.slots import SlotGraph

Numbers = Literal["computed", "attributes", "given", "sizes"]
"""Numbers in forward that count channels: they are computed from shapes, and so follow by themselves; attributes of
modules that have the same value follow, or only those that calls are given; calls that are given sizes get others."""


@dataclass(frozen=True)
class Change:
    """A plan and its new tensors.

    Attributes:
        plan: the indices that stay of every tensor.
        tensors: the cut tensors and the new ones. They are made when they are asked for: all together would take as
            much memory as the smaller network.
        exact: those values of them that carry constants, or factors.
    """

    plan: SlimmingPlan
    tensors: Tensors = field(repr=False)
    exact: Mapping[str, Exact] = field(repr=False)


def make_change(
    network: nn.Module,
    slots: SlotGraph,
    off: Mapping[str, Off] | None = None,
    numbers: Numbers = "computed",
    round_to: int = 1,
    zeros_alone: bool = False,
) -> Change:
    """The plan that removes all dead slots; network and slots stay as they are.

    Args:
        network: the network.
        slots: its slots.
        off: gate → its units that are switched off.
        numbers: what is done about numbers in forward that seem to count channels.
        round_to: widths of layers become multiples of it, or stay; dead slots are kept for that.
        zeros_alone: whether no other constants go, because they depend on the sizes of the inputs.
    """
    tensors, modules = named_tensors(network), dict(network.named_modules())
    readers = carriable(network, slots)
    if zeros_alone:
        readers = [replace(own, known=own.silent()) if isinstance(own, DenseReader) else own for own in readers]
    root = slots.components()
    widths = [root[labels] for labels in slots.widths.values()]
    live, kept = live_slots(slots, readers, find_multiples(widths, slots.count, round_to) if round_to > 1 else None)
    dense = [reader for reader in readers if isinstance(reader, DenseReader)]
    calls = [assumption.call for assumption in slots.assumed.values() if assumption.call is not None]
    cuts = _cuts(slots, kept)
    folds, biases = _folds(tensors, dense, live, kept)
    gains, corrected = corrections(modules, tensors, slots, kept)
    folds |= {name: Exact(gain) for name, gain in gains.items()}
    selects, streams = _selects(modules, slots, kept)
    plan = SlimmingPlan(
        shapes={name: tuple(tensors[name].shape) for name in cuts},
        cuts=cuts,
        groups=_groups(slots, kept),
        biases=biases,
        selects=selects,
        pinned=dict(slots.pinned),
        removed=_removed(modules, slots, dense, selects, kept),
        streams=streams,
        kept_for=kept_for(slots, readers, live, kept, off or {}, zeros_alone),
        attributes=followed(
            proposed_attributes(network, slots.assumed.values(), kept, numbers == "given")
            if numbers in ("attributes", "given")
            else {},
            followed(_counts(slots, kept), corrected),
        ),
        sizes=proposed_sizes(calls, kept) if numbers == "sizes" else {},
    )

    exact = {name: _cut_exact(plan, name, fold) for name, fold in folds.items()}

    def new(name: str) -> Tensor:
        if name not in exact:
            return plan.cut(name, tensors[name].detach())
        if exact[name].dim is None:
            return exact[name].values
        carrying = plan.cut(name, tensors[name].detach())  # its own, since inputs are gone
        exact[name].put(carrying)
        return carrying

    return Change(plan, Tensors({name: partial(new, name) for name in [*exact, *cuts]}), exact)


def carriable(network: nn.Module, slots: SlotGraph) -> list[Reader]:
    """The readers, in which only those inputs are known that can be carried when they go.

    Constants go into the bias of a layer that nobody else uses. They cannot be carried in weights that are read more
    than once, since every call meets other constants. Nor can trainable constants be at zero padding: one carrier's
    update would change them all.
    """
    dense = [reader for reader in slots.readers if isinstance(reader, DenseReader)]
    weights = Counter(reader.weight for reader in dense)
    biases = Counter(reader.bias for reader in dense)
    places = parameters_by_name(network)
    root = slots.components()
    trained = torch.zeros(len(root), dtype=torch.bool)
    if slots.trained:
        trained[root[torch.cat(slots.trained)]] = True

    def restricted(reader: Reader) -> Reader:
        if not isinstance(reader, DenseReader):
            return reader
        if weights[reader.weight] > 1:
            return replace(reader, known=reader.silent())
        if reader.padded:
            return replace(reader, known=reader.known & (reader.silent() | ~trained[root[reader.inputs]]))
        alone = reader.bias is not None and biases[reader.bias] == 1 and len(places[reader.bias]) == 1
        takes_one = reader.called if reader.bias is None else alone
        return replace(reader, foldable=reader.module is not None and takes_one)

    return [restricted(reader) for reader in slots.readers]


def _cuts(slots: SlotGraph, kept: Tensor) -> dict[str, dict[int, tuple[int, ...]]]:
    """Indices that stay, of every dimension that loses some."""
    cuts: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, dim), labels in slots.dims.items():
        if not bool(kept[labels].all()):
            cuts.setdefault(name, {})[dim] = tuple(kept[labels].nonzero().flatten().tolist())
    return cuts


def _folds(
    tensors: Mapping[str, Tensor], dense: Sequence[DenseReader], live: Tensor, kept: Tensor
) -> tuple[dict[str, Exact], tuple[str, ...]]:
    """Weights and biases, before they are cut, that carry the constants that go; and the layers that get a bias."""
    folds: dict[str, Exact] = {}
    biases = []
    for reader in dense:
        gone, carrier = removed_constants(reader, live, kept)
        if not bool(gone.any()):
            continue
        weight = tensors[reader.weight].detach()
        columns = gone.nonzero().flatten().to(weight.device)
        constants = reader.constant.to(weight.device, torch.float64)
        taken = weight.index_select(reader.input_dim, columns).double().movedim(reader.input_dim, -1)
        lost = taken @ constants[columns]
        if carrier is not None:
            carrying = weight.select(reader.input_dim, carrier).double() + lost / constants[carrier]
            folds[reader.weight] = Exact(carrying, reader.input_dim, carrier)
            continue
        assert reader.module is not None  # it is foldable
        addition = lost.flatten(1).sum(1) if lost.ndim > 1 else lost
        if reader.bias is None:  # the new one is not cut by the plan, so it has its final length here
            biases.append(reader.module)
            folds[join(reader.module, "bias")] = Exact(addition[kept[reader.outputs].to(weight.device)])
        else:
            folds[reader.bias] = Exact(tensors[reader.bias].detach().double() + addition)
    return folds, tuple(biases)


def _cut_exact(plan: SlimmingPlan, name: str, fold: Exact) -> Exact:
    """What stays of the exact values of a tensor."""
    if fold.dim is None:
        return Exact(plan.cut(name, fold.values))
    others = [dim for dim in range(fold.values.ndim + 1) if dim != fold.dim]
    return Exact(plan.cut(name, fold.values, others), fold.dim, plan.cuts[name][fold.dim].index(fold.index))


def _groups(slots: SlotGraph, kept: Tensor) -> dict[str, int]:
    """Number of groups that depthwise convolutions have left, where they lose some."""
    counts = {name: (int(kept[labels].sum()), len(labels)) for name, labels in slots.depthwise.items()}
    return {name: left for name, (left, before) in counts.items() if left < before}


def _counts(slots: SlotGraph, kept: Tensor) -> Attributes:
    """Attributes that count the channels of a layer, where they change."""
    attributes: Attributes = {}
    for module, counts in slots.counts.items():
        for attribute, (labels, size) in counts.items():
            left = int(kept[labels].sum())
            if left < len(labels):
                attributes.setdefault(module, {})[attribute] = (len(labels) // size, left // size)
    return attributes


def _selects(
    modules: Mapping[str, nn.Module], slots: SlotGraph, kept: Tensor
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Indices of the channels that batch norms select from the rest of their streams; none where they read all.

    Also the channels of those streams that stay.
    """
    selects, streams = {}, {}
    for name, stream in slots.streams.items():
        present = kept[stream.labels]
        places = (present.cumsum(0) - 1).clamp(min=0)  # where the own channel is gone, the last one before it
        indices = places[stream.indices[kept[slots.gates[name]]]].tolist()
        present_select = selected(modules[name])
        now = list(range(int(present.sum()))) if present_select is None else present_select.tolist()
        if indices != now:
            selects[name] = tuple(indices)
        if indices != now or (present_select is not None and not bool(present.all())):
            streams[name] = tuple(present.nonzero().flatten().tolist())
    return selects, streams


def _removed(
    modules: Mapping[str, nn.Module],
    slots: SlotGraph,
    dense: Sequence[DenseReader],
    selects: Mapping[str, tuple[int, ...]],
    kept: Tensor,
) -> dict[str, int]:
    """Number of units or channels that each layer loses, in the network's order; batch norms, if they select others."""
    outputs = {reader.module: reader.outputs for reader in dense if reader.module is not None}
    outputs |= slots.depthwise
    outputs |= {name: slots.gates[name] for name in selects}
    outputs |= {name: heads.labels for name, heads in slots.heads.items()}
    counts = {name: int((~kept[labels]).sum()) for name, labels in outputs.items()}
    return {name: counts[name] for name in modules if counts.get(name)}
