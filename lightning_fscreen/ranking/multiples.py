"""Units in groups of such a size that what is left of every width is a multiple."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fscreen.ranking.units import Units


@dataclass(frozen=True)
class Blocks:
    """Which units are in the same widths, and how many of them may be left.

    Attributes:
        numbers: layer → (n,) int64, the block of each unit.
        steps: (blocks,) int64: what a block keeps is to be a multiple of it.
        others: (blocks,) int64: so many of the pruned ones stay beside those that are kept, if any are pruned.
        round_to: number of which the widths are to be multiples, for messages.
    """

    numbers: Mapping[str, Tensor]
    steps: Tensor
    others: Tensor
    round_to: int


def least_kept(min_kept: int, layers: int, blocks: Blocks | None) -> str:
    """What has to stay, in words."""
    multiples = "" if blocks is None else f" (in multiples of round_to={blocks.round_to}, or whole)"
    return f"{min_kept} in each of {layers} layers{multiples}"


def check_rounding(units: Mapping[str, Tensor], blocks: Blocks | None) -> None:
    """Check that there are units of which fewer make a multiple.

    Args:
        units: layer → (n,) int64, as of `in_multiples`.
        blocks: the blocks.

    Raises:
        ValueError: there are none, so that everything would stay.
    """
    if blocks is None:
        return
    own = {name: each.cpu() for name, each in units.items()}
    whole = {name: torch.ones(each.shape) for name, each in own.items()}
    found = in_multiples(whole, {name: each.bool() for name, each in whole.items()}, own, blocks)
    if all(bool((each < 0).all()) for each in found.values()):
        raise ValueError(
            f"round_to={blocks.round_to} leaves nothing to prune: no layer has units of which fewer make a multiple of "
            f"it (the largest has {max(map(len, units.values()))}); lower round_to"
        )


def queues_of(units: Units, blocks: Blocks | None) -> Tensor:
    """(units,) int64: groups of a block have equal numbers, since the worst has to go first; all others their own."""
    own = torch.arange(len(units.sizes), device=units.sizes.device)
    if blocks is None:
        return own
    numbers = units.of_first(blocks.numbers)
    return torch.where(blocks.steps.to(own.device)[numbers] > 1, len(own) + numbers, own)


def in_multiples(
    values: Mapping[str, Tensor], kept: Mapping[str, Tensor], units: Mapping[str, Tensor], blocks: Blocks | None
) -> Mapping[str, Tensor]:
    """Larger units: those of a block, from the best to the worst, in groups of its step.

    Whole groups are pruned, so that a width goes up or down to a multiple as the group at the margin is worth. The
    group of the worst leaves the largest multiple that is smaller than the whole block. Blocks of which no multiple is
    smaller stay.

    Args:
        values: layer → (n,); higher is better.
        kept: layer → (n,) bool.
        units: layer → (n,) int64; equal numbers, in one layer or in several, are pruned as one, negative ones stay.
        blocks: the blocks; None leaves the units as they are.

    Returns:
        layer → (n,) int64, as `units`.
    """
    if blocks is None:
        return units
    devices = {name: own.device for name, own in units.items()}
    values, kept, units = ({name: own[name].cpu() for name in kept} for own in (values, kept, units))
    found = Units(values, kept, units, 0)
    order = found.lowest_first(found.scores).flip(0)
    block = found.of_first(blocks.numbers)[order]
    block, order = block[by_block := block.argsort(stable=True)], order[by_block]
    place = torch.arange(len(block)) - torch.searchsorted(block, block)
    steps = blocks.steps[block]
    most = (torch.bincount(block, minlength=len(blocks.steps))[block] - 1) // steps  # multiples, if any are pruned
    group = torch.minimum((place + blocks.others[block] % steps) // steps, most)
    groups = torch.stack([block, group]).unique(dim=1, return_inverse=True)[1]
    uneven = (group == 0) & (blocks.others[block] % steps > 0)  # without them the others alone would be left
    groups[(most == 0) | uneven] = -1
    return {name: own.to(devices[name]) for name, own in found.grouped(order, groups).items()}
