"""Sums of the first four powers of features, by class, for the F-statistics of their means and of their spread.

Like `functional.ClassSums`, which they extend, they are additive: any batches in any order, merged exactly.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_fscreen.functional import ClassSums, f_from_sums, f_statistic_merge, per_feature, rounding_of
from lightning_fscreen.functional.members import Members
from lightning_fscreen.statistics.common import CrossSums, Marks


class ClassMoments(NamedTuple):
    """Power sums of `p` features in `C` classes, all float64; d = x − shift.

    Attributes:
        shift: (p,) origin from which each feature is measured; the nearer to its mean, the better.
        counts: (C,) n_c, or (C, p) where features saw different numbers of instances.
        sums: (C, p) Σ_{k∈c} d_k.
        squares: (C, p) Σ_{k∈c} d_k².
        cubes: (p,) Σ_k d_k³.
        fourths: (p,) Σ_k d_k⁴.
    """

    shift: Tensor
    counts: Tensor
    sums: Tensor
    squares: Tensor
    cubes: Tensor
    fourths: Tensor

    @property
    def class_sums(self) -> ClassSums:
        """The part that the F-statistic of the means needs."""
        return ClassSums(self.shift, self.counts, self.sums, self.squares.sum(0))

    def add_(self, columns: slice | Tensor, batch: ClassMoments) -> None:
        """Add sums over other instances to those of some features, measured from the same origin, in place.

        Args:
            columns: of these features.
            batch: their sums, with counts (C,).
        """
        self.counts[:, columns] += batch.counts.unsqueeze(1)
        for total, part in zip(self[2:], batch[2:], strict=True):
            total[..., columns] += part


Sums = TypeVar("Sums", ClassSums, ClassMoments, CrossSums, Marks)


def empty_moments(num_classes: int, num_features: int, device: torch.device, by_feature: bool = False) -> ClassMoments:
    """Sums over nothing, views of one tensor.

    Args:
        num_classes: C.
        num_features: p.
        device: where.
        by_feature: whether counts are (C, p).
    """
    zeros = torch.zeros(2 * num_classes + 3, num_features, dtype=torch.float64, device=device)
    rows = zeros.split([1, num_classes, num_classes, 1, 1])
    counts = torch.zeros_like(rows[1]) if by_feature else zeros.new_zeros(num_classes)
    return ClassMoments(rows[0][0], counts, rows[1], rows[2], rows[3][0], rows[4][0])


def accumulate_moments_(moments: ClassMoments, offsets: Tensor, labels: Tensor) -> None:
    """Add offsets = features − shift, (N, p), to the sums in place; the offsets are overwritten.

    They are summed in their own dtype, float64 or, for batches where that is good enough, float32.

    Args:
        moments: the sums.
        offsets: (N, p).
        labels: (N,) class indices or (N, C) class weights.
    """
    members = Members(labels, len(moments.sums), offsets.dtype)
    members.leave_out_others_(offsets)
    powers = offsets.square()
    members.add_(moments.sums, offsets)
    members.add_(moments.squares, powers)
    moments.cubes.add_(members.total(offsets.mul_(powers)))
    moments.fourths.add_(members.total(powers.square_()))
    members.count_(moments.counts)


def merge_sums(first: Sums, second: Sums) -> Sums:
    """Sums over the union of two disjoint sets of instances; exact, whatever their shifts."""
    if isinstance(first, ClassSums):
        return f_statistic_merge(first, second)
    if isinstance(first, CrossSums | Marks):
        return type(first)(*(one + other for one, other in zip(first, second, strict=True)))
    empty = first.counts.sum(0) == 0  # then the other's shift is the one to keep
    shift = torch.where(empty, second.shift, first.shift)
    parts = zip(_from_origin(first, shift)[1:], _from_origin(second, shift)[1:], strict=True)
    return ClassMoments(shift, *(one + other for one, other in parts))


def _from_origin(moments: ClassMoments, shift: Tensor) -> ClassMoments:
    """The same sums measured from another origin (p,): binomial expansion of (d + e)^k with e = old − new origin."""
    e = moments.shift - shift
    counts, total = per_feature(moments.counts), per_feature(moments.counts).sum(0)
    sums, squares, cubes = moments.sums.sum(0), moments.squares.sum(0), moments.cubes
    return ClassMoments(
        shift,
        moments.counts,
        moments.sums + counts * e,
        moments.squares + 2 * e * moments.sums + counts * e**2,
        cubes + 3 * e * squares + 3 * e**2 * sums + total * e**3,
        moments.fourths + 4 * e * cubes + 6 * e**2 * squares + 4 * e**3 * sums + total * e**4,
    )


def spread_statistic(moments: ClassMoments) -> Tensor:
    """F-statistic of every feature's squared deviation from its mean, (x − x̄)²; (p,) float64.

    Where the classes differ in spread, so do the means of these squares: Levene's test of equal variances (1960), with
    squares for absolute values, because squares have sums. Its level holds for features with heavy tails and for those
    that are mostly zero, where Bartlett's test rejects nearly always.

    Returns:
        (p,) float64; NaN where fourth powers exceeded the range of the dtype that they were summed in.

    Raises:
        ValueError: fewer than two classes occur.
    """
    total = per_feature(moments.counts).sum(0)
    centred = _from_origin(moments, moments.shift + moments.sums.sum(0) / total)
    squares = ClassSums(torch.zeros_like(total), moments.counts, centred.squares, centred.fourths)
    # What centring cancelled was rounded before: by the power sums as they were kept.
    f = f_from_sums(squares, rounding_of(total, torch.maximum(moments.fourths, centred.fourths)))
    # Fourth powers of tiny or huge float32 values may have left the range: then they are no longer ≥ (Σd²)²/n.
    return torch.where(centred.fourths * total >= 0.99 * centred.squares.sum(0) ** 2, f, torch.nan)
