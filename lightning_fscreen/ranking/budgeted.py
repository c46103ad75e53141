"""From scores to masks under an exact budget: the lowest-ranked of the remaining candidates are pruned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_fscreen.modules import coupled_layers
from lightning_fscreen.ranking.multiples import Blocks, in_multiples, least_kept, queues_of
from lightning_fscreen.ranking.units import Units, relative_places

Scope = Literal["global", "kind", "layer"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


def rank_and_prune(
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    amount: float,
    *,
    scope: Scope = "global",
    min_kept: int = 1,
    units: Mapping[str, Tensor] | None = None,
    kinds: Mapping[str, str] | None = None,
    blocks: Blocks | None = None,
) -> dict[str, Tensor]:
    """Prune the lowest scores until the budget is met; candidates pruned before stay pruned.

    The budget is round(amount · candidates), over all layers together (scope "global"), over those of every kind
    ("kind") or in every layer by itself ("layer"); the roundings are shared out so that the sum is the global budget.
    Equal scores are pruned from all layers alike, in the order of their relative positions in the layer: where scores
    tell nothing (scales that are all 1, as before training), no layer is emptied, and the result is the same on every
    machine.

    Args:
        scores: layer → scores of any shape; higher is more important, +inf the most.
        kept: layer → boolean mask of that shape, True where a candidate is left.
        amount: fraction of all candidates pruned afterwards, 0 ≤ amount ≤ 1. Never un-prunes: where more are pruned
            already, they stay so.
        scope: "global", "kind" or "layer".
        min_kept: candidates that every layer keeps (all of them, in a layer with fewer).
        units: layer → int64 of that shape, (n,): equal numbers, in one layer or in several, are pruned as one, and
            negative ones stay. Coupled layers then count as one for scope "layer", and belong to the kind of the first
            of them for "kind"; where units are larger than one the budget is met as nearly as their sizes allow.
        kinds: layer → its kind; without it, all layers are of one. Only looked at with `units`.
        blocks: of which units whole multiples are left, see `in_multiples`. Only looked at with `units`.

    Returns:
        layer → new boolean mask.

    Raises:
        ValueError: NaN scores; a budget that the floors make impossible; an unknown scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; choose one of {list(SCOPES)}")
    for name, score in scores.items():
        if bool((torch.isnan(score) & kept[name]).any()):
            raise ValueError(f"the scores of {name!r} contain NaN, so nothing was pruned; check its weights")
    if units is not None:
        together = ranked_together(kept, scope, units, kinds)
        return _prune_units(scores, kept, amount, together, min_kept, units, blocks)
    totals = {name: mask.numel() for name, mask in kept.items()}
    left = {name: int(mask.count_nonzero()) for name, mask in kept.items()}
    floors = {name: min(min_kept, count) for name, count in left.items()}
    budget = sum(totals.values()) - round(amount * sum(totals.values()))  # candidates to keep
    _check_floors(amount, budget, sum(totals.values()), sum(floors.values()), min_kept, len(totals))
    if scope == "layer":
        keep = _shares(totals, floors, left, budget)
        return {name: _drop_lowest(scores[name], mask, left[name] - keep[name]) for name, mask in kept.items()}
    drop = sum(left.values()) - budget
    if drop <= 0:
        return {name: mask.clone() for name, mask in kept.items()}
    removable = dict(kept)
    masks = _drop_lowest_of_all(scores, kept, removable, drop)
    while short := [name for name, mask in masks.items() if int(mask.count_nonzero()) < floors[name]]:
        removable |= {name: _removable(scores[name], kept[name], floors[name]) for name in short}
        masks = _drop_lowest_of_all(scores, kept, removable, drop)
    return masks


def check_floors(
    totals: Mapping[str, int],
    amount: float,
    min_kept: int,
    units: Mapping[str, Tensor] | None = None,
    blocks: Blocks | None = None,
) -> None:
    """Check, before anything is pruned, that a floor leaves enough to prune.

    Args:
        totals: layer → number of candidates.
        amount: fraction of them that is pruned in the end.
        min_kept: candidates that every layer keeps.
        units: as of `rank_and_prune`; only looked at with `blocks`.
        blocks: likewise.

    Raises:
        ValueError: it does not.
    """
    total = sum(totals.values())
    floor = sum(min(min_kept, count) for count in totals.values())
    if units is not None and blocks is not None:
        zeros = {name: torch.zeros(len(units[name])) for name in totals}
        kept = {name: torch.ones(own.shape, dtype=torch.bool) for name, own in zeros.items()}
        own = {name: each.cpu() for name, each in in_multiples(zeros, kept, units, blocks).items()}
        floor = Units(zeros, kept, own, min_kept).protected
    _check_floors(amount, total - round(amount * total), total, floor, min_kept, len(totals), blocks)


