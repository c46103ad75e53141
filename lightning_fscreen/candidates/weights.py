"""Weights of linear and convolution layers that can be pruned, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_fscreen.candidates.granularity import Granularity, Patterns, register_granularity, require_candidates
from lightning_fscreen.candidates.others import other_weights
from lightning_fscreen.members import Members
from lightning_fscreen.modules import is_within, select, why_fixed
from lightning_fscreen.slimming import SlimmingPlan, remove_dead_units
from lightning_fscreen.slimming.apply import Agree, unanimous
from lightning_fscreen.slimming.copies import Copy
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.connections import per_connection
from lightning_fscreen.statistics.probes import Probe

Connections = Literal["factored", "exact"]
FRESH = (
    "all its weights were zero when the fit began, so that for now their magnitudes say how long it has been trained, "
    "not what it needs; to prune it nevertheless, pass include= with a pattern for every layer that is to be pruned"
)
"""Why a new head on a trained network is left alone: ranked with the other layers, nearly all of it would go."""


@dataclass(frozen=True)
class PrunableWeight:
    """The weight of one linear or convolution layer, its connections being the candidates."""

    name: str
    module: nn.Linear | _ConvNd

    @property
    def weight(self) -> nn.Parameter:
        """(out, in) or (out, in / groups, *kernel); transposed convolutions (in, out / groups, *kernel)."""
        return self.module.get_parameter("weight")


def find_weights(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> tuple[list[PrunableWeight], dict[str, str]]:
    """Linear and convolution layers of `model` in the order of its modules.

    Args:
        model: any module.
        include: glob patterns over module names; a layer must match one. All layers if None.
        exclude: glob patterns over module names; a layer must match none.

    Returns:
        The layers whose weights can be pruned, and {layer name: reason} of those that cannot.

    Raises:
        ValueError: a pattern that matches no layer; no layer left to prune.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | _ConvNd)}
    selected = select(layers, include, exclude)
    found: list[PrunableWeight] = []
    excluded: dict[str, str] = {}
    owners: dict[int, str] = {}
    protected = {id(getattr(layers[name], "weight", None)): name for name in selected}
    for name, module in layers.items():
        reason = selected.get(name) or _why_not(module, owners)
        if reason is None and id(module.weight) in protected:
            other = protected[id(module.weight)]
            reason = f"shares its weight with {other!r}, which is {selected[other]}"
        if reason:
            excluded[name] = reason
        else:
            owners[id(module.weight)] = name
            found.append(PrunableWeight(name, module))
    excluded |= other_weights(model, lambda module: isinstance(module, nn.Linear | _ConvNd), "weights", owners)
    require_candidates(found, type(model).__name__, "linear and convolution layers", excluded)
    return found, excluded


def _why_not(module: nn.Linear | _ConvNd, owners: dict[int, str]) -> str | None:
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "attention uses this layer's weight without calling it"
    return why_fixed(module, owners)


@register_granularity("weight")
class Weights(Granularity[PrunableWeight]):
    """Connections of linear and convolution layers.

    Args:
        model: any module.
        include, exclude: glob patterns over layer names.
        connections: "exact" gives every connection sums of its own; "factored" one sum per input of a layer.

    Raises:
        ValueError: nothing to prune, patterns that match nothing.
    """

    noun = "weights"
    slims_in_fit = False
    options = ("connections",)

    def __init__(
        self, model: nn.Module, include: Patterns, exclude: Patterns, connections: Connections = "factored"
    ) -> None:
        self._layers, self.not_pruned = find_weights(model, include, exclude)
        self._connections = connections
        self._chosen = include is not None

    def fresh(self) -> dict[str, str]:
        """Layers that are all zero among others that are not, unless `include` chose them."""
        zero = [layer.name for layer in self._layers if not bool(layer.weight.any())]
        return {} if self._chosen or len(zero) == len(self._layers) else dict.fromkeys(zero, FRESH)

    def slim(
        self,
        network: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kept: Mapping[str, Tensor],
        copies: Sequence[Copy] = (),
        agree: Agree = unanimous,
    ) -> SlimmingPlan:
        """Remove units without incoming or without outgoing weights; it sees in the weights which are pruned."""
        return remove_dead_units(network, args, kwargs, copies, agree)

    def still_there(self, plan: SlimmingPlan) -> str | None:
        """Why nothing went, or which units without incoming weights stay."""
        weights = [layer.weight.detach() for layer in self._layers]
        zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
        empty = sum(int((weight.flatten(1) == 0).all(1).sum()) for weight in weights)
        if not zeros or (plan.removed and not empty):
            return None
        share = zeros / sum(weight.numel() for weight in weights)
        why = "no unit lost all of its incoming or all of its outgoing weights"
        if empty:
            others = ["layers behind them depend on them, or a layer keeps at least one"]
            reasons = list(dict.fromkeys(plan.pinned.values() or others))
            more = f"; and {len(reasons) - 3} more, in plan.pinned" if len(reasons) > 3 else ""
            why = f"{empty} units without incoming weights stay ({'; '.join(reasons[:3])}{more})"
        return (
            f"{why}: {share:.0%} of the weights are zeros in tensors that keep their size; prune channels "
            '(granularity="channel") for a smaller network'
        )

    def collector(self, num_classes: int, network: str = "") -> ActivationCollector:
        """Sums over the layers' inputs."""
        probes = [Probe(layer.name, layer.module) for layer in self._layers if is_within(layer.name, network)]
        exact = [probe.name for probe in probes] if self._connections == "exact" else ()
        return ActivationCollector(probes, num_classes, exact)

    def _members_of(self, layer: PrunableWeight) -> Members:
        return Members(layer.weight)

    def _per_candidate(self, layer: PrunableWeight, values: Tensor) -> Tensor:
        return values if values.shape == layer.weight.shape else per_connection(layer.module, values)
