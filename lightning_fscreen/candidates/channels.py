"""Channels of batch norms as candidates: their scales, their activation functions, and which go together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fscreen.candidates.activations import activations_of
from lightning_fscreen.candidates.granularity import Granularity, Patterns, register_granularity, require_candidates
from lightning_fscreen.modules import is_within, join, select
from lightning_fscreen.slimming import SlimmingPlan
from lightning_fscreen.slimming.apply import Agree, unanimous
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.copies import Copy
from lightning_fscreen.slimming.gates import STAYS, Gate, capture_training, gates_of
from lightning_fscreen.slimming.norms import NormChannels
from lightning_fscreen.slimming.slim import slim_captured
from lightning_fscreen.statistics.collector import ActivationCollector, FeatureStatistics, Probe
from lightning_fscreen.statistics.features import Activation

Feature = Literal["activation", "activation_square", "output", "output_square"]
Bias = Literal["zero", "fold", "mean"]
FEATURES: tuple[Feature, ...] = get_args(Feature)
_GRID = 1000  # points on either side, per search for the shift that an activation turns into a given value
_ZOOMS = 4
_REACH = 30.0


@dataclass(frozen=True)
class PrunableChannels:
    """The channels of one batch norm.

    Attributes:
        name: name of the batch norm in the model.
        module: the batch norm.
        units: (channels,) int64, equal for channels that are pruned together, -1 where one has to stay.
        activation: the element-wise function that follows it; None if there is none, or more than one reader.
    """

    name: str
    module: nn.Module
    units: Tensor
    activation: Activation | None = None

    @property
    def scale(self) -> nn.Parameter:
        """γ, (channels,)."""
        return self.module.get_parameter("weight")

    @property
    def shift(self) -> nn.Parameter:
        """β, (channels,)."""
        return self.module.get_parameter("bias")

    def probe(self, feature: Feature = "activation") -> Probe:
        """Where its activations are read, for one of `FEATURES`."""
        activation = self.activation if feature.startswith("activation") else None
        return Probe(self.name, self.module, "output", activation, square=feature.endswith("square"))

    @torch.no_grad()
    def set_output(self, values: Tensor, channels: Tensor) -> None:
        """Set β so that the activations of these channels, whose γ is zero, take given values.

        Args:
            values: (channels,).
            channels: (channels,) bool, True for these channels.
        """
        wanted = values.to(self.shift)[channels]
        self.shift[channels] = wanted if self.activation is None else inverse(self.activation, wanted)


def find_channels(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> tuple[list[PrunableChannels], dict[str, str]]:
    """Batch norms of `model` in the order of its modules, before anything is known about how they are connected.

    Args:
        model: any module.
        include: glob patterns over module names; a batch norm must match one. All if None.
        exclude: glob patterns over module names; a batch norm must match none.

    Returns:
        The batch norms whose channels can be pruned, and {name: reason} of those that cannot.

    Raises:
        ValueError: a pattern that matches no batch norm; nothing to prune.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    reasons = select(modules, include, exclude)
    reasons |= {name: reason for name, reason in NormChannels().fixed_reasons(modules).items() if name not in reasons}
    found = [
        PrunableChannels(name, module, torch.arange(int(module.num_features)))
        for name, module in modules.items()
        if name not in reasons
    ]
    require_candidates(found, type(model).__name__, "batch norms", reasons)
    return found, reasons


def refine(
    candidates: Sequence[PrunableChannels], gates: Mapping[str, Gate], activations: Mapping[str, Activation]
) -> tuple[list[PrunableChannels], dict[str, str]]:
    """Add the coupled channels and the activations that a captured network shows.

    Channels that are coupled to a batch norm that is no candidate stay with it.

    Args:
        candidates: from `find_channels`.
        gates: gates of the captured network, by name in the model.
        activations: the activation that follows each gate, by its name in the model.

    Returns:
        The candidates that are left, and {name: reason} of the others.
    """
    named = {candidate.name for candidate in candidates}
    bound = {unit: name for name, gate in gates.items() if name not in named for unit in gate.units}
    left, reasons = [], {}
    for candidate in candidates:
        gate = gates.get(candidate.name)
        if gate is None:
            reasons[candidate.name] = "it is not part of the network that the training step calls"
            continue
        units = [STAYS if unit in bound else unit for unit in gate.units]
        if gate.excluded is not None:
            reasons[candidate.name] = gate.excluded
        elif set(units) == {STAYS}:
            reasons[candidate.name] = f"it is coupled to {bound[gate.units[0]]!r}, which is not pruned"
        else:
            activation = activations.get(candidate.name)
            left.append(replace(candidate, units=torch.tensor(units), activation=activation))
    return left, reasons


