"""Interpolated costs, against scipy's interpolation, and what one index less saves, against the costs."""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import RegularGridInterpolator

from lightning_fscreen.costs.tables import NO_AXIS, Axis, Costed, TableModel


def random_part(generator: torch.Generator, num_classes: int, dims: int) -> Costed:
    axes = []
    for _ in range(dims):
        size = int(torch.randint(3, 12, (), generator=generator))
        inner = torch.randperm(size - 1, generator=generator)[: int(torch.randint(4, (), generator=generator))] + 1
        points = tuple(sorted({0, size, *inner.tolist()}))
        axes.append(Axis(torch.randint(num_classes, (size,), generator=generator), points))
    rows, columns = [*axes, NO_AXIS, NO_AXIS][:2]
    return Costed(rows, columns, torch.rand(len(rows.points), len(columns.points), generator=generator).double())


def by_scipy(part: Costed, left: list[float]) -> float:
    axes = [axis for axis in (part.rows, part.columns) if axis is not NO_AXIS]
    if not axes:
        return float(part.costs)
    costs = part.costs.squeeze(1).numpy() if len(axes) == 1 else part.costs.numpy()
    return float(RegularGridInterpolator([np.array(axis.points, float) for axis in axes], costs)(left[: len(axes)])[0])


def test_costs_between_the_points_are_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        parts = [random_part(generator, 9, dims) for dims in (2, 0, 1, 2)]
        model = TableModel(parts, 9)
        kept = torch.rand(9, generator=generator) < 0.6
        left = [[float(kept[axis.classes].sum()) for axis in (part.rows, part.columns)] for part in parts]
        whole = sum(by_scipy(part, own) for part, own in zip(parts, left, strict=True))
        assert abs(model.of(kept) - whole) < 1e-12
        prices = torch.zeros(9, dtype=torch.float64)
        for part, own in zip(parts, left, strict=True):
            for dim, axis in enumerate((part.rows, part.columns)):
                if own[dim]:
                    less = [value / 2 if place == dim else value for place, value in enumerate(own)]
                    saved = max(by_scipy(part, own) - by_scipy(part, less), 0) / (own[dim] / 2)
                    prices += torch.bincount(axis.classes, minlength=9) * saved
        assert torch.allclose(model.prices(kept), prices)
