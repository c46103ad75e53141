"""Units as candidates: channels of batch norms, outputs of linear and convolution layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_fscreen.candidates.activations import activations_of
from lightning_fscreen.candidates.costs import Currency, NetworkCosts, UnitCosts, size_model
from lightning_fscreen.candidates.granularity import Granularity, Patterns, register_granularity, require_candidates
from lightning_fscreen.candidates.latency import latency_models
from lightning_fscreen.candidates.learned import Learned, numbered_from, readers_of, warn_of_hooks, warn_of_unused
from lightning_fscreen.candidates.magnitude import comparable, unit_magnitude
from lightning_fscreen.candidates.prunable import (
    COLUMNS,
    INSIDE,
    SILENT,
    Compensation,
    Feature,
    PrunableUnits,
    called,
    columns,
    columns_of,
    find_units,
    refine,
)
from lightning_fscreen.candidates.regression import Regression
from lightning_fscreen.candidates.rounding import not_rounded, unit_blocks
from lightning_fscreen.costs.size import Size
from lightning_fscreen.costs.timings import Timings
from lightning_fscreen.members import Members
from lightning_fscreen.modules import batch_size, is_within, join
from lightning_fscreen.ranking.criteria import ScoringInputs
from lightning_fscreen.ranking.multiples import Blocks
from lightning_fscreen.slimming import SlimmingPlan
from lightning_fscreen.slimming.apply import Agree, unanimous
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.copies import Copy
from lightning_fscreen.slimming.gates import STAYS, Gate, capture_training, gates_of
from lightning_fscreen.slimming.slim import slim_captured
from lightning_fscreen.slimming.widths import Widths
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.gradients import GradientStatistics
from lightning_fscreen.statistics.probes import FeatureStatistics


@register_granularity("unit")
class Units(Granularity[PrunableUnits]):
    """Channels of batch norms, outputs of those linear and convolution layers that no batch norm normalises, and heads.

    Heads are found when the network is captured, and so become candidates later than layers.

    Args:
        model: any module.
        include, exclude: glob patterns over names of such layers; "kind=head" and the like stand for all of a kind.
        bias: output of pruned units: "zero", "fold" (their shift or bias), "mean" (their mean activation), "ridge"
            (zero, and what reads them predicts them from the others).
        feature: the feature of their activations that is screened, one of `FEATURES`.
        round_to: number of which widths of layers are left in multiples.
        streams: whether the units that read a channel of a stream may go together, where batch norms select from it;
            inputs of other layers that read it are units then, too.

    Raises:
        ValueError: no such layer, patterns that match nothing.
    """

    noun = "units"
    slims_in_fit = True
    has_costs = True
    options = ("bias", "feature", "round_to", "streams")
    gates: ClassVar[tuple[str, ...]] = ("channel", "neuron", "head")
    """The kinds of gates whose units are candidates."""

    def __init__(
        self,
        model: nn.Module,
        include: Patterns,
        exclude: Patterns,
        bias: Compensation = "zero",
        feature: Feature = "activation",
        round_to: int = 1,
        streams: bool = False,
    ) -> None:
        self._model, self._include, self._exclude = model, include, exclude
        self._streams, self._kinds = streams, (*self.gates, "input") if streams else self.gates
        self._found, self._fixed = find_units(model, self._kinds, include, exclude)
        self._wanted: Collection[str] | None = None  # None if all layers are
        self._learned: dict[str, Learned] = {}
        self._bias, self._feature, self._round_to = bias, feature, round_to
        self._silent = bias in SILENT
        self._told: set[str] = set()  # modules of which there was a warning
        self._combine()

    def _combine(self) -> None:
        """The candidates found, as the networks have shown them."""
        shown = {layer.name: layer for learned in self._learned.values() for layer in learned.layers}
        excluded = {name: why for learned in self._learned.values() for name, why in learned.excluded.items()}
        left_out = {*excluded, *(self._fixed if self._learned else ())}
        self._layers = [shown.get(layer.name, layer) for layer in self._found if layer.name not in left_out]
        self.not_pruned = self._fixed | excluded

    def keep_only(self, names: Collection[str], reasons: Mapping[str, str] | None = None) -> None:
        """Forget the candidates of all other layers; `reasons` says why."""
        self._wanted = list(names) if self._wanted is None else [name for name in self._wanted if name in names]
        self._found = [layer for layer in self._found if layer.name in names]
        self._fixed |= reasons or {}
        self._combine()

    def structure(self) -> dict[str, Any]:
        """The heads, and inputs: gate → the layer that reads them, how many of its columns do, and their kind."""
        names = {id(module): name for name, module in self._model.named_modules()}
        columns = [layer for layer in self._layers if layer.kind in COLUMNS]
        return {layer.name: (names[id(layer.module)], layer.size, layer.kind) for layer in columns}

    def restore(self, structure: Mapping[str, Any]) -> None:
        """Go on with these."""
        known = {layer.name for layer in self._found}
        restored = {name: found for name, found in structure.items() if name not in known}
        self._add(
            [
                columns(self._model, name, layer, (*kind, "head")[0], size=size)
                for name, (layer, size, *kind) in restored.items()  # older files have no kind
            ]
        )
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
        gates = {join(name, gate.name): gate for gate in gates_of(network, captured, self._kinds)}
        activations = {join(name, layer): found for layer, found in activations_of(captured).items()}
        inside = [layer for layer in self._found if is_within(layer.name, name)]
        unused = {join(name, tensor) for tensor in captured.unused()}
        self._told |= warn_of_unused(self._model, unused, self._told) | warn_of_hooks(network, name, self._told)
        left_out = {layer.name for layer in inside if join(layer.name, "weight") in unused}
        inside = [layer for layer in inside if layer.name not in left_out and layer.name not in self._fixed]
        layers, excluded = refine([*inside, *self._new_heads(name, gates)], gates, activations)
        layers = [
            replace(layer, readers=tuple(readers_of(network, captured, [gates[layer.name]])))
            if layer.kind == "neuron"
            else layer
            for layer in layers
        ]
        others = [layer for layer in self._layers if layer.name not in gates]
        first = 1 + max((int(layer.units.max()) for layer in others), default=STAYS)
        numbered = [numbered_from(layer, first) for layer in layers]
        instances, readers = batch_size((args, kwargs)) or 1, readers_of(network, captured, gates.values(), first)
        self._learned[name] = Learned(network, captured, (args, kwargs), instances, numbered, excluded, readers)
        self._combine()
        where = f"module {name!r}" if name else f"{type(network).__name__}.forward"
        require_candidates(self._layers, where, called(self.gates), self.not_pruned)
        return left_out

    def _new_heads(self, network: str, gates: Mapping[str, Gate]) -> list[PrunableUnits]:
        """The heads of a captured network that are not among the candidates yet."""
        heads, unwanted = columns_of(self._model, network, gates, self._include, self._exclude)
        known = {layer.name for layer in self._found}
        new = [own for own in heads if own.name not in known and (self._wanted is None or own.name in self._wanted)]
        self._fixed |= unwanted
        self._add(new)
        return new

    def _add(self, heads: Sequence[PrunableUnits]) -> None:
        """More candidates; the parameters of an nn.MultiheadAttention are pruned with its heads."""
        self._found = [*self._found, *heads]
        whole = tuple(f"{own.name}." for own in heads if isinstance(own.module, NonDynamicallyQuantizableLinear))
        self._fixed = {name: why for name, why in self._fixed.items() if not name.startswith(whole)}

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
        bias: Literal["zero", "fold"] = "zero" if self._silent else "fold"
        return slim_captured(network, captured, kept, args, kwargs, bias, copies, agree, round_to=self._round_to)

    def still_there(self, plan: SlimmingPlan) -> str | None:
        """Layers with units that are switched off but stay."""
        return "".join(f"\n  {name}: {reason}" for name, reason in plan.kept_for.items()).strip() or None

    def units(self) -> dict[str, Tensor] | None:
        """Coupled units."""
        return {layer.name: layer.units.to(layer.weight.device) for layer in self._layers}

    def kinds(self) -> dict[str, str]:
        """Of gates."""
        return {layer.name: layer.kind for layer in self._layers}

    def costs(self, present: Size, currency: Currency, timings: Timings | None = None) -> UnitCosts | None:
        """Parameters, multiply–adds or nanoseconds of the networks that have been learned from."""
        if currency == "candidates" or (cost := getattr(present, currency)) is None or not self._learned:
            return None
        if currency == "latency":
            assert timings is not None, "a latency is measured"
            graphs = {name: self._learned[name].timed(timings.batch_size) for name in self._gates()}
            timed = {name: (captured, self._widths_of(name, captured)) for name, captured in graphs.items()}
            models = latency_models(timed, cost, timings, self._round_to)
            networks = {
                name: NetworkCosts(timed[name][1], model, False, self._streams) for name, model in models.items()
            }
            return UnitCosts(networks, cost)
        networks = {}
        for name, widths in self._widths().items():
            learned = self._learned[name]
            call = learned.network, learned.captured, learned.instances
            model = size_model(*call, widths, currency, present, name)
            networks[name] = NetworkCosts(widths, model, currency == "params", self._streams)
        return UnitCosts(networks, cost)

    def _gates(self) -> dict[str, dict[str, int]]:
        """Network that holds candidates → its gates that have some, by names inside it, and their numbers of units."""
        found, names = {}, set(self.names)
        for name, learned in self._learned.items():
            layers = [layer for layer in learned.layers if layer.name in names]
            if layers:
                found[name] = {layer.name.removeprefix(name).lstrip("."): len(layer.units) for layer in layers}
        return found

    def _widths_of(self, name: str, captured: Capture) -> Widths:
        shifts = {"silent": self._silent, "new_shifts": self._bias == "mean"}
        return Widths(self._learned[name].network, captured, self._gates()[name], round_to=self._round_to, **shifts)

    def _widths(self) -> dict[str, Widths]:
        """Those of the networks that have been learned from and hold candidates, by their names."""
        return {name: self._widths_of(name, self._learned[name].captured) for name in self._gates()}

    def blocks(self) -> Blocks | None:
        """Units that are in the same widths, if these are to be multiples."""
        if self._round_to == 1 or not self._learned:
            return None
        return unit_blocks(self._widths(), {layer.name: layer.units for layer in self._layers}, self._round_to)

    def not_rounded(self, kept: Mapping[str, Tensor]) -> dict[str, str]:
        """Layers with widths that can be pruned, but would be no multiples."""
        found: dict[str, str] = {}
        for name, widths in self._widths().items() if self._round_to > 1 else ():
            own = not_rounded(widths, {gate: kept[join(name, gate)].cpu() for gate in widths.units}, self._round_to)
            found |= {join(name, layer): reason for layer, reason in own.items()}
        return found

    def collector(self, num_classes: int, network: str = "") -> ActivationCollector:
        """Sums over the layers' activations."""
        layers = [layer for layer in self._layers if is_within(layer.name, network)]
        if network in self._learned:
            used = {layer.name for layer in self._learned[network].layers}
            layers = [layer for layer in layers if layer.name in used]
        probes = {layer.name: layer.probe(self._feature) for layer in layers}
        collector = ActivationCollector([probe for probe in probes.values() if probe is not None], num_classes)
        collector.unmatched |= {name: INSIDE for name, probe in probes.items() if probe is None}
        return collector

    def regression(self) -> Regression:
        """Over all networks that have been learned from."""
        readers = [reader for learned in self._learned.values() for reader in learned.readers]
        heads = [layer.units for layer in self._layers if layer.kind == "head"]
        return Regression(readers, torch.cat([torch.zeros(0, dtype=torch.long), *heads]))

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
        return layer.members(zeroed=self._silent)

    def _per_candidate(self, layer: PrunableUnits, values: Tensor) -> Tensor:
        """Of a head, the mean over its channels, or whether it is true of any."""
        channels = values.view(-1, layer.size)
        return channels.any(1) if values.dtype == torch.bool else channels.mean(1) if layer.size > 1 else values

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