def _prune_units(
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    amount: float,
    layers: Sequence[Sequence[str]],
    min_kept: int,
    units: Mapping[str, Tensor],
    blocks: Blocks | None,
) -> dict[str, Tensor]:
    units = in_multiples(scores, kept, units, blocks)
    parts = {
        str(place): Units(scores, {name: kept[name] for name in names}, units, min_kept)
        for place, names in enumerate(layers)
    }
    totals = {str(place): sum(kept[name].numel() for name in names) for place, names in enumerate(layers)}
    floors = {place: part.protected for place, part in parts.items()}
    left = {place: part.left for place, part in parts.items()}
    budget = sum(totals.values()) - round(amount * sum(totals.values()))
    _check_floors(amount, budget, sum(totals.values()), sum(floors.values()), min_kept, len(kept), blocks)
    keep = _shares(totals, floors, left, budget)
    masks: dict[str, Tensor] = {}
    missed = 0
    for place, part in parts.items():
        count = max(left[place] - keep[place], 0) + missed
        found = part.drop(max(count, 0), queues_of(part, blocks))
        if blocks is not None:  # half a multiple in every layer could add up
            missed = count - left[place] + sum(int(mask.count_nonzero()) for mask in found.values())
        masks |= found
    return {name: masks[name] for name in kept}


def ranked_together(
    kept: Mapping[str, Tensor], scope: Scope, units: Mapping[str, Tensor], kinds: Mapping[str, str] | None
) -> list[list[str]]:
    """Layers that are ranked together; coupled ones always are."""
    if scope == "global":
        return [list(kept)]
    numbers = iter(torch.cat([units[name] for name in kept]).tolist())  # an accelerator is waited for once
    coupled = coupled_layers({name: list(itertools.islice(numbers, len(units[name]))) for name in kept})
    if scope == "layer":
        return coupled
    parts: dict[str, list[str]] = {}
    for names in coupled:
        parts.setdefault("" if kinds is None else kinds[names[0]], []).extend(names)
    return list(parts.values())


def _check_floors(
    amount: float, budget: int, total: int, floor: int, min_kept: int, layers: int, blocks: Blocks | None = None
) -> None:
    if floor > budget + (0 if blocks is None else blocks.round_to // 2):  # else the floor is the nearest multiple
        raise ValueError(
            f"amount={amount:.6g} would keep {budget} of {total} candidates, but at least "
            f"{least_kept(min_kept, layers, blocks)} makes {floor}; lower amount or the floor"
        )


def _removable(scores: Tensor, kept: Tensor, floor: int) -> Tensor:
    """Candidates left, without the `floor` best ones, which the layer keeps whatever the others are worth."""
    spare = int(kept.count_nonzero()) - floor
    return _lowest(scores.flatten(), kept.flatten(), spare).view_as(kept) if spare > 0 else torch.zeros_like(kept)


def _drop_lowest_of_all(
    scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], removable: Mapping[str, Tensor], drop: int
) -> dict[str, Tensor]:
    eligible = torch.cat([removable[name].flatten() for name in kept])
    lengths = [mask.numel() for mask in kept.values()]
    pruned = _lowest(torch.cat([scores[name].flatten() for name in kept]), eligible, drop, lengths)
    parts = pruned.split(lengths)
    return {name: mask & ~part.view_as(mask) for (name, mask), part in zip(kept.items(), parts, strict=True)}


def _drop_lowest(scores: Tensor, kept: Tensor, drop: int) -> Tensor:
    return kept & ~_lowest(scores.flatten(), kept.flatten(), drop).view_as(kept) if drop > 0 else kept.clone()


def _lowest(scores: Tensor, eligible: Tensor, count: int, lengths: Sequence[int] | None = None) -> Tensor:
    """Mask of the `count` lowest eligible scores; among equal ones the relatively first positions in their layers.

    Args:
        scores: (n,) of layers, one after the other.
        eligible: (n,) bool.
        count: how many, at least 1.
        lengths: how many of the scores are those of each layer; by default all are of one.
    """
    # Several times faster than to pick the eligible ones out.
    threshold = _smallest_(torch.where(eligible, scores.detach(), torch.inf), count)
    lowest = eligible & (scores <= threshold)
    if excess := int(lowest.count_nonzero()) - count:
        equal = (eligible & (scores == threshold)).nonzero().flatten().cpu()
        order = relative_places(lengths or [len(scores)], equal).argsort(stable=True)
        lowest[equal[order[-excess:]].to(lowest.device)] = False
    return lowest


def _smallest_(values: Tensor, count: int) -> Tensor:
    """The `count`-th smallest value; on CPUs the values are rearranged, which takes half the time of `kthvalue`."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.sort().values[count - 1]  # on accelerators `kthvalue` has no deterministic form
    values.numpy().partition(count - 1)
    return values[count - 1]


def _shares(
    totals: Mapping[str, int], floors: Mapping[str, int], caps: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Split `budget` in proportion to `totals`, no share below its floor or above its cap.

    What floors add is taken from the other layers. Fractions go to the layers with the largest remainders (ties: the
    first), so that the shares add up to the budget.
    """
    fixed: dict[str, int] = {}
    while True:
        free = {name: total for name, total in totals.items() if name not in fixed}
        rate = (budget - sum(fixed.values())) / max(sum(free.values()), 1)
        low = {name: floors[name] for name, total in free.items() if rate * total < floors[name]}
        if not low:
            break
        fixed |= low
    exact = {name: rate * total for name, total in free.items()}
    shares = fixed | {name: min(math.floor(share), caps[name]) for name, share in exact.items()}
    by_remainder = sorted(free, key=lambda name: math.floor(exact[name]) - exact[name])  # stable
    missing = budget - sum(shares.values())
    while missing > 0 and (room := [name for name in by_remainder if shares[name] < caps[name]]):
        for name in room[:missing]:
            shares[name] += 1
        missing = budget - sum(shares.values())
    return shares
