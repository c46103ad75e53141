"""From scores to masks under a budget of parameters or multiply–adds: what is worth least for its cost goes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_fscreen.ranking.budgeted import Scope, ranked_together
from lightning_fscreen.ranking.multiples import Blocks, in_multiples, least_kept, queues_of
from lightning_fscreen.ranking.units import Units

TOLERANCE = 0.01
"""Share of the dense cost by which a budget may be missed, where units are too large to meet it."""
_CLOSE = TOLERANCE / 20  # near enough to look no further
_CONVEXITY = 4
"""How much more a unit is worth if less is left of its layer; see `shares`."""
_STAGES = 8
_TRIES = 12


class Costs(Protocol):
    """What masks cost."""

    def of(self, kept: Mapping[str, Tensor]) -> float:
        """Cost of what is left; layer → (n,) bool."""
        ...

    def priced(self, kept: Mapping[str, Tensor]) -> tuple[float, Mapping[str, Tensor], Tensor]:
        """The same, layer → (n,) float64, what each candidate costs beside those that are kept, and `streams`.

        The last, (streams,), is what the channel of a stream costs that goes when none of its readers is left.
        """
        ...

    def streams(self, units: Mapping[str, Tensor]) -> Tensor:
        """(2, pairs) int64: channels of streams and the units that read them; layer → (n,), the unit of each candidate.

        Those that do not go together are left out.
        """
        ...


def prune_to_cost(
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    costs: Costs,
    target: float,
    dense: float,
    *,
    units: Mapping[str, Tensor],
    scope: Scope = "global",
    min_kept: int = 1,
    kinds: Mapping[str, str] | None = None,
    blocks: Blocks | None = None,
    additive: bool = False,
) -> dict[str, Tensor]:
    """Prune the units that are worth least for their cost, until a cost is met; those pruned before stay pruned.

    A unit goes while its worth divided by its price is at most λ. Its worth is its share R² / Σ R² of its layer,
    divided by the fifth power of the share that is left when all that rank lower are gone (of coupled candidates: the
    sum of both): scores of different layers need not compare, and the less is left of a layer, the more each unit is
    worth, so that layers are narrowed nearly alike, expensive ones a little more. (With the first power expensive
    layers became bottlenecks, see `tests/benchmarks/equal_cost.py`.) Its price, what the network costs more with it
    than without, is a product with the widths of its neighbours, and becomes less as they do: eight times on the way
    prices are computed afresh, and an equal part of the cost that is still too much goes. In the last of these stages λ
    is found by bisection on the exact cost. The best `min_kept` units of a layer stay.

    A channel of a stream goes when nothing reads it any more. So the units that read it also count as one, worth what
    they are worth together, at the price of all of them and the channel; each goes by this, or by itself, whichever is
    lower.

    Args:
        scores: layer → (n,); higher is more important, +inf the most. If some are negative, the lowest counts as zero.
        kept: layer → (n,) bool.
        costs: what masks cost.
        target: cost to be met, as nearly as the units' sizes allow.
        dense: cost of the whole network, for the tolerance.
        units: layer → (n,) int64: equal numbers, in one layer or in several, are pruned as one, and negative ones stay.
        scope: "global" ranks all units by worth / price. "layer" and "kind" prune the same fraction of every layer
            (coupled ones count as one), or of every kind: the one that meets the cost; inside they are ranked so.
        min_kept: units that every layer keeps (all of them, in a layer with fewer).
        kinds: layer → its kind, for scope "kind".
        blocks: of which units whole multiples are left, see `in_multiples`.
        additive: whether scores are what units are worth, over all layers: errors that add up, for instance.

    Returns:
        layer → new boolean mask, on the device of the old one.

    Raises:
        ValueError: NaN scores; a cost that cannot be met without the units that have to stay.
    """
    for name, score in scores.items():
        if bool((torch.isnan(score) & kept[name]).any()):
            raise ValueError(f"the scores of {name!r} contain NaN, so nothing was pruned; check its weights")
    devices = {name: mask.device for name, mask in kept.items()}
    scores, kept, units = ({name: value.cpu() for name, value in each.items()} for each in (scores, kept, units))
    together = ranked_together(kept, scope, units, kinds)
    if additive:
        own = {name: torch.where(kept[name], score.double(), 0.0) for name, score in scores.items()}
    else:
        own = {name: shares(score, kept[name]) for name, score in scores.items()}
    scores = scores if blocks is None else own  # so that the best group of a block is the same in both
    found_units = Units(scores, kept, in_multiples(own, kept, units, blocks), min_kept)
    worth = found_units.total(own)
    if additive:  # a unit's candidates all have what the unit is worth
        worth = worth / found_units.sizes.clamp(min=1)
    queues, streams = queues_of(found_units, blocks), costs.streams(found_units.members())
    search = _Search(found_units, worth, queues, streams.unique(dim=1), costs, target, _CLOSE * dense)
    found = search.by_stages() if scope == "global" else search.by_fraction(kept, together)
    if found.cost > target + TOLERANCE * dense:  # units are large, or there are none left
        _check_least(found_units, costs, target, dense, least_kept(min_kept, len(kept), blocks))
    return {name: mask.to(devices[name]) for name, mask in search.masks(found).items()}


def shares(scores: Tensor, kept: Tensor) -> Tensor:
    """(n,) float64: R²/A / (B/A)^(1 + c), A the sum of the R² of a layer, B of those that rank no lower, c = 4.

    It is by how much (A/B)^c / c, the whole of a layer over what is left of it, grows as units go. In A the mean of
    those that count stands for all others. The lowest negative score counts as zero; infinite ones stay infinite,
    beside the others.

    Args:
        scores: (n,).
        kept: (n,) bool, those that count.
    """
    values = torch.where(kept, scores.double(), 0.0)
    lowest = torch.where(values.isfinite(), values, 0.0).min().clamp(max=0)
    values = (values - lowest).clamp(min=0).square()
    finite = torch.where(kept & values.isfinite(), values, 0.0)
    order = torch.where(kept, values, torch.inf).argsort(stable=True)
    no_lower = torch.empty_like(finite)
    no_lower[order] = finite[order].flip(0).cumsum(0).flip(0)
    no_lower = torch.where(no_lower > 0, no_lower, 1.0)
    whole = finite.sum() * len(kept) / kept.sum().clamp(min=1)
    share = finite / no_lower * (whole / no_lower) ** _CONVEXITY
    return torch.where(values.isfinite(), share, torch.inf)


def check_target(
    full: Mapping[str, Tensor],
    costs: Costs,
    target: float,
    dense: float,
    units: Mapping[str, Tensor],
    min_kept: int,
    blocks: Blocks | None = None,
) -> None:
    """Check, before anything is pruned, that the floors leave enough to prune.

    Args:
        full: layer → mask.
        costs: what masks cost.
        target: cost to be met.
        dense: cost of the whole network.
        units: layer → (n,) int64, as of `prune_to_cost`.
        min_kept: units that every layer keeps.
        blocks: as of `prune_to_cost`.

    Raises:
        ValueError: they do not; says how much can go.
    """
    kept = {name: mask.cpu() for name, mask in full.items()}
    scores = {name: torch.zeros(mask.shape) for name, mask in kept.items()}
    units = in_multiples(scores, kept, {name: own.cpu() for name, own in units.items()}, blocks)
    found = Units(scores, kept, units, min_kept)
    _check_least(found, costs, target, dense, least_kept(min_kept, len(kept), blocks))


def _check_least(units: Units, costs: Costs, target: float, dense: float, kept: str) -> None:
    least = costs.of(units.least())
    if least > target + TOLERANCE * dense:
        raise ValueError(
            f"amount={1 - target / dense:.4g} of the cost cannot go: without all units but {kept} the network still "
            f"costs {least / dense:.2%} of what it did, because of what is not pruned; lower amount to "
            f"{max(1 - least / dense, 0):.4g} or less, or the floor"
        )


class _Found(NamedTuple):
    """Units to prune, by their indices, and the cost without them."""

    pruned: Tensor
    cost: float


class _Search:
    """Looks for the units to prune.

    Args:
        units: the units.
        worth: (units,) float64.
        queues: (units,) int64: of units with equal numbers none goes before those that rank lower.
        streams: (2, pairs) int64, channels of streams and the units that read them.
        costs: what masks cost.
        target: cost to be met.
        close: by how much it may be missed.
    """

    def __init__(
        self, units: Units, worth: Tensor, queues: Tensor, streams: Tensor, costs: Costs, target: float, close: float
    ) -> None:
        self._units, self._worth, self._costs, self._target, self._close = units, worth, costs, target, close
        self._queues, self._streams = queues, streams

    def masks(self, found: _Found) -> dict[str, Tensor]:
        """Masks without the units found."""
        return self._units.without(found.pruned)

    def by_stages(self) -> _Found:
        """The least worth for their price, which is computed afresh several times on the way."""
        pruned = torch.empty(0, dtype=torch.int64)
        for left in range(_STAGES, 0, -1):
            now, order, prices = self._priced(pruned)
            excess = now.cost - self._target
            if left == 1 or excess <= 0:
                break
            affordable = int((prices[order].cumsum(0) <= excess / left).sum())
            pruned = torch.cat([pruned, order[:affordable]])
        return self._meet(order, now, prices)

    def by_fraction(self, kept: Mapping[str, Tensor], parts: Sequence[Sequence[str]]) -> _Found:
        """The same fraction of the candidates of every part, the least worth for their price in each."""
        now, ranked, prices = self._priced(torch.empty(0, dtype=torch.int64))
        part = self._units.part({name: number for number, names in enumerate(parts) for name in names})
        fractions = torch.full_like(prices, torch.inf)
        for number, names in enumerate(parts):
            own = ranked[part[ranked] == number]
            total = sum(kept[name].numel() for name in names)
            gone = total - sum(int(kept[name].sum()) for name in names)  # before
            fractions[own] = (gone + self._units.sizes[own].cumsum(0).double()) / total
        return self._meet(ranked[fractions[ranked].argsort(stable=True)], now, prices)

    def _priced(self, pruned: Tensor) -> tuple[_Found, Tensor, Tensor]:
        """The cost without some units; the others, least worth for their price first; and their prices, (units,).

        Those that save nothing never go.
        """
        cost, own, streams = self._costs.priced(self._units.without(pruned))
        keys, prices = self._with_streams(self._units.total(own), streams.double(), pruned)
        order = self._units.lowest_first(self._in_queues(keys))
        free = prices > 0
        free[pruned] = False
        return _Found(pruned, cost), order[free[order]], prices

    def _with_streams(self, prices: Tensor, streams: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
        """Worth / price of every unit, (units,), or of all that read the same channel of a stream; and its price."""
        keys = torch.where(prices > 0, self._worth / prices, torch.inf)
        left = self._units.sizes > 0
        left[pruned] = False
        channels, readers = self._streams[:, left[self._streams[1]]]
        none = torch.zeros_like(streams)
        worth = none.index_add(0, channels, torch.where(self._units.may_go, self._worth, torch.inf)[readers])
        together = worth / (streams + none.index_add(0, channels, prices[readers]))
        number = torch.bincount(channels, minlength=len(streams)).clamp(min=1)
        lower = (together[channels] < keys[readers]) & (streams[channels] > 0)
        channels, readers = channels[lower], readers[lower]
        lowest = keys.scatter_reduce(0, readers, together[channels], "amin")
        chosen = together[channels] == lowest[readers]
        channels, readers = channels[chosen], readers[chosen]
        return lowest, prices.index_add(0, readers, (streams / number)[channels])

    def _in_queues(self, keys: Tensor) -> Tensor:
        """Keys that are no lower than those of units of the same queue that rank lower, (units,)."""
        order = torch.arange(len(keys)).flip(0)  # groups are numbered from the best
        order = order[self._queues[order].argsort(stable=True)]
        levels, ranks = keys.unique(return_inverse=True)
        queues = self._queues[order]
        highest = (queues * len(levels) + ranks[order]).cummax(0).values - queues * len(levels)
        return torch.empty_like(keys).scatter(0, order, levels[highest])

    def _without(self, *pruned: Tensor) -> _Found:
        indices = torch.cat(pruned)
        return _Found(indices, self._costs.of(self._units.without(indices)))

    def _meet(self, order: Tensor, start: _Found, prices: Tensor) -> _Found:
        """Prune the beginning of an order with which the cost is nearest to the target."""
        if start.cost <= self._target or not len(order):
            return start
        enough = self._without(start.pruned, order)
        if enough.cost >= self._target:
            return enough
        too_few, low, high = start, 0, len(order)
        guess = int((prices[order].cumsum(0) < start.cost - self._target).sum()) + 1
        step = 1
        while high - low > 1:
            middle = min(max(guess, low + 1), high - 1)
            found = self._without(start.pruned, order[:middle])
            if found.cost <= self._target:
                high, enough = middle, found
            else:
                low, too_few = middle, found
            guess = middle - step if found.cost <= self._target else middle + step  # away from it in growing steps,
            step *= 2
            if not low < guess < high:  # then by halves
                guess = (low + high) // 2
        best = self._filled_up(too_few, enough, order[high:], prices)
        return self._given_back(enough, best, prices)

    def _filled_up(self, too_few: _Found, enough: _Found, others: Tensor, prices: Tensor) -> _Found:
        """The nearer of two; if neither is near, pass over the unit between them for smaller ones that rank higher."""
        best = min(too_few, enough, key=self._miss)
        affordable = (prices[others] <= too_few.cost - self._target + self._miss(best)).tolist()
        tries, passed = _TRIES, {int(self._queues[enough.pruned[-1]])}
        for unit, queue, fits in zip(others.tolist(), self._queues[others].tolist(), affordable, strict=True):
            if self._miss(best) <= self._close or not tries:
                break
            if queue in passed:
                continue
            if fits:
                tries -= 1
                found = self._without(too_few.pruned, others.new_tensor([unit]))
                best = min(best, found, key=self._miss)
                if found.cost > self._target:
                    too_few = found
                    continue
            passed.add(queue)
        return best

    def _given_back(self, enough: _Found, best: _Found, prices: Tensor) -> _Found:
        """If that is not near either, go without too many, and give back those that rank highest and fit."""
        left, tries, passed = enough, _TRIES, set[int]()
        pruned = enough.pruned.flip(0)
        for unit, queue in zip(pruned.tolist(), self._queues[pruned].tolist(), strict=True):
            if self._miss(best) <= self._close or not tries:
                break
            if queue in passed:
                continue
            if float(prices[unit]) <= self._target - left.cost + self._miss(best):
                tries -= 1
                found = self._without(left.pruned[left.pruned != unit])
                best = min(best, found, key=self._miss)
                if found.cost < self._target:
                    left = found
                    continue
            passed.add(queue)
        return best

    def _miss(self, found: _Found) -> float:
        return abs(found.cost - self._target)