def inverse(activation: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Where an element-wise function takes given values, or comes nearest to them; the point closest to zero.

    Args:
        activation: the function.
        values: (n,).

    Returns:
        (n,), of the same dtype.
    """
    wanted = values.double().unsqueeze(1)
    reach = max(_REACH, 2 * float(wanted.abs().max())) if len(values) else _REACH
    centre = torch.zeros_like(wanted)
    points = torch.arange(-_GRID, _GRID + 1, dtype=torch.float64, device=values.device) / _GRID
    points = points[points.abs().argsort(stable=True)]  # the first of equals is the closest to the centre
    for _ in range(_ZOOMS):
        grid = centre + reach * points
        nearest = (activation(grid) - wanted).abs().sort(dim=1, stable=True).indices[:, :1]
        centre = grid.gather(1, nearest)
        reach *= 2 / _GRID
    return centre.squeeze(1).to(values)


@dataclass(frozen=True)
class _Learned:
    """What one network has shown: its layers that can be pruned, and why others cannot."""

    network: nn.Module
    captured: Capture
    layers: list[PrunableChannels]
    excluded: dict[str, str]


@register_granularity("channel")
class Channels(Granularity[PrunableChannels]):
    """Channels of batch norms.

    Args:
        model: any module.
        include, exclude: glob patterns over names of batch norms.
        bias: output of pruned channels: "zero", "fold" (their shift), "mean" (their mean activation).
        feature: the feature of their activations that is screened, one of `channels.FEATURES`.

    Raises:
        ValueError: no batch norm, patterns that match nothing.
    """

    noun = "channels"
    slims_in_fit = True
    options = ("bias", "feature")

    def __init__(
        self,
        model: nn.Module,
        include: Patterns,
        exclude: Patterns,
        bias: Bias = "zero",
        feature: Feature = "activation",
    ) -> None:
        self._found, self._fixed = find_channels(model, include, exclude)
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
        """Capture a network: which batch norms are coupled, which cannot be pruned.

        Raises:
            CaptureError: the network cannot be captured.
            ValueError: none of the batch norms can be pruned; lists the reasons.
        """
        captured = capture_training(network, args, kwargs)
        gates = {join(name, gate.name): gate for gate in gates_of(network, captured, [NormChannels.name])}
        activations = {join(name, layer): found for layer, found in activations_of(captured).items()}
        inside = [layer for layer in self._found if is_within(layer.name, name)]
        unused = {join(name, tensor) for tensor in captured.unused()}
        left_out = {layer.name for layer in inside if join(layer.name, "weight") in unused}
        inside = [layer for layer in inside if layer.name not in left_out]
        layers, excluded = refine(inside, gates, activations)
        first = 1 + max((int(layer.units.max()) for layer in self._layers if layer not in inside), default=STAYS)
        for index, layer in enumerate(layers):  # numbers of units are the networks' own
            layers[index] = replace(layer, units=torch.where(layer.units == STAYS, STAYS, layer.units + first))
        self._learned[name] = _Learned(network, captured, layers, excluded)
        self._combine()
        where = f"module {name!r}" if name else f"{type(network).__name__}.forward"
        require_candidates(self._layers, where, "batch norms", self.not_pruned)
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
        """Remove the channels that are not kept, and all that only they need."""
        (captured,) = (learned.captured for learned in self._learned.values() if learned.network is network)
        bias: Literal["zero", "fold"] = "zero" if self._bias == "zero" else "fold"
        return slim_captured(network, captured, kept, args, kwargs, bias, copies, agree)

    def still_there(self, plan: SlimmingPlan) -> str | None:
        """Batch norms with channels that are switched off but stay."""
        return "".join(f"\n  {name}: {reason}" for name, reason in plan.kept_for.items()).strip() or None

    def companions(self) -> dict[str, nn.Parameter]:
        """The shifts β, where the output of pruned channels is to be zero."""
        return {layer.name: layer.shift for layer in self._layers} if self._bias == "zero" else {}

    def units(self) -> dict[str, Tensor] | None:
        """Coupled channels."""
        return {layer.name: layer.units.to(layer.scale.device) for layer in self._layers}

    def collector(self, num_classes: int, network: str = "") -> ActivationCollector:
        """Sums over the batch norms' activations."""
        layers = [layer for layer in self._layers if is_within(layer.name, network)]
        if network in self._learned:
            used = {layer.name for layer in self._learned[network].layers}
            layers = [layer for layer in layers if layer.name in used]
        return ActivationCollector([layer.probe(self._feature) for layer in layers], num_classes)

    def _parameters_of(self, layer: PrunableChannels) -> list[nn.Parameter]:
        return [layer.scale, layer.shift]

    @torch.no_grad()
    def after_pruning(self, pruned: Mapping[str, Tensor], statistics: Mapping[str, FeatureStatistics]) -> None:
        """Set the shifts of pruned channels so that their output is their mean activation, for `bias="mean"`."""
        if self._bias == "mean":
            for layer in self._layers:
                if layer.name in statistics:
                    layer.set_output(statistics[layer.name].mean, pruned[layer.name])
