"""The interface of a granularity, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor, nn

from lightning_fscreen.candidates.costs import Currency
from lightning_fscreen.candidates.regression import Regression
from lightning_fscreen.costs.size import Size
from lightning_fscreen.costs.timings import Timings
from lightning_fscreen.members import Members
from lightning_fscreen.ranking.criteria import ScoringInputs
from lightning_fscreen.ranking.multiples import Blocks
from lightning_fscreen.ranking.per_cost import Costs
from lightning_fscreen.slimming import SlimmingPlan
from lightning_fscreen.slimming.apply import Agree, unanimous
from lightning_fscreen.slimming.copies import Copy
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.gradients import GradientStatistics, GradientSums
from lightning_fscreen.statistics.probes import FeatureStatistics

Patterns = str | Sequence[str] | None


class Named(Protocol):
    """A layer that has candidates."""

    @property
    def name(self) -> str:
        """Its name in the model."""
        ...

    @property
    def module(self) -> nn.Module:
        """The layer."""
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


def require_candidates(found: Sequence[object], where: str, layers: str, reasons: Mapping[str, str]) -> None:
    """Check that there is something to prune.

    Args:
        found: the layers that can be pruned.
        where: how the model is called in the message.
        layers: how such layers are called.
        reasons: layer → why it cannot be pruned.

    Raises:
        ValueError: there is nothing; lists the reasons.
    """
    if not found:
        listing = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        why = f"none of its {layers} can be pruned:{listing}" if reasons else f"it has no {layers}"
        raise ValueError(
            f"nothing to prune in {where}: {why}\n"
            "Check include=/exclude=, requires_grad (of a fit in which layers are frozen at first, let start_epoch be "
            "later), and that the layers are attributes of the module. "
            'granularity="channel" prunes batch norms, "unit" linear and convolution layers, too, "weight" connections.'
        )


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
    has_costs: ClassVar[bool] = False
    """Whether a budget can count what candidates cost."""
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

    @property
    def modules(self) -> list[nn.Module]:
        """These layers."""
        return [layer.module for layer in self._layers]

    def keep_only(self, names: Collection[str], reasons: Mapping[str, str] | None = None) -> None:
        """Forget the candidates of all other layers; `reasons` says why."""
        self._layers = [layer for layer in self._layers if layer.name in names]
        self.not_pruned |= reasons or {}

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Leave layers alone, and say why.

        Raises:
            ValueError: nothing is left to prune; lists the reasons.
        """
        if reasons:
            self.keep_only([name for name in self.names if name not in reasons], reasons)
            require_candidates(self._layers, "the model", "layers", self.not_pruned)

    def structure(self) -> dict[str, Any]:
        """What `learn` has found beside what the model shows by itself, as primitives."""
        return {}

    def restore(self, structure: Mapping[str, Any]) -> None:
        """Go on with what `structure` gave."""
        return

    def fresh(self) -> dict[str, str]:
        """Layers that had better be left alone in a fit that begins now, and why."""
        return {}

    def learn(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = ""
    ) -> Collection[str]:
        """Learn from a network and its inputs which of its candidates can be pruned, and which together.

        Args:
            network: a module that the training step calls as a whole; there may be several.
            args: inputs of its forward.
            kwargs: keyword inputs of its forward.
            name: its name in the model.

        Returns:
            The layers inside it that it does not use, so that nothing was learned of them.
        """
        return ()

    def forget(self, name: str) -> None:
        """Forget what was learned from the network of that name."""
        return

    @abstractmethod
    def slim(
        self,
        network: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kept: Mapping[str, Tensor],
        copies: Sequence[Copy] = (),
        agree: Agree = unanimous,
    ) -> SlimmingPlan:
        """Make the network smaller, in place; its eval-mode outputs stay the same.

        Args:
            network: a network that `learn` got.
            args: inputs of its forward.
            kwargs: keyword inputs of its forward.
            kept: layer, by its name in the network → mask of its candidates, True where kept.
            copies: copies of the network that become smaller with it; they have its values where it is pruned.
            agree: is called with the plan once it has been carried out, and undoes it by raising.

        Returns:
            The plan, with names as in the network.

        Raises:
            CaptureError: the network cannot be captured.
            VerificationError: outputs would change.
            Nothing has changed after an error.
        """

    def still_there(self, plan: SlimmingPlan) -> str | None:
        """What was pruned but stays physically after slimming, and why; None if everything went.

        Args:
            plan: that was applied, with names as in the model.
        """
        return None

    @abstractmethod
    def _members_of(self, layer: Layer) -> Members:
        """The parameters whose entries belong to the candidates of a layer."""

    def _values_of(self, layer: Layer) -> Tensor:
        """The values that are ranked by magnitude, one for each candidate: the entries of the weight, if it has one."""
        return self._members_of(layer).weight.detach()

    def _per_candidate(self, layer: Layer, values: Tensor) -> Tensor:
        """Statistics of features as those of candidates, broadcastable to the shape of their mask."""
        return values

    def members(self) -> dict[str, Members]:
        """The parameters whose entries belong to the candidates, by layer."""
        return {layer.name: self._members_of(layer) for layer in self._layers}

    def units(self) -> dict[str, Tensor] | None:
        """Candidates that are pruned together, as for `rank_and_prune`; None if each goes alone."""
        return None

    def blocks(self) -> Blocks | None:
        """Units of which whole multiples are left, as for `rank_and_prune`; None if any number can be."""
        return None

    def not_rounded(self, kept: Mapping[str, Tensor]) -> dict[str, str]:
        """Layers with widths that would be no multiples although they can be pruned, and why; layer → its mask."""
        return {}

    def kinds(self) -> dict[str, str]:
        """The kind of candidates that each layer has, for `scope="kind"`."""
        return dict.fromkeys(self.names, self.noun)

    def costs(self, present: Size, currency: Currency, timings: Timings | None = None) -> Costs | None:
        """What masks cost; None if candidates are counted, or it is not known yet.

        Args:
            present: the measured size of all networks, as they are.
            currency: what is counted.
            timings: for "latency".
        """
        return None

    @abstractmethod
    def collector(self, num_classes: int, network: str = "") -> ActivationCollector:
        """Sums over the activations that belong to the candidates inside the network of that name."""

    def gradients(self) -> GradientSums:
        """Sums over the gradients of the candidates."""
        return GradientSums(self.members())

    def regression(self) -> Regression | None:
        """What predicts candidates from each other; None if nothing does."""
        return None

    def scoring_inputs(
        self,
        kept: Mapping[str, Tensor],
        statistics: Mapping[str, FeatureStatistics],
        gradients: Mapping[str, GradientStatistics],
    ) -> dict[str, ScoringInputs]:
        """Inputs of the criterion by layer: values, statistics of activations, gradients."""
        inputs = {}
        for layer in self._layers:
            name = layer.name
            values = self._values_of(layer)
            device = values.device  # when a fit ends, Lightning moves the model to the CPU, but not the statistics
            known: dict[str, Any] = {}
            if found := statistics.get(name):
                features = ("f", "spread", "mean_square", "variance", "shared", "learned")
                known = {key: self._per_candidate(layer, getattr(found, key).to(device)) for key in features}
                known["degrees"] = found.degrees
            if steps := gradients.get(name):
                known |= {"gradient": steps.gradient.to(device), "taylor": steps.taylor.to(device)}
            inputs[name] = ScoringInputs(values, kept[name], **known)
        return inputs

    def after_pruning(self, pruned: Mapping[str, Tensor], statistics: Mapping[str, FeatureStatistics]) -> None:
        """Adapt the other parameters to candidates that have just been zeroed.

        Args:
            pruned: layer → mask of these candidates.
            statistics: of the epoch, by layer.
        """
        return
