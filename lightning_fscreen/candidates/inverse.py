"""Where an activation function takes a given value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_GRID = 1000  # points on either side, per search
_ZOOMS = 4
_REACH = 30.0


def inverse(activation: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Where an element-wise function takes given values, or comes nearest to them; the point closest to zero.

    Args:
        activation: the function.
        values: (n,).

    Returns:
        (n,), of the same dtype.
    """
    wanted = values.double().unsqueeze(1)
    reach = max(_REACH, 2 * float(wanted.abs().max())) if len(values) else _REACH
    centre = torch.zeros_like(wanted)
    points = torch.arange(-_GRID, _GRID + 1, dtype=torch.float64, device=values.device) / _GRID
    points = points[points.abs().argsort(stable=True)]  # the first of equals is the closest to the centre
    for _ in range(_ZOOMS):
        grid = centre + reach * points
        nearest = (activation(grid) - wanted).abs().sort(dim=1, stable=True).indices[:, :1]
        centre = grid.gather(1, nearest)
        reach *= 2 / _GRID
    return centre.squeeze(1).to(values)
