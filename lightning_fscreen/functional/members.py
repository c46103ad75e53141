"""Which instances belong to which class, and the sums over them."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""Label of instances that belong to no class, as in `torch.nn.functional.cross_entropy`; they do not count."""


class Members:
    """Which instances of a batch belong to which class, and the sums over them.

    Sums over classes that are indices need no product of matrices, which accelerators might round to TF32.

    Args:
        labels: (N,) class indices or (N, C) class weights.
        num_classes: C.
        dtype: of the values that are summed.
    """

    def __init__(self, labels: Tensor, num_classes: int, dtype: torch.dtype) -> None:
        self._num_classes = num_classes
        self._index: Tensor | None = None
        self._weights: Tensor | None = None
        self._inside: Tensor | None = None  # on accelerators: which instances are of a class
        self._outside: Tensor | None = None  # which are of none, where that is known
        if labels.is_floating_point():
            self._weights = labels.to(dtype)
        elif labels.device.type != "cpu":  # nobody waits there to learn whether some are of none: these count as zeros
            self._inside = (labels >= 0) & (labels < num_classes)
            self._index, self._outside = torch.where(self._inside, labels, 0).long(), ~self._inside
        elif not bool((outside := labels == IGNORED).any()):
            self._index = labels.long()
        else:
            self._outside = outside
            self._weights = (labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)).to(dtype)

    def leave_out_others_(self, values: Tensor) -> None:
        """Set the values (N, p) of instances of no class to zero, in place, whatever they are: NaN, too."""
        if self._outside is not None:
            values.masked_fill_(self._outside.unsqueeze(1), 0)

    def add_(self, totals: Tensor, values: Tensor) -> None:
        """Add Σ_{k∈c} of values (N, p) to float64 totals (C, p), in place."""
        if self._inside is not None:
            self._put_(totals, values)
            return
        own = totals if values.dtype == totals.dtype else torch.zeros_like(totals, dtype=values.dtype)
        if self._index is not None:
            own.index_add_(0, self._index, values)
        else:
            assert self._weights is not None
            own.addmm_(self._weights.T, values)
        if own is not totals:
            totals.add_(own)

    def total(self, values: Tensor) -> Tensor:
        """Σ_k of values (N, p) over all instances, those that count more or less than once included; (p,)."""
        if self._inside is not None:
            return values.sum(0, dtype=torch.float64)
        return values.sum(0) if self._weights is None else self._weights.sum(1) @ values

    def count_(self, counts: Tensor) -> None:
        """Add the number of instances of every class to counts, (C,) or (C, p), in place."""
        if self._inside is not None:
            found = self._put_(counts.new_zeros(self._num_classes), self._inside)
        elif self._index is not None:
            found = torch.bincount(self._index, minlength=self._num_classes)
        else:
            assert self._weights is not None
            found = self._weights.sum(0)
        counts.add_(found if counts.ndim == 1 else found.unsqueeze(1))

    def _put_(self, totals: Tensor, values: Tensor) -> Tensor:
        assert self._index is not None
        # The order of these additions is fixed, unlike that of index_add_ on accelerators.
        return totals.index_put_((self._index,), values.to(totals.dtype), accumulate=True)
