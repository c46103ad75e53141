"""The granularities of pruning: the connections of layers, or the channels of batch norms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_fscreen.candidates.channels import Feature, PrunableChannels, find_channels, refine
from lightning_fscreen.candidates.weights import PrunableWeight, find_weights, require_candidates
from lightning_fscreen.ranking.criteria import Ranked
from lightning_fscreen.slimming import SlimmingPlan, remove_dead_units
from lightning_fscreen.slimming.activations import activations_of
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.gates import capture_training, gates_of
from lightning_fscreen.slimming.plan import join
from lightning_fscreen.slimming.slim import slim_captured
from lightning_fscreen.statistics.collector import ActivationCollector, FeatureStatistics, Probe
from lightning_fscreen.statistics.gradients import GradientStatistics, GradientSums

Patterns = str | Sequence[str] | None


class Named(Protocol):
    """A layer that has candidates."""

    @property
    def name(self) -> str:
        """Its name in the model."""
        ...


Layer = TypeVar("Layer", bound=Named)
Kind = TypeVar("Kind", bound="type[Granularity[Any]]")

GRANULARITIES: dict[str, type[Granularity[Any]]] = {}


def register_granularity(name: str) -> Callable[[Kind], Kind]:
    """Decorator that makes a subclass of `Granularity` available as `granularity=name`.

    Raises:
        ValueError: the name is taken.
    """

    def register(kind: Kind) -> Kind:
        if name in GRANULARITIES:
            raise ValueError(f"a granularity named {name!r} is registered already; choose another name")
        GRANULARITIES[name] = kind
        return kind

    return register


class Granularity(ABC, Generic[Layer]):
    """The candidates of one model: how they are found, ranked and removed. It knows networks, but no Trainer.

    Args:
        model: any module.
        include, exclude: glob patterns over layer names.
        options: the arguments of the callback that `options` names.

    Attributes:
        not_pruned: layers that are left alone, and why.

    Raises:
        ValueError: nothing to prune, patterns that match nothing.
    """

    noun: ClassVar[str]
    """How several candidates are called, for tables and metrics."""
    slims_in_fit: ClassVar[bool]
    """Whether `learn` has to be called before anything is pruned, and the network then becomes smaller in the middle of
    the fit; else it does when the fit has ended."""
    options: ClassVar[tuple[str, ...]] = ()
    """Arguments of the callback that are for this granularity alone or for some of them."""
    not_pruned: dict[str, str]
    _layers: list[Layer]

    @abstractmethod
    def __init__(self, model: nn.Module, include: Patterns, exclude: Patterns, **options: Any) -> None: ...

    @property
    def names(self) -> list[str]:
        """Layers with candidates, by their names in the model."""
        return [layer.name for layer in self._layers]

    def keep_only(self, names: Collection[str]) -> None:
        """Forget the candidates of all other layers."""
        self._layers = [layer for layer in self._layers if layer.name in names]

    def learn(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "") -> None:
        """Learn from the network and its inputs which of the candidates can be pruned, and which together.

        Args:
            network: the module that the training step calls.
            args: inputs of its forward.
            kwargs: keyword inputs of its forward.
            name: its name in the model.
        """
        return

    @abstractmethod
    def slim(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kept: Mapping[str, Tensor]
    ) -> SlimmingPlan:
        """Make the network smaller, in place; its eval-mode outputs stay the same.

        Args:
            network: the network that `learn` got.
            args: inputs of its forward.
            kwargs: keyword inputs of its forward.
            kept: layer, by its name in the network → mask of its candidates, True where kept.

        Returns:
            The plan, with names as in the network.

        Raises:
            CaptureError: the network cannot be captured.
            VerificationError: outputs would change.
            Nothing has changed after an error.
        """

    @abstractmethod
    def _parameters_of(self, layer: Layer) -> list[nn.Parameter]:
        """The parameter that is ranked, and others of the same shape whose gradients count with it."""

    def _per_candidate(self, layer: Layer, values: Tensor) -> Tensor:
        """Statistics of features as those of candidates, broadcastable to the shape of the ranked parameter."""
        return values

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are ranked and masked, by layer; each of their values is a candidate."""
        return {layer.name: self._parameters_of(layer)[0] for layer in self._layers}

    def companions(self) -> dict[str, nn.Parameter]:
        """Parameters of the same shape that are zeroed with them."""
        return {}

    def units(self) -> dict[str, Tensor] | None:
        """Candidates that are pruned together, as for `rank_and_prune`; None if each goes alone."""
        return None

    @abstractmethod
    def collector(self, num_classes: int) -> ActivationCollector:
        """Sums over the activations that belong to the candidates."""

    def gradients(self) -> GradientSums:
        """Sums over the gradients of the candidates."""
        return GradientSums({layer.name: self._parameters_of(layer) for layer in self._layers})

    def ranked(
        self,
        kept: Mapping[str, Tensor],
        statistics: Mapping[str, FeatureStatistics],
        gradients: Mapping[str, GradientStatistics],
    ) -> dict[str, Ranked]:
        """Inputs of the criterion by layer: values, statistics of activations, gradients."""
        ranked = {}
        for layer in self._layers:
            name = layer.name
            known: dict[str, Any] = {}
            if found := statistics.get(name):
                features = ("f", "spread", "mean_square", "variance")
                known = {key: self._per_candidate(layer, getattr(found, key)) for key in features}
                known |= {"degrees": found.degrees, "learned": found.learned}
            if steps := gradients.get(name):
                known |= {"gradient": steps.gradient, "taylor": steps.taylor}
            ranked[name] = Ranked(self._parameters_of(layer)[0].detach(), kept[name], **known)
        return ranked

    def after_pruning(self, pruned: Mapping[str, Tensor], statistics: Mapping[str, FeatureStatistics]) -> None:
        """Adapt the other parameters to candidates that have just been zeroed.

        Args:
            pruned: layer → mask of these candidates.
            statistics: of the epoch, by layer.
        """
        return


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
    _captured: Capture | None = None
    _name = ""

    def __init__(
        self,
        model: nn.Module,
        include: Patterns,
        exclude: Patterns,
        bias: str = "zero",
        feature: Feature = "activation",
    ) -> None:
        self._layers, self.not_pruned = find_channels(model, include, exclude)
        self._bias, self._feature = bias, feature

    def learn(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "") -> None:
        """Capture the network: which batch norms are coupled, which cannot be pruned.

        Raises:
            CaptureError: the network cannot be captured.
            ValueError: none of the batch norms can be pruned; lists the reasons.
        """
        self._captured = captured = capture_training(network, args, kwargs)
        gates = {join(name, gate.name): gate for gate in gates_of(network, captured)}
        activations = {join(name, layer): found for layer, found in activations_of(captured).items()}
        self._layers, excluded = refine(self._layers, gates, activations)
        self.not_pruned |= excluded
        where = f"module {name!r}" if name else f"{type(network).__name__}.forward"
        require_candidates(self._layers, where, "batch norms", self.not_pruned)

    def slim(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kept: Mapping[str, Tensor]
    ) -> SlimmingPlan:
        """Remove the channels that are not kept, and all that only they need."""
        assert self._captured is not None
        return slim_captured(
            network, self._captured, kept, args, kwargs, bias="zero" if self._bias == "zero" else "fold"
        )

    def companions(self) -> dict[str, nn.Parameter]:
        """The shifts β, where the output of pruned channels is to be zero."""
        return {layer.name: layer.shift for layer in self._layers} if self._bias == "zero" else {}

    def units(self) -> dict[str, Tensor] | None:
        """Coupled channels."""
        return {layer.name: layer.units.to(layer.scale.device) for layer in self._layers}

    def collector(self, num_classes: int) -> ActivationCollector:
        """Sums over the batch norms' activations."""
        return ActivationCollector([layer.probe(self._feature) for layer in self._layers], num_classes)

    def _parameters_of(self, layer: PrunableChannels) -> list[nn.Parameter]:
        return [layer.scale, layer.shift]

    @torch.no_grad()
    def after_pruning(self, pruned: Mapping[str, Tensor], statistics: Mapping[str, FeatureStatistics]) -> None:
        """Set the shifts of pruned channels so that their output is their mean activation, for `bias="mean"`."""
        if self._bias == "mean":
            for layer in self._layers:
                if layer.name in statistics:
                    layer.set_output(statistics[layer.name].mean, pruned[layer.name])


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

    def __init__(self, model: nn.Module, include: Patterns, exclude: Patterns, connections: str = "factored") -> None:
        self._layers, self.not_pruned = find_weights(model, include, exclude)
        self._connections = connections

    def slim(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kept: Mapping[str, Tensor]
    ) -> SlimmingPlan:
        """Remove units without incoming or without outgoing weights; it sees in the weights which are pruned."""
        return remove_dead_units(network, args, kwargs)

    def collector(self, num_classes: int) -> ActivationCollector:
        """Sums over the layers' inputs."""
        probes = [Probe(layer.name, layer.module) for layer in self._layers]
        return ActivationCollector(probes, num_classes, self._layers if self._connections == "exact" else ())

    def _parameters_of(self, layer: PrunableWeight) -> list[nn.Parameter]:
        return [layer.weight]

    def _per_candidate(self, layer: PrunableWeight, values: Tensor) -> Tensor:
        return values if values.shape == layer.weight.shape else layer.per_connection(values)
