"""Class sums of every connection's contribution w·x, for F-statistics per connection while the weights move."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_fscreen.functional import ClassSums


def per_connection(module: nn.Module, values: Tensor) -> Tensor:
    """Spread a value per input over the connections that read that input.

    Args:
        module: a linear or convolution layer.
        values: (*, in).

    Returns:
        (*, …), the dimensions after `*` broadcastable to the weight's shape.
    """
    if isinstance(module, nn.Linear):
        return values.unsqueeze(-2)
    assert isinstance(module, _ConvNd)
    kernel = [1] * len(module.kernel_size)
    if isinstance(module, _ConvTransposeNd):
        return values.reshape(*values.shape, 1, *kernel)
    groups, batch = module.groups, values.shape[:-1]
    by_group = values.reshape(*batch, groups, 1, module.in_channels // groups)
    rows = by_group.expand(*batch, groups, module.out_channels // groups if groups > 1 else 1, -1)
    return rows.reshape(*batch, -1, module.in_channels // groups, *kernel)


class ConnectionSums:
    """Online class sums of the contributions of one layer's connections.

    The contribution of connection i→o in a step is w_oi·x_i (Eq. 5's feature). F does not change when a feature is
    scaled, so with fixed weights these sums and the inputs' own give the same F; they differ by the weights' movement
    while the sums are gathered. They take (C + 2) × the weight's size in float64: C times as much as the inputs' sums.

    With x = a + d (a the inputs' shift), s the connection's shift and u = w·a − s, one batch adds
    S_c += n_c u + w Σ_{k∈c} d_k  and  Q += n u² + 2 u w Σ d + w² Σ d².
    """

    def __init__(self, module: nn.Module, num_classes: int) -> None:
        self._module = module
        weight = module.get_parameter("weight")
        zeros = torch.zeros((num_classes + 2, *weight.shape), dtype=torch.float64, device=weight.device)
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=weight.device)
        self.shift, self.squares, self.sums = zeros[0], zeros[1], zeros[2:]
        self._empty = True

    def reset(self) -> None:
        """Forget all sums."""
        for sums in (self.shift, self.counts, self.sums, self.squares):
            sums.zero_()
        self._empty = True

    def update(self, inputs: ClassSums, weight: Tensor) -> None:
        """Add a batch: the sums of its inputs, and the weight they were multiplied with."""
        weight = weight.to(torch.float64)
        origin, squares = per_connection(self._module, torch.stack([inputs.shift, inputs.squares]))
        by_class = per_connection(self._module, inputs.sums)
        if self._empty:
            self.shift.copy_(weight * origin)
            self._empty = False
        step = weight * origin - self.shift
        counts = inputs.counts.reshape(-1, *[1] * weight.ndim)
        self.counts += inputs.counts
        self.sums += counts * step + weight * by_class
        self.squares += inputs.counts.sum() * step**2 + 2 * step * weight * by_class.sum(0) + weight**2 * squares

    def class_sums(self) -> ClassSums:
        """The sums with one feature per connection, in the weight's flattened order."""
        return ClassSums(self.shift.flatten(), self.counts, self.sums.flatten(1), self.squares.flatten())

    def load(self, sums: ClassSums) -> None:
        """Continue from sums that `class_sums` gave."""
        self.shift.copy_(sums.shift.view_as(self.shift))
        self.counts.copy_(sums.counts)
        self.sums.copy_(sums.sums.view_as(self.sums))
        self.squares.copy_(sums.squares.view_as(self.squares))
        self._empty = not bool(self.counts.any())
