"""Class sums of every connection's contribution w·x, for F-statistics per connection while the weights move."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_fscreen.candidates.weights import PrunableWeight
from lightning_fscreen.functional import ClassSums


class ConnectionSums:
    """Online class sums of the contributions of one layer's connections.

    The contribution of connection i→o in a step is w_oi·x_i (Eq. 5's feature). F does not change when a feature is
    scaled, so with fixed weights these sums say what the inputs' own sums say; they differ by the weights' movement
    while the sums are gathered. They take (C + 2) × the weight's size in float64: C times what the inputs' sums take.

    With x = a + d (a the inputs' shift), s the connection's shift and u = w·a − s, one batch adds
    S_c += n_c u + w Σ_{k∈c} d_k  and  Q += n u² + 2 u w Σ d + w² Σ d².
    """

    def __init__(self, candidate: PrunableWeight, num_classes: int) -> None:
        self._candidate = candidate
        weight = candidate.weight
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
        origin, squares = self._candidate.per_connection(torch.stack([inputs.shift, inputs.squares]))
        by_class = self._candidate.per_connection(inputs.sums)
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
