"""Ranking of coupled channels: units that can only be pruned as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Units:
    """The candidates of some layers, grouped into units.

    A unit's score is the mean over its candidates, so that units of different sizes compare.

    Args:
        scores: layer → (n,) scores.
        kept: layer → (n,) bool.
        units: layer → (n,) int64; equal numbers, in one layer or in several, share their fate; negative ones stay.
        min_kept: candidates that every layer keeps (all of them, in a layer with fewer).
    """

    def __init__(
        self, scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], units: Mapping[str, Tensor], min_kept: int
    ) -> None:
        self._lengths = {name: mask.numel() for name, mask in kept.items()}
        self._kept = torch.cat(list(kept.values()))
        labels = torch.cat([units[name] for name in kept])
        numbers, self._members = labels.unique(return_inverse=True)
        values = torch.cat([scores[name] for name in kept]).double()
        zeros = values.new_zeros(len(numbers))
        self._sizes = zeros.long().index_add(0, self._members, self._kept.long())
        total = zeros.index_add(0, self._members, torch.where(self._kept, values, 0.0))
        self._scores = total / self._sizes.clamp(min=1)
        places = torch.arange(len(labels), device=labels.device)
        self._first = places.new_full((len(numbers),), len(labels)).scatter_reduce(0, self._members, places, "amin")
        relative = relative_places(list(self._lengths.values()), self._first.cpu()).to(self._first.device)
        self._in_turns = relative.argsort(stable=True)  # units are numbered
        self._stays: Tensor = (numbers < 0) | (self._sizes == 0)
        start = 0
        for length in self._lengths.values():
            self._protect(slice(start, start + length), min_kept)
            start += length

    def _protect(self, layer: slice, min_kept: int) -> None:
        """The best candidates of a layer stay, whatever the others are worth."""
        members = self._members[layer][self._kept[layer]]
        lowest_first = members[self._scores[members].argsort(stable=True)]
        self._stays[lowest_first[max(len(members) - min_kept, 0) :]] = True

    @property
    def protected(self) -> int:
        """Number of candidates left that have to stay."""
        return int(self._sizes[self._stays].sum())

    @property
    def left(self) -> int:
        """Number of candidates left."""
        return int(self._sizes.sum())

    def drop(self, count: int, queues: Tensor | None = None) -> dict[str, Tensor]:
        """New masks without the lowest-ranked units, `count` candidates in all, or as near to it as their sizes allow.

        Equal scores are pruned as `lowest_first` orders them.

        Args:
            count: number of candidates.
            queues: (units,) int64: of units with equal numbers none goes before those that rank lower; by default any.
        """
        order = self.lowest_first(self._scores)
        sizes = self._sizes[order].tolist()
        waiting = range(len(order)) if queues is None else queues[order].tolist()
        chosen, passed, rest = [], dict[int, int](), count
        for place, (size, queue) in enumerate(zip(sizes, waiting, strict=True)):
            if rest == 0:
                break
            if queue in passed:
                continue
            if size <= rest:
                chosen.append(place)
                rest -= size
            else:  # a unit that is too large is passed over for the next that fits
                passed[queue] = place
        if rest:
            others = sorted(passed.values(), key=lambda place: (sizes[place], place))
            if others and sizes[others[0]] - rest < rest:
                chosen.append(others[0])
        return self.without(order[chosen])

    @property
    def scores(self) -> Tensor:
        """(units,) float64, the mean score of each."""
        return self._scores

    @property
    def sizes(self) -> Tensor:
        """(units,) int64, the number of its candidates that are left."""
        return self._sizes

    @property
    def may_go(self) -> Tensor:
        """(units,) bool: those that do not have to stay."""
        return ~self._stays

    def members(self) -> dict[str, Tensor]:
        """Layer → (n,) int64, the index of every candidate's unit."""
        return dict(zip(self._lengths, self._members.split(list(self._lengths.values())), strict=True))

    def lowest_first(self, keys: Tensor) -> Tensor:
        """Those units that may go, by ascending keys, (units,); equal ones from all layers in turns.

        That is the order of the relative positions of their first candidates in the layer.
        """
        order = self._in_turns[keys[self._in_turns].argsort(stable=True)]
        return order[~self._stays[order]]

    def least(self) -> dict[str, Tensor]:
        """New masks with only what has to stay."""
        return self.without(self.lowest_first(self._scores))

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """(units,) float64, the sum of some values over the candidates that are left; layer → (n,)."""
        flat = torch.cat([values[name] for name in self._lengths]).double()
        return torch.zeros_like(self._scores).index_add(0, self._members, torch.where(self._kept, flat, 0.0))

    def of_first(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """(units,), a number that each unit has from its first candidate; layer → (n,)."""
        return torch.cat([numbers[name] for name in self._lengths]).to(self._first.device)[self._first]

    def part(self, layers: Mapping[str, int]) -> Tensor:
        """(units,) int64, a number that each unit has from the layer of its first candidate."""
        return self.of_first({name: torch.full((length,), layers[name]) for name, length in self._lengths.items()})

    def grouped(self, chosen: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """Larger units, layer → (n,) int64: those at the indices `chosen` are in these groups, all others in -1."""
        numbers = torch.full_like(self._first, -1)
        numbers[chosen] = groups
        return dict(zip(self._lengths, numbers[self._members].split(list(self._lengths.values())), strict=True))

    def without(self, pruned: Tensor) -> dict[str, Tensor]:
        """New masks without some units, given by their indices."""
        gone = torch.zeros_like(self._stays)
        gone[pruned] = True
        masks = (self._kept & ~gone[self._members]).split(list(self._lengths.values()))
        return dict(zip(self._lengths, masks, strict=True))


def relative_places(lengths: Sequence[int], places: Tensor) -> Tensor:
    """Where places in layers that stand one after the other are in their own layer: from 0, its first, to 1, its last.

    Args:
        lengths: of the layers.
        places: (n,) int64.

    Returns:
        (n,) float64, (i + ½) / length for the place i of a layer.
    """
    ends = torch.tensor(lengths).cumsum(0)
    layers = torch.searchsorted(ends, places, right=True)
    sizes = torch.tensor(lengths)[layers]
    return (places - (ends[layers] - sizes) + 0.5).double() / sizes
