"""What a budget counts: candidates, or parameters, multiply–adds or latency of the network that they leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_fscreen.candidates.granularity import Granularity
from lightning_fscreen.costs.timings import Timings
from lightning_fscreen.fit.masks import Masks
from lightning_fscreen.fit.report import LatencyReport, Record
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.ranking.amounts import check_patterns, overall, parts
from lightning_fscreen.ranking.budgeted import check_floors
from lightning_fscreen.ranking.multiples import Blocks, check_rounding, in_multiples
from lightning_fscreen.ranking.per_cost import Costs, check_target, prune_to_cost
from lightning_fscreen.ranking.units import Units


class Holder(Protocol):
    """Knows the candidates."""

    @property
    def granularity(self) -> Granularity[Any]:
        """They may become fewer."""
        ...


class Spending:
    """The total that a budget divides, and how much of it is pruned.

    Args:
        settings: the callback's arguments.
        found: the candidates.
        record: the measured sizes before and now.
        timings: of operations, for a budget of latency.
        asked: what is asked of the sum of all operations, if another amount of the latency goes by that; None if it is
            not known.

    Attributes:
        asked: as given; may be changed.
    """

    def __init__(
        self,
        settings: Settings,
        found: Holder,
        record: Record,
        timings: Timings | None = None,
        asked: float | None = None,
    ) -> None:
        self._settings, self._found, self._record, self._timings = settings, found, record, timings
        self.asked = None if timings is None else asked  # a fit may go on under another budget
        self._known: tuple[object, Costs | None] = (None, None)
        self._known_blocks: tuple[object, Blocks | None] = (None, None)

    def total(self, masks: Masks) -> int:
        """What the whole network counts; its parameters, until its multiply–adds are known."""
        if self._settings.budget == "candidates":
            return masks.total
        dense = self._dense
        return self._record.before.params if dense is None else dense

    def amount(self, masks: Masks) -> float:
        """Fraction of the total that is pruned in the end."""
        return overall(self._settings.amount, {name: mask.numel() for name, mask in masks.kept.items()})

    def pruned(self, masks: Masks) -> int:
        """What of it is pruned."""
        if self._settings.budget == "candidates":
            return masks.num_pruned
        if (dense := self._dense) is None:
            return 0
        present: int | None = getattr(self._record.after, self._settings.budget)
        kept = masks.present if masks.held else masks.kept
        if present is None or all(bool(mask.all()) for mask in kept.values()):
            return dense - (present or dense)
        costs = self.costs()
        return dense - (present if costs is None else round(costs.of(kept)))

    def latency(self, masks: Masks) -> LatencyReport | None:
        """Measured time of the whole network, if that is what the budget counts and it is known."""
        before, after = (size.latency and size.latency / 1e6 for size in (self._record.before, self._record.after))
        if self._timings is None or before is None or after is None:
            return None
        target = (1 - self.amount(masks)) * before
        return LatencyReport(str(self._timings.device), self._timings.batch_size, before, after, target)

    def check(self, masks: Masks) -> None:
        """Check, once the candidates are final, that the floors leave enough to prune.

        Raises:
            ValueError: they do not; says how much can go. No layer has enough units for a multiple.
        """
        settings, blocks = self._settings, self.blocks()
        units = self._granularity.units()
        if units is not None:
            check_rounding(units, blocks)
        if settings.budget == "candidates":
            totals = {name: mask.numel() for name, mask in masks.kept.items()}
            check_patterns(settings.amount, list(totals), units)
            for amount, layers in parts(settings.amount, list(totals)).values():
                check_floors({name: totals[name] for name in layers}, amount, settings.min_channels, units, blocks)
            return
        costs, dense = self.costs(), self._dense
        if costs is not None and dense is not None and units is not None:
            full = {name: torch.ones_like(mask) for name, mask in masks.present.items()}
            amount = self.amount(masks)
            if self._timings is not None:  # whether so much can go is measured later
                amount = max(min(amount, self.most(masks)), 0.0)
            target = (1 - amount) * dense
            try:
                check_target(full, costs, target, dense, units, settings.min_channels, blocks)
            except ValueError as error:
                if settings.silences:
                    raise
                raise ValueError(
                    f'{error}; if units stay because of their constants, bias="zero" lets them go'
                ) from error

    def most(self, masks: Masks) -> float:
        """The fraction of the total that goes if every layer keeps only as much as it has to."""
        kept = {name: mask.cpu() for name, mask in masks.present.items()}
        units = {name: own.cpu() for name, own in (self._granularity.units() or {}).items()}
        scores = {name: torch.zeros(mask.shape) for name, mask in kept.items()}
        units = dict(in_multiples(scores, kept, units, self.blocks()))
        least = Units(scores, kept, units, self._settings.min_channels).least()
        costs, dense = self.costs(), self._dense
        if costs is not None and dense is not None:
            return 1 - costs.of(least) / dense
        return 1 - sum(int(mask.count_nonzero()) for mask in least.values()) / masks.total

    def prune(self, scores: Mapping[str, Tensor], masks: Masks, fraction: float) -> dict[str, Tensor] | None:
        """New masks, at the present size, with which a fraction of the cost is gone; None if candidates are counted.

        Raises:
            ValueError: as `prune_to_cost`.
        """
        costs, dense, units = self.costs(afresh=True), self._dense, self._granularity.units()
        if costs is None or dense is None or units is None:
            return None
        settings, amount = self._settings, self.amount(masks)
        if self.asked is not None:
            fraction = self.asked if fraction == amount else fraction * self.asked / amount
        return prune_to_cost(
            scores,
            masks.present,
            costs,
            (1 - fraction) * dense,
            dense,
            units=units,
            scope=settings.scope,
            min_kept=settings.min_channels,
            kinds=self._granularity.kinds(),
            blocks=self.blocks(),
            additive=settings.resolved_criterion.needs_errors,
        )

    def costs(self, afresh: bool = False) -> Costs | None:
        """What masks cost; None if candidates are counted, or nothing is known of the network.

        Args:
            afresh: ask again where they depend on the weights, by constants that have to be carried.
        """
        if self._settings.budget == "candidates":
            return None
        key = self._granularity, tuple(self._granularity.names), self._record.after
        if key != self._known[0] or (afresh and not self._settings.silences):
            self._known = key, self._granularity.costs(self._record.after, self._settings.budget, self._timings)
            if self._timings is not None:
                self._timings.keep()
        return self._known[1]

    def blocks(self) -> Blocks | None:
        """Units of which whole multiples are left; None if any number can be."""
        key = self._granularity, tuple(self._granularity.names), self._record.after
        if key != self._known_blocks[0]:
            self._known_blocks = key, self._granularity.blocks()
        return self._known_blocks[1]

    @property
    def _granularity(self) -> Granularity[Any]:
        return self._found.granularity

    @property
    def _dense(self) -> int | None:
        if self._settings.budget == "candidates":
            return None
        dense: int | None = getattr(self._record.before, self._settings.budget)
        return dense
