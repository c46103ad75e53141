"""The cost of a network as a function of its widths, by interpolation between costs that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """A dimension that loses indices.

    Attributes:
        classes: (size,) int64, the class of each index; none if nothing depends on it.
        points: increasing, from 0 to all indices: numbers of indices left at which costs are known.
    """

    classes: Tensor
    points: tuple[int, ...]


NO_AXIS = Axis(torch.empty(0, dtype=torch.int64), (0,))


class Costed(NamedTuple):
    """A part whose cost depends on two widths at most.

    Attributes:
        rows, columns: its dimensions.
        costs: (points of the rows, points of the columns) float64.
    """

    rows: Axis
    columns: Axis
    costs: Tensor


class TableModel:
    """A sum over parts, each a table over the widths that are left, linear between its points and beyond them.

    Args:
        parts: the parts.
        num_classes: number of classes.

    Attributes:
        factor: of all costs.
    """

    def __init__(self, parts: Sequence[Costed], num_classes: int) -> None:
        self._num_classes, self.factor = num_classes, 1.0
        axes = [axis for part in parts for axis in (part.rows, part.columns)]
        lengths = torch.tensor([len(axis.classes) for axis in axes], dtype=torch.int64)
        self._classes = torch.cat([NO_AXIS.classes, *(axis.classes for axis in axes)])
        self._dims = torch.arange(len(axes)).repeat_interleave(lengths)
        self._points = [_padded([axis.points for axis in axes[side::2]]) for side in (0, 1)]
        self._last = [
            torch.tensor([max(len(axis.points) - 2, 0) for axis in axes[side::2]], dtype=torch.int64) for side in (0, 1)
        ]
        size = [points.shape[1] for points in self._points]
        self._costs = torch.zeros(len(parts), *size, dtype=torch.float64)
        for number, part in enumerate(parts):
            height, width = part.costs.shape
            own = torch.cat([part.costs, part.costs[-1:].expand(size[0] - height, width)])
            self._costs[number] = torch.cat([own, own[:, -1:].expand(size[0], size[1] - width)], dim=1)

    def of(self, kept: Tensor) -> float:
        """Cost of what is left; `kept`, (classes,) bool."""
        left = self._left(kept)
        return float(self._at(left[:, 0], left[:, 1]).sum())

    def prices(self, kept: Tensor) -> Tensor:
        """(classes,) float64: what one index less of every class saves, the mean over half of those that are left.

        Measured costs are uneven: some widths are slower than the next. What goes is seldom one index alone.
        """
        left = self._left(kept)
        now, half = self._at(left[:, 0], left[:, 1]), left / 2
        less = torch.stack([self._at(half[:, 0], left[:, 1]), self._at(left[:, 0], half[:, 1])], dim=1)
        slopes = ((now[:, None] - less) / half.clamp(min=0.5)).clamp(min=0).flatten()
        return slopes.new_zeros(self._num_classes).index_add(0, self._classes, slopes[self._dims])

    def _left(self, kept: Tensor) -> Tensor:
        """(parts, 2) float64, indices that are left of both dimensions."""
        left = torch.zeros(2 * len(self._costs), dtype=torch.float64)
        return left.index_add(0, self._dims, kept[self._classes].double()).view(-1, 2)

    def _at(self, heights: Tensor, widths: Tensor) -> Tensor:
        (row, down), (column, right) = self._place(0, heights), self._place(1, widths)
        number = torch.arange(len(self._costs))

        def corner(below: int, beside: int) -> Tensor:
            last = self._costs.shape[1] - 1, self._costs.shape[2] - 1
            return self._costs[number, (row + below).clamp(max=last[0]), (column + beside).clamp(max=last[1])]

        upper = corner(0, 0) * (1 - right) + corner(0, 1) * right
        lower = corner(1, 0) * (1 - right) + corner(1, 1) * right
        return self.factor * (upper * (1 - down) + lower * down).clamp(min=0)

    def _place(self, side: int, left: Tensor) -> tuple[Tensor, Tensor]:
        """The point before a width, (parts,), and how far it is on the way to the next."""
        points = self._points[side]
        before = (torch.searchsorted(points, left[:, None].contiguous(), right=True)[:, 0] - 1).clamp(min=0)
        before = torch.minimum(before, self._last[side])
        if points.shape[1] == 1:
            return before, torch.zeros_like(left)
        after = (before + 1).clamp(max=points.shape[1] - 1)
        start, end = points.gather(1, before[:, None])[:, 0], points.gather(1, after[:, None])[:, 0]
        return before, (left - start) / (end - start)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(rows, longest) float64, going on beyond the end of the shorter ones."""
    longest = max(map(len, rows), default=1)
    padded = [[*row, *range(row[-1] + 1, row[-1] + 1 + longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.float64).view(len(rows), longest)
