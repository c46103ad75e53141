"""Which units the others can replace: how far the layers that read them are off without them, at best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_STEP = 1 / 32
"""Share of the units left that go at once, since afterwards all has to be computed again."""


@dataclass(frozen=True)
class Reading:
    """How one weight multiplies features, which have a second moment of 1.

    Attributes:
        moments: (features, features) float64, M.
        products: (features, features) float64, S = Wᵀ W: the inner products of the features' weights.
        labels: (features,) int64, the unit of each.
    """

    moments: Tensor
    products: Tensor
    labels: Tensor


def elimination_errors(units: Tensor, readings: Sequence[Reading]) -> Tensor:
    """The error that each unit's absence adds, if all go one after the other, the one that adds least first.

    The outputs y = W x of a layer are best approximated without some inputs P if what remains takes over its least-
    squares prediction of them. The mean squared error grows by tr(S_PP ((M⁻¹)_PP)⁻¹), S and M being those of what is
    left: the Optimal Brain Surgeon (Hassibi & Stork 1993, equation 5) for whole inputs of a layer. It counts as a share
    of the mean squared output tr(S M), summed over all layers that read the unit. Errors never decrease in the order of
    elimination, and those of all units that went add up to that of the smaller layer.

    Args:
        units: (units,) int64, different ones, which are read together in some of the readings.
        readings: of these units and of features that stay; every unit is read as often as any other in one reading.

    Returns:
        (units,) float64.
    """
    errors, least = torch.zeros(len(units), dtype=torch.float64), 0.0
    states = [_State(reading, units) for reading in readings]
    left = torch.arange(len(units))
    while len(left):
        scores = torch.stack([state.errors() for state in states]).sum(0)[left]
        chosen = scores.argsort(stable=True)[: max(1, int(_STEP * len(left)))]
        errors[left[chosen]] = scores[chosen].clamp(min=least)
        least = float(errors[left[chosen]].max())
        for state in states:
            state.remove(left[chosen])
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[chosen] = False
        left = left[stays]
    return errors


class _State:
    """A reading, without the features that are gone."""

    def __init__(self, reading: Reading, units: Tensor) -> None:
        places = torch.isin(reading.labels, units).nonzero().flatten()
        order = reading.labels[places].argsort(stable=True)
        numbers, counts = reading.labels[places].unique(return_counts=True)
        self._columns = torch.full((len(units), int(counts[0])), -1)
        where = torch.searchsorted(units.sort().values, numbers)
        self._columns[units.argsort()[where]] = places[order].view(len(numbers), -1)
        self._inverse = torch.linalg.inv(reading.moments)
        self._products = reading.products.clone()
        self._there = torch.ones(len(reading.labels), dtype=torch.bool)
        self._whole = float((reading.products * reading.moments).sum())

    def errors(self) -> Tensor:
        """(units,) float64; of those that are gone, or not read here, 0."""
        read = self._columns[:, 0] >= 0
        columns, found = self._columns[read], torch.zeros(len(self._columns), dtype=torch.float64)
        if self._whole > 0 and len(columns):
            rows, across = columns[:, :, None], columns[:, None]
            own = torch.linalg.solve(self._inverse[rows, across], self._products[rows, across])
            found[read] = own.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0) / self._whole
        return found

    def remove(self, units: Tensor) -> None:
        """The others take over as much as they can."""
        columns = self._columns[units]
        columns = columns[columns[:, 0] >= 0].flatten()
        self._columns[units] = -1
        if len(columns) == 0:
            return
        inverse, products = self._inverse[:, columns], self._products[:, columns]
        shares = torch.linalg.solve(inverse[columns], inverse.mT).mT  # (features, gone)
        crossed = products - shares @ (products[columns] / 2)
        self._inverse.addmm_(shares, inverse.mT, alpha=-1)
        self._products.addmm_(shares, crossed.mT, alpha=-1).addmm_(crossed, shares.mT, alpha=-1)
        self._there[columns] = False
        if 2 * int(self._there.sum()) < len(self._there):
            self._compress()

    def _compress(self) -> None:
        stays = self._there
        self._inverse, self._products = (each[stays][:, stays] for each in (self._inverse, self._products))
        self._columns = torch.where(self._columns >= 0, (stays.cumsum(0) - 1)[self._columns], -1)
        self._there = stays[stays]
