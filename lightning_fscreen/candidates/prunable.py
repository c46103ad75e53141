"""The layers whose units can be pruned, what a captured network shows of them, and why others cannot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_fscreen.candidates.granularity import require_candidates
from lightning_fscreen.candidates.inverse import inverse
from lightning_fscreen.candidates.magnitude import Reader
from lightning_fscreen.candidates.others import other_weights
from lightning_fscreen.members import Members
from lightning_fscreen.modules import join, select
from lightning_fscreen.slimming.gates import STAYS, Gate
from lightning_fscreen.slimming.kinds import KINDS, kind_of
from lightning_fscreen.statistics.features import Activation
from lightning_fscreen.statistics.probes import Probe

Feature = Literal["activation", "activation_square", "output", "output_square"]
Bias = Literal["zero", "fold", "mean"]
Compensation = Literal["zero", "fold", "mean", "ridge"]
SILENT = ("zero", "ridge")
"""Under these, pruned units are zero."""
FEATURES: tuple[Feature, ...] = get_args(Feature)


_NO_GATE = {
    "channel": "it is not part of the network that the training step calls",
    "neuron": "a batch norm normalises its outputs, and the channels of that are the units",
    "head": "it is not part of the network that the training step calls",
    "input": "it is not part of the network that the training step calls",
}

COLUMNS = ("head", "input")
"""Kinds of gates that are no modules, but columns of the layer that reads their units; only the graph shows them."""

INSIDE = "computes its heads inside nn.MultiheadAttention"
"""Why there are no statistics of some heads."""


@dataclass(frozen=True)
class PrunableUnits:
    """The units of one layer.

    Attributes:
        name: name of the layer in the model.
        module: the layer, of heads the one that projects them.
        kind: of its gate, "channel", "neuron", "head" or "input".
        units: (units,) int64, equal for units that are pruned together, -1 where one has to stay.
        size: how many of the weight's columns read a head.
        activation: the element-wise function that follows it; None if there is none, or more than one reader.
        readers: the weights that its units are multiplied by.
    """

    name: str
    module: nn.Module
    kind: str
    units: Tensor
    activation: Activation | None = None
    readers: tuple[Reader, ...] = ()
    size: int = 1

    @property
    def weight(self) -> nn.Parameter:
        """γ, (channels,), or the weight whose rows belong to the units."""
        return self.module.get_parameter("weight")

    @property
    def shift(self) -> nn.Parameter | None:
        """β, or the bias, (units,)."""
        shift = KINDS[self.kind].shift(self.module)
        return shift if isinstance(shift, nn.Parameter) else None

    def members(self, zeroed: bool) -> Members:
        """The parameters whose entries belong to the units; `zeroed`: the shift is zeroed with the weight."""
        dim = None if self.weight.ndim == 1 else KINDS[self.kind].dim(self.module)
        return Members(self.weight, () if self.shift is None else (self.shift,), zeroed, dim, self.size)

    def probe(self, feature: Feature = "activation") -> Probe | None:
        """Where its activations are read, for one of `FEATURES`; None where nobody else sees them."""
        if self.kind in COLUMNS:
            inside = isinstance(self.module, NonDynamicallyQuantizableLinear)
            return None if inside else Probe(self.name, self.module, "input", None, square=feature.endswith("square"))
        activation = self.activation if feature.startswith("activation") else None
        return Probe(self.name, self.module, "output", activation, square=feature.endswith("square"))

    @torch.no_grad()
    def set_output(self, values: Tensor, units: Tensor) -> None:
        """Set the shift so that the activations of these units, whose weights are zero, take given values.

        Without a shift they are what they are.

        Args:
            values: (units,).
            units: (units,) bool, True for these units.
        """
        if self.shift is not None:
            wanted = values.to(self.shift)[units]
            self.shift[units] = wanted if self.activation is None else inverse(self.activation, wanted)


def find_units(
    model: nn.Module,
    kinds: Collection[str],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> tuple[list[PrunableUnits], dict[str, str]]:
    """Gates of `model` in the order of its modules, before anything is known about how they are connected.

    Args:
        model: any module.
        kinds: of gates.
        include: glob patterns over module names; a gate must match one. All if None.
        exclude: glob patterns over module names; a gate must match none.

    Returns:
        The gates whose units can be pruned, and {name: reason} of those that cannot. If there is none, but heads may be
        found, all that are left out by patterns, until the network is known.

    Raises:
        ValueError: a pattern that matches no gate; nothing to prune.
    """
    known = {name: (module, kind_of(module)) for name, module in model.named_modules()}
    gates = {name: (module, kind) for name, (module, kind) in known.items() if kind is not None and kind.name in kinds}
    reasons = select(
        gates, include, exclude, {name: kind.name for name, (_, kind) in gates.items()}, _possible(model, kinds)
    )
    for name in kinds:
        modules = {layer: module for layer, (module, kind) in gates.items() if kind.name == name}
        fixed = KINDS[name].fixed_reasons(modules) | _grouped(modules)
        reasons |= {layer: reason for layer, reason in fixed.items() if layer not in reasons}
    found = [
        PrunableUnits(name, module, kind.name, torch.arange(kind.units(module)))
        for name, (module, kind) in gates.items()
        if name not in reasons
    ]
    if not found and "head" in kinds:  # they are in networks that hold such layers, whatever the patterns say of these
        found = [
            PrunableUnits(name, module, kind.name, torch.arange(kind.units(module)))
            for name, (module, kind) in gates.items()
            if reasons[name].startswith("left out by")
        ]
    require_candidates(found, type(model).__name__, called(kinds), reasons)
    if "neuron" in kinds:
        owners = {id(layer.weight): layer.name for layer in found}
        reasons |= other_weights(model, lambda module: kind_of(module) is not None, "units", owners)
    return found, reasons


def _possible(model: nn.Module, kinds: Collection[str]) -> list[str]:
    """What patterns may match beside layers: the names of heads and inputs, which only a captured network shows."""
    names, columns = [name for name, _ in model.named_modules()], [kind for kind in COLUMNS if kind in kinds]
    own = [f"{name}.{kind}s" for kind in columns for name in names]
    return [*names, *own, *(f"kind={kind}" for kind in columns)] if columns else []


def columns_of(
    model: nn.Module,
    network: str,
    gates: Mapping[str, Gate],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> tuple[list[PrunableUnits], dict[str, str]]:
    """The heads and inputs of a captured network, and {name: reason} of those that `include` or `exclude` leaves out.

    Args:
        model: the model.
        network: name of the network in it.
        gates: gates of the network, by name in the model.
        include: glob patterns over names of gates.
        exclude: likewise.
    """
    found = {name: gate for name, gate in gates.items() if gate.kind in COLUMNS and gate.projection is not None}
    reasons = select(found, include, exclude, {name: gate.kind for name, gate in found.items()}, None)
    wanted = {name: (join(network, gate.projection or ""), gate.kind, gate.channels) for name, gate in found.items()}
    return [columns(model, name, *own) for name, own in wanted.items() if name not in reasons], reasons


def columns(
    model: nn.Module, name: str, projection: str, kind: str = "head", count: int | None = None, size: int = 1
) -> PrunableUnits:
    """The heads of one attention, or the inputs of one layer, as candidates.

    Args:
        model: the model.
        name: of the gate.
        projection: name of the layer that reads them.
        kind: of the gate.
        count: how many there are.
        size: or how many columns of the projection read each of them.
    """
    module = model.get_submodule(projection)
    width = module.get_parameter("weight").shape[KINDS[kind].dim(module)]
    size = size if count is None else width // count
    return PrunableUnits(name, module, kind, torch.arange(width // size), size=size)


def called(kinds: Collection[str]) -> str:
    """Gates of these kinds, in messages."""
    return " or ".join(KINDS[name].layers for name in kinds if KINDS[name].alone)


def _grouped(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    reason = "the outputs of a transposed convolution with groups are no dimension of its weight; slim() removes them"
    return {name: reason for name, part in modules.items() if isinstance(part, _ConvTransposeNd) and part.groups > 1}


def refine(
    candidates: Sequence[PrunableUnits], gates: Mapping[str, Gate], activations: Mapping[str, Activation]
) -> tuple[list[PrunableUnits], dict[str, str]]:
    """Add the coupled units and the activations that a captured network shows.

    Units that are coupled to a gate that is no candidate stay with it. So do those that could only go with a whole
    layer.

    Args:
        candidates: from `find_units`.
        gates: gates of the captured network, by name in the model.
        activations: the activation that follows each gate, by its name in the model.

    Returns:
        The candidates that are left, and {name: reason} of the others.
    """
    named = {candidate.name for candidate in candidates}
    whole = {name for name, gate in gates.items() if gate.channels > 1 and len(set(gate.units)) == 1}
    bound = {unit: name for name, gate in gates.items() if name not in named or name in whole for unit in gate.units}
    left, reasons = [], {}
    for candidate in candidates:
        gate = gates.get(candidate.name)
        if gate is None:
            reasons[candidate.name] = _NO_GATE[candidate.kind]
            continue
        units = [STAYS if unit in bound else unit for unit in gate.units]
        if gate.excluded is not None:
            reasons[candidate.name] = gate.excluded
        elif candidate.name in whole:
            reasons[candidate.name] = "its units can only be pruned all together, and a layer keeps at least one"
        elif set(units) == {STAYS}:
            other = next(bound[unit] for unit in gate.units if unit != STAYS)
            reasons[candidate.name] = f"it is coupled to {other!r}, which is not pruned"
        else:
            activation = activations.get(candidate.name)
            left.append(replace(candidate, units=torch.tensor(units), activation=activation))
    return left, reasons
