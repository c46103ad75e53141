"""Units as candidates: channels of batch norms, outputs of linear and convolution layers, and which go together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_fscreen.candidates.activations import activations_of
from lightning_fscreen.candidates.granularity import Granularity, Patterns, register_granularity, require_candidates
from lightning_fscreen.candidates.inverse import inverse
from lightning_fscreen.candidates.magnitude import Reader, comparable, unit_magnitude
from lightning_fscreen.candidates.others import other_weights
from lightning_fscreen.members import Members
from lightning_fscreen.modules import is_within, join, own_tensors, select
from lightning_fscreen.ranking.criteria import ScoringInputs
from lightning_fscreen.slimming import SlimmingPlan
from lightning_fscreen.slimming.apply import Agree, unanimous
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.copies import Copy
from lightning_fscreen.slimming.gates import STAYS, Gate, capture_training, gates_of
from lightning_fscreen.slimming.kinds import KINDS, kind_of
from lightning_fscreen.slimming.slim import slim_captured
from lightning_fscreen.statistics.collector import ActivationCollector, FeatureStatistics, Probe
from lightning_fscreen.statistics.features import Activation
from lightning_fscreen.statistics.gradients import GradientStatistics

Feature = Literal["activation", "activation_square", "output", "output_square"]
Bias = Literal["zero", "fold", "mean"]
FEATURES: tuple[Feature, ...] = get_args(Feature)


_NO_GATE = {
    "channel": "it is not part of the network that the training step calls",
    "neuron": "a batch norm normalises its outputs, and the channels of that are the units",
}


@dataclass(frozen=True)
class PrunableUnits:
    """The units of one layer.

    Attributes:
        name: name of the layer in the model.
        module: the layer.
        kind: of its gate, "channel" or "neuron".
        units: (units,) int64, equal for units that are pruned together, -1 where one has to stay.
        activation: the element-wise function that follows it; None if there is none, or more than one reader.
        readers: the weights that its units are multiplied by.
    """

    name: str
    module: nn.Module
    kind: str
    units: Tensor
    activation: Activation | None = None
    readers: tuple[Reader, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        """γ, (channels,), or the weight whose rows belong to the units."""
        return self.module.get_parameter("weight")

    @property
    def shift(self) -> nn.Parameter | None:
        """β, or the bias, (units,)."""
        return own_tensors(self.module)[1]

    def members(self, zeroed: bool) -> Members:
        """The parameters whose entries belong to the units; `zeroed`: the shift is zeroed with the weight."""
        dim = None if self.weight.ndim == 1 else KINDS[self.kind].dim(self.module)
        return Members(self.weight, () if self.shift is None else (self.shift,), zeroed, dim)

    def probe(self, feature: Feature = "activation") -> Probe:
        """Where its activations are read, for one of `FEATURES`."""
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
        The gates whose units can be pruned, and {name: reason} of those that cannot.

    Raises:
        ValueError: a pattern that matches no gate; nothing to prune.
    """
    known = {name: (module, kind_of(module)) for name, module in model.named_modules()}
    gates = {name: (module, kind) for name, (module, kind) in known.items() if kind is not None and kind.name in kinds}
    reasons = select(gates, include, exclude)
    for name in kinds:
        modules = {layer: module for layer, (module, kind) in gates.items() if kind.name == name}
        fixed = KINDS[name].fixed_reasons(modules) | _grouped(modules)
        reasons |= {layer: reason for layer, reason in fixed.items() if layer not in reasons}
    found = [
        PrunableUnits(name, module, kind.name, torch.arange(kind.units(module)))
        for name, (module, kind) in gates.items()
        if name not in reasons
    ]
    require_candidates(found, type(model).__name__, _called(kinds), reasons)
    if "neuron" in kinds:
        owners = {id(layer.weight): layer.name for layer in found}
        reasons |= other_weights(model, lambda module: kind_of(module) is not None, "units", owners)
    return found, reasons


def _called(kinds: Collection[str]) -> str:
    """Gates of these kinds, in messages."""
    return " or ".join(KINDS[name].layers for name in kinds)


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


@dataclass(frozen=True)
class _Learned:
    """What one network has shown: its layers that can be pruned, and why others cannot."""

    network: nn.Module
    captured: Capture
    layers: list[PrunableUnits]
    excluded: dict[str, str]


def _readers(network: nn.Module, gate: Gate) -> tuple[Reader, ...]:
    if gate.kind == "channel":
        return ()
    reading = gate.readers.items()
    return tuple(Reader(network.get_parameter(name), dim, torch.tensor(labels)) for name, (dim, labels) in reading)


def _numbered_from(layer: PrunableUnits, first: int) -> PrunableUnits:
    """With other numbers of units: a network's own begin at 0."""
    readers = tuple(replace(reader, labels=reader.labels + first) for reader in layer.readers)
    return replace(layer, units=torch.where(layer.units == STAYS, STAYS, layer.units + first), readers=readers)


