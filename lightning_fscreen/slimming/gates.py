"""Gates: the layers of a network whose units can be switched off, and which of them are coupled."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_fscreen.modules import coupled_layers, join, uncompiled, why_fixed
from lightning_fscreen.slimming import heads, layers, norms, rows  # noqa: F401  # they register their kinds, but for layers
from lightning_fscreen.slimming.capture import Capture, CaptureError, capture
from lightning_fscreen.slimming.heads import mute
from lightning_fscreen.slimming.inputs import find_inputs
from lightning_fscreen.slimming.interpreter import Off, operator_name
from lightning_fscreen.slimming.kinds import KINDS, kind_of, off
from lightning_fscreen.slimming.operators import find_slots
from lightning_fscreen.slimming.planning import carriable
from lightning_fscreen.slimming.readers import DenseReader, GroupedReader, MeanReader, NormReader
from lightning_fscreen.slimming.slots import Heads, SlotGraph

STAYS = -1
"""Unit of a channel that cannot be pruned."""


@dataclass(frozen=True)
class Gate:
    """A layer whose units can be switched off.

    Attributes:
        name: its name in the model.
        channels: number of units.
        group: equal for gates that are coupled, because their outputs are added or multiplied.
        units: one number per unit; those of equal numbers, in this gate and in others, are pruned together.
            -1 where a unit has to stay.
        excluded: why none of the units can be pruned; None if some can.
        kind: "channel": the layer is a batch norm; γ = β = 0 switches a channel off. "neuron": it is a linear or
            convolution layer; a row of zeros in the weight does (a column, where the convolution is transposed), and a
            zero in the bias. "head": it is an attention; zeros in those columns of its projection that read a head do.
            "input": it is a layer that reads a stream beside batch norms; zeros in the column that reads a channel do.
        readers: the weights of linear and convolution layers that multiply the units: name of the weight → its
            dimension over the inputs and, for each input, the number of the unit that it carries.
        projection: of heads and inputs, the name of the layer whose weight's columns read the units, divided evenly in
            their order. Heads of which the layer reads a channel of each in turns are one unit for each of its columns.
    """

    name: str
    channels: int
    group: int
    units: tuple[int, ...]
    excluded: str | None = None
    kind: str = "channel"
    readers: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict, repr=False)
    projection: str | None = None


def find_gates(model: nn.Module, example_inputs: Any, kinds: Collection[str] | None = None) -> list[Gate]:
    """Layers of a model whose units can be switched off, in the order of its modules.

    These are the batch norms, those linear and convolution layers whose outputs no batch norm normalises (where one
    does, its channels are the units), and attention, whose heads are the units: all that makes a head goes with it.

    Args:
        model: any module that `torch.export` can capture; untouched.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of `forward`, at least two
            instances.
        kinds: some of "channel", "neuron", "head", "input"; the first three by default. What no gate of these kinds
            switches off counts as fixed.

    Returns:
        All gates; those that cannot be pruned say why.

    Raises:
        CaptureError: the model cannot be captured.
        ValueError: an unknown kind.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_fscreen import find_gates
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1))
        >>> for gate in find_gates(net, torch.randn(2, 3, 6, 6)):
        ...     print(gate.name, gate.kind, gate.channels, gate.excluded)
        1 channel 8 None
        2 neuron 4 None
        3 neuron 2 it is an output of the network
    """
    model, kinds = uncompiled(model), [name for name, kind in KINDS.items() if kind.alone] if kinds is None else kinds
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kinds {unknown}; choose from {list(KINDS)}")
    args, kwargs = call_arguments(example_inputs)
    return gates_of(model, capture_training(model, args, kwargs), kinds)


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of the call that some example inputs stand for."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def capture_training(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Capture:
    """Capture the train mode, where auxiliary heads are seen; eval mode where that is impossible.

    Raises:
        CaptureError: neither can be captured, or eval mode leaves out layers whose part in train mode is then unknown.
    """
    try:
        return capture(network, args, kwargs, training=True)
    except CaptureError as error:  # a single instance, a loss that is computed inside, …
        captured = capture(network, args, kwargs)
        if left_out := captured.unused() & {name for name, _ in network.named_parameters()}:
            raise CaptureError(
                f"{type(network).__name__} cannot be captured in train mode, and in eval mode it does not use "
                f"{sorted(left_out)[0]!r}: its part in train mode is unknown, so nothing can be removed; "
                f"pass at least two instances. {error}"
            ) from error
        return captured


def gates_of(network: nn.Module, captured: Capture, kinds: Collection[str]) -> list[Gate]:
    """As `find_gates`, of a network that has been captured, and some kinds of gates.

    Units can go if nothing reads more than a constant of them once they, and all that is coupled to them, are switched
    off.
    """
    modules = {name: module for name, module in network.named_modules() if _kind(module) in kinds}
    reasons: dict[str, str] = {}
    for kind in kinds:
        reasons |= KINDS[kind].fixed_reasons({name: part for name, part in modules.items() if _kind(part) == kind})
    for name in _normalised(network, captured) if "neuron" in kinds else ():
        del modules[name]
    slots = find_slots(
        network, captured, {name: _all_off(part) for name, part in modules.items() if name not in reasons}
    )
    slots.heads |= find_inputs(slots) if "input" in kinds else {}
    found = {name: own for name, own in slots.heads.items() if own.kind in kinds}
    mute(slots, {name: torch.ones(len(own.labels), dtype=torch.bool) for name, own in found.items()})
    _couple(slots)
    root = slots.components(pinned=False)
    why_not = _why_not(network, slots, root)
    reasons |= _fixed_heads(network, slots, found, root)
    counts = {name: KINDS[_kind(module)].units(module) for name, module in modules.items()}
    counts |= {name: len(own.labels) for name, own in found.items()}
    order = {name: place for place, (name, _) in enumerate(network.named_modules())}
    units: dict[str, tuple[int, ...]] = {}
    for name in sorted(counts, key=lambda name: order.get(name, order.get(name.rpartition(".")[0], -1))):
        units[name] = (STAYS,) * counts[name]
        if name not in slots.gates:
            reasons.setdefault(name, _unusual(captured, join(name, "weight")))
        if name not in reasons:
            roots = root[slots.gates[name]].tolist()
            units[name] = tuple(STAYS if label in why_not else label for label in roots)
            if set(units[name]) == {STAYS}:
                reasons[name] = why_not[roots[0]]
    groups = _groups(units)
    readers = _readers(slots, root)
    return [
        Gate(
            name,
            len(own),
            groups[name],
            own,
            reasons.get(name),
            found[name].kind if name in found else _kind(modules[name]),
            _reading(readers, own),
            found[name].projection if name in found else None,
        )
        for name, own in units.items()
    ]


def _fixed_heads(network: nn.Module, slots: SlotGraph, found: Mapping[str, Heads], root: Tensor) -> dict[str, str]:
    """Heads that cannot be switched off, and layers whose outputs are heads, which go as a whole; with the reasons."""
    reasons: dict[str, str] = {}
    for name, own in found.items():
        projection = network.get_submodule(own.projection)
        if reason := why_fixed(projection, {}):
            reasons[name] = f"the layer that projects its heads, {own.projection!r}: {reason}"
        for layer, outputs in slots.layers.items():
            if bool(torch.isin(root[outputs], root[own.labels]).any()):
                reasons[layer] = f"its outputs belong to the heads of {name!r}, which are pruned as a whole"
    return reasons


def _unusual(captured: Capture, weight: str) -> str:
    """Why a layer is none in the graph."""
    operators = {operator_name(user) for user in captured.users(weight)}
    if not operators:
        return "the example inputs do not reach it"
    if operators & layers.HANDLERS.keys():
        return "forward uses its weight in a way of its own"
    return (
        "forward computes another weight from its own (weight standardisation, for instance), "
        "which may depend on all of its entries"
    )


Readers = dict[str, tuple[int, tuple[int, ...]]]


def _readers(slots: SlotGraph, root: Tensor) -> Readers:
    """Weights that multiply units, as in `Gate.readers`."""
    dense = [reader for reader in slots.readers if isinstance(reader, DenseReader)]
    return {reader.weight: (reader.input_dim, tuple(root[reader.inputs].tolist())) for reader in dense}


def _reading(readers: Readers, units: tuple[int, ...]) -> Readers:
    """Those that multiply some of these units."""
    own = set(units)
    return {name: (dim, labels) for name, (dim, labels) in readers.items() if not own.isdisjoint(labels)}


def _kind(module: nn.Module) -> str:
    kind = kind_of(module)
    return "" if kind is None else kind.name


def _all_off(module: nn.Module) -> Off:
    """All units of a gate switched off, silent."""
    kind = kind_of(module)
    assert kind is not None
    return off(module, kind, torch.ones(kind.units(module), dtype=torch.bool), silent=True)


def _normalised(network: nn.Module, captured: Capture) -> list[str]:
    """Linear and convolution layers whose outputs a batch norm normalises, and switches off.

    In h + norm(depthwise(h)) it does not switch h off, which what makes h has to do itself.
    """
    batch_norms = {name: part for name, part in network.named_modules() if _kind(part) == "channel"}
    if not batch_norms:
        return []
    fixed = KINDS["channel"].fixed_reasons(batch_norms)
    switched = {name: _all_off(part) for name, part in batch_norms.items() if name not in fixed}
    slots = find_slots(network, captured, switched)
    root = slots.components(pinned=False)
    read, around, others = torch.zeros(3, len(root), dtype=torch.bool)
    for reader in slots.readers:
        if isinstance(reader, NormReader):
            inputs, outputs = root[reader.inputs], root[reader.outputs]
            read[inputs] = True
            around[inputs[inputs == outputs]] = True
        else:
            others[root[reader.inputs[~reader.known]]] = True
    left = around & others
    return [
        name
        for name, outputs in slots.layers.items()
        if bool(read[root[outputs]].any()) and (name in slots.depthwise or not bool(left[root[outputs]].any()))
    ]


def _why_not(network: nn.Module, slots: SlotGraph, root: Tensor) -> dict[int, str]:
    """Classes of slots that cannot go although all gates are off, and why."""
    reasons: dict[int, str] = {}
    for labels, reason in slots.pins:
        for label in root[labels].unique().tolist():
            reasons.setdefault(label, reason)
    whole = torch.cat([own.labels for own in slots.heads.values() if own.kind == "head"] or [torch.empty(0)])
    for reader in slots.readers:
        if not isinstance(reader, MeanReader):
            continue
        # What makes a head is not zero when nothing reads the head.
        missed = reader.inputs[~reader.silent() | torch.isin(root[reader.inputs], root[whole.long()])]
        for label in root[missed].unique().tolist():
            reasons.setdefault(
                label, f"{reader.layer!r} averages it with all other channels, and it is not zero when off"
            )
    for reader in slots.readers:
        # A batch norm that is called twice cannot select: its inputs go with its outputs.
        itself = root[reader.inputs] == root[reader.outputs] if isinstance(reader, NormReader) else False
        read = ~reader.known & ~torch.as_tensor(itself)
        if isinstance(reader, DenseReader) and reader.muted is not None:
            read = read & ~reader.muted
        for label in root[reader.inputs[read]].unique().tolist():
            reasons.setdefault(label, f"{reader.layer!r} reads it mixed with channels that no gate can switch off")
    for reader, carried in zip(slots.readers, carriable(network, slots), strict=True):
        lost = reader.known & ~(carried.silent() if isinstance(reader, GroupedReader) else carried.known)
        for label in root[reader.inputs[lost]].unique().tolist():
            reasons.setdefault(label, f"{reader.layer!r} would still read a constant of it that nothing else can carry")
    return reasons


def _couple(slots: SlotGraph) -> None:
    """Couple channels that can only be removed together."""
    root = slots.components(pinned=False)
    for reader in slots.readers:
        if not isinstance(reader, NormReader):
            continue
        # All its inputs are constants once the gates before it are off (a depthwise convolution lies between).
        slots.unify(reader.inputs[reader.known], reader.outputs[reader.known])
        # Its inputs go together (they are outputs of a grouped convolution).
        classes, members = root[reader.inputs].unique(return_inverse=True)
        if len(classes) < len(members):
            first = torch.full_like(classes, len(members)).scatter_reduce(
                0, members, torch.arange(len(members)), "amin"
            )
            slots.unify(reader.outputs, reader.outputs[first[members]])


def _groups(units: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Number the gates so that those that share a unit, directly or through others, have the same number."""
    order = {name: index for index, name in enumerate(units)}
    return {name: order[names[0]] for names in coupled_layers(units) for name in names}
