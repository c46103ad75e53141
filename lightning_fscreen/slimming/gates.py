"""Gates: the batch norms of a network, whose channels can be switched off, and how they are coupled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fscreen.modules import coupled_layers, own_tensors, uncompiled, why_fixed
from lightning_fscreen.slimming.capture import Capture, CaptureError, capture
from lightning_fscreen.slimming.interpreter import Off
from lightning_fscreen.slimming.operators import find_slots
from lightning_fscreen.slimming.planning import carriable
from lightning_fscreen.slimming.readers import GroupedReader, NormReader
from lightning_fscreen.slimming.slots import SlotGraph

STAYS = -1
"""Unit of a channel that cannot be pruned."""


@dataclass(frozen=True)
class Gate:
    """A batch norm whose scale γ switches channels off.

    Attributes:
        name: its name in the model.
        channels: number of channels.
        group: equal for gates that are coupled, because their outputs are added or multiplied.
        units: one number per channel; channels of equal numbers, in this gate and in others, are pruned together.
            -1 where a channel has to stay.
        excluded: why none of the channels can be pruned; None if some can.
    """

    name: str
    channels: int
    group: int
    units: tuple[int, ...]
    excluded: str | None = None


def find_gates(model: nn.Module, example_inputs: Any) -> list[Gate]:
    """Batch norms of a model, in the order of its modules.

    Args:
        model: any module that `torch.export` can capture; untouched.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of `forward`, at least two
            instances.

    Returns:
        All gates; those that cannot be pruned say why.

    Raises:
        CaptureError: the model cannot be captured.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_fscreen import find_gates
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.BatchNorm2d(2))
        >>> [(gate.name, gate.channels, gate.excluded) for gate in find_gates(net, torch.randn(2, 3, 6, 6))]
        [('1', 8, None), ('4', 2, 'it is an output of the network')]
    """
    model = uncompiled(model)
    args, kwargs = call_arguments(example_inputs)
    return gates_of(model, capture_training(model, args, kwargs))


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


def gates_of(network: nn.Module, captured: Capture) -> list[Gate]:
    """As `find_gates`, of a network that has been captured.

    Channels can go if nothing reads more than a constant of them once they, and all that is coupled to them, are
    switched off.
    """
    modules = {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    reasons = fixed_reasons(modules)
    off = {name: all_off(module) for name, module in modules.items() if name not in reasons}
    slots = find_slots(network, captured, off)
    _couple(slots)
    root = slots.components(pinned=False)
    why_not = _why_not(network, slots, root)
    units: dict[str, tuple[int, ...]] = {}
    for name, module in modules.items():
        units[name] = (STAYS,) * int(module.num_features)
        if name not in slots.gates:
            reasons.setdefault(name, "the example inputs do not reach it")
        if name not in reasons:
            roots = root[slots.gates[name]].tolist()
            units[name] = tuple(STAYS if label in why_not else label for label in roots)
            if set(units[name]) == {STAYS}:
                reasons[name] = why_not[roots[0]]
    groups = _groups(units)
    return [Gate(name, len(own), groups[name], own, reasons.get(name)) for name, own in units.items()]


def all_off(module: nn.Module) -> Off:
    """All channels of a batch norm switched off, silent."""
    channels = int(module.num_features)  # type: ignore[arg-type]
    return Off(torch.ones(channels, dtype=torch.bool), torch.zeros(channels, dtype=torch.float64))


def fixed_reasons(modules: Mapping[str, _BatchNorm]) -> dict[str, str]:
    """Batch norms that cannot be switched off, whatever the network does with them."""
    reasons: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, module in modules.items():
        weight, shift = own_tensors(module)
        if not module.affine:
            reasons[name] = "it has no scale and shift (affine=False)"
        elif reason := why_fixed(module, owners, "scale"):
            reasons[name] = reason
        elif shift is None:
            reasons[name] = "its shift is missing, or not a parameter of its own"
        else:
            owners[id(weight)] = name
    return reasons


def _why_not(network: nn.Module, slots: SlotGraph, root: Tensor) -> dict[int, str]:
    """Classes of slots that cannot go although all gates are off, and why."""
    reasons: dict[int, str] = {}
    for labels, reason in slots.pins:
        for label in root[labels].unique().tolist():
            reasons.setdefault(label, reason)
    for reader in slots.readers:
        # A batch norm that is called twice cannot select: its inputs go with its outputs.
        itself = root[reader.inputs] == root[reader.outputs] if isinstance(reader, NormReader) else False
        for label in root[reader.inputs[~reader.known & ~torch.as_tensor(itself)]].unique().tolist():
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