@register_granularity("unit")
class Units(Granularity[PrunableUnits]):
    """Channels of batch norms, and outputs of those linear and convolution layers that no batch norm normalises.

    Args:
        model: any module.
        include, exclude: glob patterns over names of such layers.
        bias: output of pruned units: "zero", "fold" (their shift or bias), "mean" (their mean activation).
        feature: the feature of their activations that is screened, one of `FEATURES`.

    Raises:
        ValueError: no such layer, patterns that match nothing.
    """

    noun = "units"
    slims_in_fit = True
    options = ("bias", "feature")
    gates: ClassVar[tuple[str, ...]] = ("channel", "neuron")
    """The kinds of gates whose units are candidates."""

    def __init__(
        self,
        model: nn.Module,
        include: Patterns,
        exclude: Patterns,
        bias: Bias = "zero",
        feature: Feature = "activation",
    ) -> None:
        self._found, self._fixed = find_units(model, self.gates, include, exclude)
        self._learned: dict[str, _Learned] = {}
        self._bias, self._feature = bias, feature
        self._combine()

    def _combine(self) -> None:
        """The candidates found, as the networks have shown them."""
        shown = {layer.name: layer for learned in self._learned.values() for layer in learned.layers}
        excluded = {name: why for learned in self._learned.values() for name, why in learned.excluded.items()}
        self._layers = [shown.get(layer.name, layer) for layer in self._found if layer.name not in excluded]
        self.not_pruned = self._fixed | excluded

    def keep_only(self, names: Collection[str], reasons: Mapping[str, str] | None = None) -> None:
        """Forget the candidates of all other layers; `reasons` says why."""
        self._found = [layer for layer in self._found if layer.name in names]
        self._fixed |= reasons or {}
        self._combine()

    def learn(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = ""
    ) -> Collection[str]:
        """Capture a network: which layers are coupled, which cannot be pruned.

        Raises:
            CaptureError: the network cannot be captured.
            ValueError: none of them can be pruned; lists the reasons.
        """
        captured = capture_training(network, args, kwargs)
        gates = {join(name, gate.name): gate for gate in gates_of(network, captured, self.gates)}
        activations = {join(name, layer): found for layer, found in activations_of(captured).items()}
        inside = [layer for layer in self._found if is_within(layer.name, name)]
        unused = {join(name, tensor) for tensor in captured.unused()}
        left_out = {layer.name for layer in inside if join(layer.name, "weight") in unused}
        inside = [layer for layer in inside if layer.name not in left_out]
        layers, excluded = refine(inside, gates, activations)
        layers = [replace(layer, readers=_readers(network, gates[layer.name])) for layer in layers]
        first = 1 + max((int(layer.units.max()) for layer in self._layers if layer not in inside), default=STAYS)
        self._learned[name] = _Learned(network, captured, [_numbered_from(layer, first) for layer in layers], excluded)
        self._combine()
        where = f"module {name!r}" if name else f"{type(network).__name__}.forward"
        require_candidates(self._layers, where, _called(self.gates), self.not_pruned)
        return left_out

    def forget(self, name: str) -> None:
        """Forget what was learned from the network of that name."""
        self._learned.pop(name, None)
        self._combine()

    def slim(
        self,
        network: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kept: Mapping[str, Tensor],
        copies: Sequence[Copy] = (),
        agree: Agree = unanimous,
    ) -> SlimmingPlan:
        """Remove the units that are not kept, and all that only they need."""
        (captured,) = (learned.captured for learned in self._learned.values() if learned.network is network)
        bias: Literal["zero", "fold"] = "zero" if self._bias == "zero" else "fold"
        return slim_captured(network, captured, kept, args, kwargs, bias, copies, agree)

    def still_there(self, plan: SlimmingPlan) -> str | None:
        """Layers with units that are switched off but stay."""
        return "".join(f"\n  {name}: {reason}" for name, reason in plan.kept_for.items()).strip() or None

    def units(self) -> dict[str, Tensor] | None:
        """Coupled units."""
        return {layer.name: layer.units.to(layer.weight.device) for layer in self._layers}

    def kinds(self) -> dict[str, str]:
        """Of gates."""
        return {layer.name: layer.kind for layer in self._layers}

    def collector(self, num_classes: int, network: str = "") -> ActivationCollector:
        """Sums over the layers' activations."""
        layers = [layer for layer in self._layers if is_within(layer.name, network)]
        if network in self._learned:
            used = {layer.name for layer in self._learned[network].layers}
            layers = [layer for layer in layers if layer.name in used]
        return ActivationCollector([layer.probe(self._feature) for layer in layers], num_classes)

    def scoring_inputs(
        self,
        kept: Mapping[str, Tensor],
        statistics: Mapping[str, FeatureStatistics],
        gradients: Mapping[str, GradientStatistics],
    ) -> dict[str, ScoringInputs]:
        """As of all granularities; the values compare over layers of all kinds, see `comparable`."""
        inputs = super().scoring_inputs(kept, statistics, gradients)
        values = comparable({name: layer.weight for name, layer in inputs.items()}, kept, self.kinds())
        return {name: replace(layer, weight=values[name]) for name, layer in inputs.items()}

    def _members_of(self, layer: PrunableUnits) -> Members:
        return layer.members(zeroed=self._bias == "zero")

    def _values_of(self, layer: PrunableUnits) -> Tensor:
        if layer.kind == "channel":
            return layer.weight.detach()
        return unit_magnitude(self._members_of(layer), layer.units, layer.readers)

    @torch.no_grad()
    def after_pruning(self, pruned: Mapping[str, Tensor], statistics: Mapping[str, FeatureStatistics]) -> None:
        """Set the shifts of pruned units so that their output is their mean activation, for `bias="mean"`."""
        if self._bias == "mean":
            for layer in self._layers:
                if layer.name in statistics:
                    layer.set_output(statistics[layer.name].mean, pruned[layer.name])
