"""The cost of a network as a function of its widths, in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class CostModel:
    """A sum over tensors: cost = Σ_t factor_t · Π_d n_td, where n_td indices are left of dimension d of tensor t.

    With factor 1 this is the number of values; with the number of positions at which each value is multiplied, that of
    multiply–adds. A weight has two dimensions that can lose indices, so that the cost is bilinear in the widths. What
    lives or dies as one, in whatever tensors, is a class.

    Args:
        shapes: shape of every tensor that counts.
        factors: factor of each; those that are not named do not count.
        dims: (tensor, dim) → (size,) int64, the class of each index; other dimensions never change.
        num_classes: number of classes.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        factors: Mapping[str, float],
        dims: Mapping[tuple[str, int], Tensor],
        num_classes: int,
    ) -> None:
        changing: dict[str, list[int]] = {name: [] for name in factors}
        places = [place for place in dims if place[0] in changing]
        for index, (name, _) in enumerate(places):
            changing[name].append(index)
        self._num_classes = num_classes
        lengths = torch.tensor([len(dims[place]) for place in places], dtype=torch.int64)
        self._dims = torch.arange(len(places)).repeat_interleave(lengths)
        self._classes = torch.cat([torch.empty(0, dtype=torch.int64), *(dims[place] for place in places)])
        # One dimension more, of size 1, for the tensors with fewer than others.
        self._none, most = len(places), max(map(len, changing.values()), default=0)
        rows = [own + [self._none] * (most - len(own)) for own in changing.values()]
        self._terms = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), most)
        sizes = [math.prod(len(dims[places[index]]) for index in own) for own in changing.values()]
        numels = [math.prod(shapes[name]) for name in changing]
        scales = [
            factor * numel / max(size, 1) for factor, numel, size in zip(factors.values(), numels, sizes, strict=True)
        ]
        self._scales = torch.tensor(scales, dtype=torch.float64)

    def of(self, kept: Tensor) -> float:
        """Cost of what is left; `kept`, (classes,) bool."""
        return float((self._scales * self._widths(kept)[self._terms].prod(1)).sum())

    def prices(self, kept: Tensor) -> Tensor:
        """(classes,) float64: what one index more or less of every class costs beside what is left."""
        widths = self._widths(kept)[self._terms]
        slopes = torch.zeros(self._none + 1, dtype=torch.float64)
        for dim in range(widths.shape[1]):
            others = torch.cat([widths[:, :dim], widths[:, dim + 1 :]], dim=1).prod(1)
            slopes.index_add_(0, self._terms[:, dim], self._scales * others)
        return slopes.new_zeros(self._num_classes).index_add(0, self._classes, slopes[self._dims])

    def _widths(self, kept: Tensor) -> Tensor:
        widths = torch.zeros(self._none + 1, dtype=torch.float64)
        widths.index_add_(0, self._dims, kept[self._classes].double())
        widths[self._none] = 1
        return widths
