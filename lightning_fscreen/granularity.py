"""What a callback prunes: the connections of layers, or the channels of batch norms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_fscreen.candidates import PrunableWeight, find_weights
from lightning_fscreen.channels import Feature, PrunableChannels, find_channels, refine
from lightning_fscreen.collect import ActivationCollector, FeatureStatistics, Probe
from lightning_fscreen.criteria import Ranked
from lightning_fscreen.gradients import GradientStatistics, GradientSums
from lightning_fscreen.masks import Masks
from lightning_fscreen.network import InputRecorder, common_parent, enclosing
from lightning_fscreen.ranking import Scope, rank_and_prune
from lightning_fscreen.slimming import SlimmingPlan, remove_dead_units
from lightning_fscreen.slimming.activations import activations_of
from lightning_fscreen.slimming.capture import Capture
from lightning_fscreen.slimming.gates import capture_training, gates_of
from lightning_fscreen.slimming.plan import join
from lightning_fscreen.surgery import slim_in_fit

Candidate = TypeVar("Candidate", PrunableWeight, PrunableChannels)


class Granularity(ABC, Generic[Candidate]):
    """The candidates of one model.

    Attributes:
        not_pruned: layers that are left alone, and why.
    """

    not_pruned: dict[str, str]
    slims_in_fit: ClassVar[bool]
    """Whether the network can become smaller while it is trained; else when the fit has ended."""

    _candidates: list[Candidate]

    @property
    def names(self) -> list[str]:
        """Layers with candidates, by their names in the model."""
        return [candidate.name for candidate in self._candidates]

    def keep_only(self, names: Collection[str]) -> None:
        """Forget the candidates of all other layers."""
        self._candidates = [candidate for candidate in self._candidates if candidate.name in names]

    def networks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Names and submodules that may be the network, from the outermost to the innermost; see `InputRecorder`."""
        name, _ = common_parent(model, self.names)
        around = enclosing(model, name)
        return around[:-1] if name in self.names and len(around) > 1 else around  # one layer is no network

    @abstractmethod
    def slim(
        self, trainer: Trainer, model: LightningModule, recorder: InputRecorder, kept: Mapping[str, Tensor]
    ) -> SlimmingPlan:
        """Make the network smaller; returns the plan, with names as in the model.

        Raises:
            CaptureError: the network cannot be captured.
            VerificationError: outputs would change.
            NotImplementedError: an optimizer whose state cannot be cut.
            Nothing has changed after an error.
        """

    @abstractmethod
    def masks(self) -> Masks:
        """Fresh masks, by layer."""

    @abstractmethod
    def collector(self, num_classes: int) -> ActivationCollector:
        """Sums over the activations that belong to the candidates."""

    @abstractmethod
    def _parameters(self, candidate: Candidate) -> list[nn.Parameter]:
        """What is ranked, and what is pruned with it, of the same shape."""

    def _per_candidate(self, candidate: Candidate, values: Tensor) -> Tensor:
        """Statistics of features as those of candidates, broadcastable to the shape of what is ranked."""
        return values

    def gradients(self) -> GradientSums:
        """Sums over the gradients of the candidates."""
        return GradientSums({candidate.name: self._parameters(candidate) for candidate in self._candidates})

    def ranked(
        self,
        kept: Mapping[str, Tensor],
        statistics: Mapping[str, FeatureStatistics],
        gradients: Mapping[str, GradientStatistics],
    ) -> dict[str, Ranked]:
        """What a criterion needs to know, by layer: values, statistics of activations, gradients."""
        ranked = {}
        for candidate in self._candidates:
            name = candidate.name
            known: dict[str, Any] = {}
            if found := statistics.get(name):
                features = ("f", "spread", "mean_square", "variance")
                known = {key: self._per_candidate(candidate, getattr(found, key)) for key in features}
                known |= {"degrees": found.degrees, "learned": found.learned}
            if steps := gradients.get(name):
                known |= {"gradient": steps.gradient, "taylor": steps.taylor}
            ranked[name] = Ranked(self._parameters(candidate)[0].detach(), kept[name], **known)
        return ranked

    def meet(self, recorder: InputRecorder) -> None:
        """The network has been called, its inputs are known."""

    def prune(
        self, scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], amount: float, scope: Scope, min_kept: int
    ) -> dict[str, Tensor]:
        """New masks for a budget; see `rank_and_prune`."""
        return rank_and_prune(scores, kept, amount, scope=scope, min_kept=min_kept)

    def after_pruning(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], statistics: Mapping[str, FeatureStatistics]
    ) -> None:
        """Masks have changed."""


