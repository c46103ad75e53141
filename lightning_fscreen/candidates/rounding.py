"""Widths in multiples of a number: the units of which whole multiples can be left, and what stays uneven."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fscreen.modules import join
from lightning_fscreen.ranking.multiples import Blocks
from lightning_fscreen.slimming.multiples import Multiples, find_multiples
from lightning_fscreen.slimming.widths import Widths


def unit_blocks(networks: Mapping[str, Widths], units: Mapping[str, Tensor], round_to: int) -> Blocks:
    """Blocks of units that are in the same widths of linear and convolution layers.

    Args:
        networks: name in the model → the widths of a network.
        units: layer, by its name in the model → (n,) int64; equal numbers are pruned together, negative ones stay.
        round_to: number of which the widths are to be multiples.
    """
    numbers = {layer: torch.zeros_like(own) for layer, own in units.items()}  # what no network uses is in no width
    steps, others, first = [torch.tensor([1])], [torch.tensor([0])], 1
    top = 1 + max((int(own.max()) for own in units.values()), default=-1)
    for name, widths in networks.items():
        inside = {join(name, gate): classes for gate, classes in widths.units.items()}
        owners = top + torch.arange(widths.count)  # of classes: their units, or else nobody
        for layer, classes in inside.items():
            prunable = units[layer] >= 0
            owners[classes[prunable]] = units[layer][prunable]
        multiples = find_multiples([owners[labels] for labels in widths.layers.values()], top + widths.count, round_to)
        numbers |= {layer: first + multiples.blocks[units[layer].clamp(min=0)] for layer in inside}
        steps.append(multiples.steps)
        others.append(_staying(widths, {layer: units[layer] for layer in inside}, owners, multiples))
        first += len(multiples.steps)
    return Blocks(numbers, torch.cat(steps), torch.cat(others), round_to)


def _staying(widths: Widths, units: Mapping[str, Tensor], owners: Tensor, multiples: Multiples) -> Tensor:
    """(blocks,) int64: pruned units that stay in each block, to carry the constants of the others past zero padding."""
    prunable = torch.cat([own[own >= 0] for own in units.values()]).unique()
    nobody = len(multiples.blocks)
    first = torch.full_like(multiples.steps, nobody)
    first = first.scatter_reduce(0, multiples.blocks[prunable], prunable, "amin")
    on = torch.zeros(nobody, dtype=torch.bool)
    on[first[first < nobody]] = True  # one unit of every block
    keep = {gate: on[own.clamp(min=0)] | (own < 0) for gate, own in zip(widths.units, units.values(), strict=True)}
    live = torch.zeros_like(on)
    live[owners[widths.live(keep)]] = True
    carriers = prunable[live[prunable] & ~on[prunable]]
    return torch.bincount(multiples.blocks[carriers], minlength=len(multiples.steps))


def not_rounded(widths: Widths, keep: Mapping[str, Tensor], round_to: int) -> dict[str, str]:
    """Layers with widths that pruning could reduce, but that are no multiples; and why.

    Args:
        widths: of a network.
        keep: gate → (units,) bool.
        round_to: number of which the widths are to be multiples.
    """
    kept = widths.remaining(keep)[0]
    prunable = torch.zeros(widths.count, dtype=torch.bool)
    prunable[torch.cat([*widths.units.values(), widths.held[:, 0]])] = True
    reasons: dict[str, list[str]] = {}
    for (weight, _), labels in widths.layers.items():
        left = int(kept[labels].sum())
        if left % round_to and bool(prunable[labels].any()):
            reason = _reason(left, len(labels), int((~prunable[labels]).sum()), round_to)
            reasons.setdefault(weight.removesuffix(".weight"), []).append(reason)
    return {layer: "; ".join(dict.fromkeys(own)) for layer, own in reasons.items()}


def _reason(left: int, total: int, fixed: int, round_to: int) -> str:
    if total < round_to:
        return f"a width of {total} is less than round_to={round_to}"
    if left == total:
        return f"a width of {total} is no multiple of round_to={round_to}, and nothing of it is pruned"
    if fixed % round_to:
        return f"{fixed} of the {left} that are left of a width cannot be pruned"
    return f"a width of {left} is joined from others, some of which are no multiples and stay whole"
