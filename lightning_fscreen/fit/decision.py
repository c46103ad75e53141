"""From the statistics of an epoch to new masks: scores by the criterion, then the budget, then zeros."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_fscreen.candidates.granularity import Granularity
from lightning_fscreen.fit.masks import Masks, num_true
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.fit.spending import Spending
from lightning_fscreen.ranking.amounts import parts
from lightning_fscreen.ranking.budgeted import rank_and_prune
from lightning_fscreen.ranking.criteria import Explained, ScoringContext
from lightning_fscreen.statistics.gradients import GradientStatistics
from lightning_fscreen.statistics.probes import FeatureStatistics

log = logging.getLogger(__name__)

FindIdle = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Masks by layer → which of their candidates do nothing then, by layer, of those that are understood."""


class Decision:
    """Decides which candidates are pruned next, and prunes them.

    Args:
        settings: the callback's arguments.
        granularity: the candidates.
        masks: their masks until now.
        spending: what the budget counts.
        statistics: of activations, by layer.
        gradients: by layer.
        unmatched: layers without statistics of activations because they ran on other numbers of instances than there
            are labels; on which.
        errors: of units, by layer, as of `ScoringInputs`.
        find_idle: finds candidates that do nothing; None if there can be none.
        last: what was explained at the last ranking, by layer.

    Attributes:
        explained: why layers are ranked as they are; empty if the criterion does not say.
    """

    def __init__(
        self,
        settings: Settings,
        granularity: Granularity[Any],
        masks: Masks,
        spending: Spending,
        statistics: Mapping[str, FeatureStatistics],
        gradients: Mapping[str, GradientStatistics],
        unmatched: Mapping[str, str],
        errors: Mapping[str, Tensor] | None = None,
        find_idle: FindIdle | None = None,
        last: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._settings, self._granularity, self._masks, self._statistics = settings, granularity, masks, statistics
        self._spending = spending
        idle_first = settings.resolved_criterion.idle_first(settings.screening_weight)
        self._find_idle = find_idle if idle_first else None
        inputs = granularity.scoring_inputs(masks.present, statistics, gradients)
        inputs |= {name: replace(inputs[name], unmatched=why) for name, why in unmatched.items() if name in inputs}
        inputs |= {name: replace(inputs[name], error=own) for name, own in (errors or {}).items() if name in inputs}
        inputs = {name: replace(own, last=(last or {}).get(name)) for name, own in inputs.items()}
        context, explain = ScoringContext(inputs, settings.screening_weight), settings.resolved_criterion.explain
        self.explained: Mapping[str, Explained] = {} if explain is None else explain(context)
        self._context = replace(context, explained=self.explained)

    def new_masks(self, fraction: float, seed: int) -> dict[str, Tensor]:
        """Masks, at the present size, that prune the lowest-ranked candidates.

        Where that would leave some that do nothing, those go first, until there are no more.

        Args:
            fraction: of the candidates at full size, or of the cost of the network, that is pruned then.
            seed: for criteria that draw.

        Raises:
            ValueError: NaN scores; a budget that the floors make impossible.
        """
        scores = self.scores(fraction, seed)
        if fraction and not self._masks.num_pruned and self._all_alike(scores):
            log.warning(
                "all scores are equal, so nothing tells the %s apart, and every layer loses its first ones: scales are "
                'all 1 before training, and stay so with precision="bf16-true", which rounds small steps to nothing',
                self._granularity.noun,
            )
        masks = self._lowest_pruned(scores, fraction)
        if self._find_idle is None:
            return masks
        idle: dict[str, Tensor] = {}
        while True:
            found = {name: own & masks[name] for name, own in self._find_idle(masks).items() if name in masks}
            new = {name: own & ~idle[name] if name in idle else own for name, own in found.items()}
            left, nothing, more = (sum(num_true(each).values()) for each in (masks, found, new))
            if not more or nothing == left:  # where all paths are cut, nothing tells them apart
                return masks
            idle = {name: own | idle[name] if name in idle else own for name, own in found.items()}
            masks = self._lowest_pruned(_first(idle, scores, list(masks)), fraction)

    def _all_alike(self, scores: Mapping[str, Tensor]) -> bool:
        """Whether there are several candidates left, all with the same score."""
        lowest, highest, left = torch.inf, -torch.inf, 0
        for name, mask in self._masks.present.items():
            own = scores[name][mask]
            if own.numel():
                lowest, highest, left = min(lowest, float(own.min())), max(highest, float(own.max())), left + len(own)
            if lowest < highest:
                return False
        return left > 1

    def _lowest_pruned(self, scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
        settings = self._settings
        if (masks := self._spending.prune(scores, self._masks, fraction)) is not None:
            return masks
        masks = dict(self._masks.present)
        whole, units = self._spending.amount(self._masks), self._granularity.units()
        for amount, layers in parts(settings.amount, list(self._masks.kept)).values():
            own = fraction if amount == whole else amount * fraction / whole
            ranked = [name for name in masks if name in layers]
            masks |= rank_and_prune(
                {name: scores[name] for name in ranked},
                {name: masks[name] for name in ranked},
                self._present_fraction(own, layers),
                scope=settings.scope,
                min_kept=settings.min_channels,
                units=None if units is None else {name: units[name] for name in ranked},
                kinds=self._granularity.kinds(),
                blocks=self._spending.blocks(),
            )
        return masks

    def scores(self, fraction: float, seed: int) -> Mapping[str, Tensor]:
        """Layer → scores of its candidates, by which `new_masks` ranks them; arguments as there."""
        context = replace(
            self._context, generator=torch.Generator().manual_seed(seed), progress=self._progress(fraction)
        )
        return self._settings.resolved_criterion.score(context)

    def _progress(self, fraction: float) -> float:
        """Share of the amount that is pruned already; 1 if this pruning is the last."""
        amount = self._spending.amount(self._masks)
        if fraction >= amount:
            return 1.0
        total = self._spending.total(self._masks)
        left = total - self._spending.pruned(self._masks)
        return min(1 - left / total, fraction) / amount

    def carry_out(self, kept: Mapping[str, Tensor], optimizers: Iterable[Optimizer], hold: bool) -> None:
        """Replace the masks, and zero the pruned values.

        Args:
            kept: layer → mask at the present size, from `new_masks`.
            optimizers: the optimizers, in whose state pruned values are zeroed, too.
            hold: whether pruned values stay at zero; otherwise they can grow again.
        """
        if not hold:
            self._masks.zero_once(kept)
            return
        before = self._masks.present
        self._masks.set(kept, optimizers)
        pruned = {name: before[name] & ~mask for name, mask in self._masks.present.items()}
        self._granularity.after_pruning(pruned, self._statistics)

    def _present_fraction(self, fraction: float, layers: Sequence[str]) -> float:
        """The fraction of the candidates of some layers that remain after other callbacks' slimming."""
        both = self._masks.kept, self._masks.present
        total, left = (sum(masks[name].numel() for name in layers if name in masks) for masks in both)
        if left == total:
            return fraction
        gone = total - left  # physically
        return min(max((fraction * total - gone) / left, 0.0), 1.0)


def _first(idle: Mapping[str, Tensor], scores: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """Scores by which idle candidates go before all others, from the first of these layers to the last."""
    finite = [own[own.isfinite()] for own in scores.values()]
    start = min((float(own.min()) for own in finite if own.numel()), default=0.0)
    start -= sum(scores[name].numel() for name in layers) + 1
    ranked = dict(scores)
    for name in layers:
        own = scores[name]
        if name in idle:
            own = own.to(torch.promote_types(own.dtype, torch.float32))  # the largest half is less than many numbers
            places = torch.arange(own.numel(), dtype=own.dtype, device=own.device).view(own.shape)
            ranked[name] = torch.where(idle[name], start + places, own)
        start += own.numel()
    return ranked