class Weights(Granularity[PrunableWeight]):
    """Connections of linear and convolution layers.

    Args:
        model: any module.
        include, exclude: glob patterns over layer names.
        exact: whether every connection gets sums of its own.

    Raises:
        ValueError: nothing to prune, patterns that match nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        include: str | Sequence[str] | None,
        exclude: str | Sequence[str] | None,
        exact: bool = False,
    ) -> None:
        self._candidates, self.not_pruned = find_weights(model, include, exclude)
        self._exact = exact

    slims_in_fit = False

    def slim(
        self, trainer: Trainer, model: LightningModule, recorder: InputRecorder, kept: Mapping[str, Tensor]
    ) -> SlimmingPlan:
        """Remove units without incoming or without outgoing weights."""
        return remove_dead_units(recorder.network, *recorder.inputs_on_device()).under(recorder.name)

    def masks(self) -> Masks:
        """Masks of the weights."""
        return Masks({candidate.name: candidate.weight for candidate in self._candidates})

    def collector(self, num_classes: int) -> ActivationCollector:
        """Sums over the layers' inputs."""
        probes = [Probe(candidate.name, candidate.module) for candidate in self._candidates]
        return ActivationCollector(probes, num_classes, self._candidates if self._exact else ())

    def _parameters(self, candidate: PrunableWeight) -> list[nn.Parameter]:
        return [candidate.weight]

    def _per_candidate(self, candidate: PrunableWeight, values: Tensor) -> Tensor:
        return values if values.shape == candidate.weight.shape else candidate.per_connection(values)


class Channels(Granularity[PrunableChannels]):
    """Channels of batch norms.

    Args:
        model: any module.
        include, exclude: glob patterns over names of batch norms.
        bias: what pruned channels put out: "zero", "fold" (their shift), "mean" (their mean activation).
        feature: what is taken of their activations, of `channels.FEATURES`.

    Raises:
        ValueError: no batch norm, patterns that match nothing.
    """

    captured: Capture | None = None

    def __init__(
        self,
        model: nn.Module,
        include: str | Sequence[str] | None,
        exclude: str | Sequence[str] | None,
        bias: str = "zero",
        feature: Feature = "activation",
    ) -> None:
        self._candidates, self.not_pruned = find_channels(model, include, exclude)
        self._bias, self._feature = bias, feature

    slims_in_fit = True

    def slim(
        self, trainer: Trainer, model: LightningModule, recorder: InputRecorder, kept: Mapping[str, Tensor]
    ) -> SlimmingPlan:
        """Remove the channels that are not kept, and all that only they need; optimizers and strategy go along."""
        assert self.captured is not None
        bias = "zero" if self._bias == "zero" else "fold"
        return slim_in_fit(trainer, model, recorder, self.captured, kept, bias)

    def meet(self, recorder: InputRecorder) -> None:
        """Capture the network: which batch norms are coupled, which cannot be pruned.

        Raises:
            CaptureError: the network cannot be captured.
            ValueError: no batch norm is left that can be pruned; lists the reasons.
        """
        args, kwargs = recorder.inputs_on_device()
        self.captured = capture_training(recorder.network, args, kwargs)
        gates = {join(recorder.name, gate.name): gate for gate in gates_of(recorder.network, self.captured)}
        activations = {join(recorder.name, name): found for name, found in activations_of(self.captured).items()}
        self._candidates, excluded = refine(self._candidates, gates, activations)
        self.not_pruned |= excluded
        if not self._candidates:
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.not_pruned.items())
            raise ValueError(
                f"nothing to prune in {recorder.describe()}: none of its batch norms can be:{reasons}\n"
                'Check include=/exclude= and requires_grad, or use granularity="weight".'
            )

    def masks(self) -> Masks:
        """Masks of the scales γ; the shifts β go with them where pruned channels are to be silent."""
        scales = {candidate.name: candidate.scale for candidate in self._candidates}
        shifts = {candidate.name: candidate.shift for candidate in self._candidates} if self._bias == "zero" else {}
        return Masks(scales, shifts)

    def collector(self, num_classes: int) -> ActivationCollector:
        """Sums over the batch norms' activations."""
        return ActivationCollector([candidate.probe(self._feature) for candidate in self._candidates], num_classes)

    def _parameters(self, candidate: PrunableChannels) -> list[nn.Parameter]:
        return [candidate.scale, candidate.shift]

    def prune(
        self, scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], amount: float, scope: Scope, min_kept: int
    ) -> dict[str, Tensor]:
        """Coupled channels go together."""
        units = {candidate.name: candidate.units.to(kept[candidate.name].device) for candidate in self._candidates}
        return rank_and_prune(scores, kept, amount, scope=scope, min_kept=min_kept, units=units)

    @torch.no_grad()
    def after_pruning(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], statistics: Mapping[str, FeatureStatistics]
    ) -> None:
        """Let what was pruned just now put out its mean activation, if that is wanted."""
        if self._bias == "mean":
            for candidate in self._candidates:
                if candidate.name in statistics:
                    gone = before[candidate.name] & ~after[candidate.name]
                    candidate.put_out(statistics[candidate.name].mean, gone)
