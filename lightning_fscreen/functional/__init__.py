"""The one-way F-statistic as pure functions: batch sums, their merge, and the statistic they give.

Only additive sums are kept (Eq. 4 of "Exploring Neural Network Pruning with Screening Methods", arXiv 2502.07189), so
data can be fed in any batches and in any order, and the sums of several processes merge exactly. The paper's plain sums
are differences of large numbers when a feature's mean is far from zero; here every feature is measured from a `shift`
of its own, the first value seen, which removes that cancellation and makes constant features exactly constant.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fscreen.functional.members import IGNORED as IGNORED
from lightning_fscreen.functional.members import Members

_EPS = torch.finfo(torch.float64).eps
# Values converted to float64 at a time, so that their memory stays small.
_CHUNK = 2**20


class ClassSums(NamedTuple):
    """Sums over `p` features in `C` classes from which F is computed, all float64.

    Attributes:
        shift: (p,) origin from which each feature is measured; any value near the data.
        counts: (C,) n_c, instances per class, or (C, p) where features saw different numbers of instances.
        sums: (C, p) S_c = Σ_{k∈c} (x_k − shift).
        squares: (p,) Q = Σ_k (x_k − shift)².
    """

    shift: Tensor
    counts: Tensor
    sums: Tensor
    squares: Tensor


def f_statistic(features: Tensor, labels: Tensor, num_classes: int | None = None) -> Tensor:
    """One-way ANOVA F-statistic of every feature: between-class over within-class variance (Eq. 3).

        F = [ Σ_c n_c (x̄_c − x̄)² / (C − 1) ]  /  [ Σ_c Σ_{k∈c} (x_k − x̄_c)² / (n − C) ]

    `C` counts the classes that occur, as in `sklearn.feature_selection.f_classif`.

    Args:
        features: (N, p), any floating or integer dtype; computed in float64.
        labels: (N,) integer class indices (-100: the instance does not count), or (N, C) floating class weights ≥ 0
            (mixup, label smoothing): an instance then counts in each class with that weight.
        num_classes: number of classes; taken from the labels if None.

    Returns:
        (p,) float64. A constant feature has F = 0. A feature that is constant within every class but not over all, or
        with no more instances than classes (nothing is left to estimate the variance within), has F = +inf.

    Raises:
        ValueError: wrong shapes, labels out of range or of a dtype that is neither, fewer than two classes.
    """
    if num_classes is None:
        num_classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1 if labels.numel() else 0
    return f_statistic_compute(f_statistic_update(features, labels, num_classes))


def check_num_classes(num_classes: int | None) -> None:
    """Check that there are classes to compare, if their number is given.

    Raises:
        ValueError: fewer than two.
    """
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes must be at least 2 (the F-statistic compares classes), got {num_classes}")


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Check form and values of labels; the values of labels on an accelerator are waited for.

    Raises:
        ValueError: labels that are neither integers of shape (N,) nor floating (N, num_classes), class indices outside
            0 … num_classes − 1 (except -100), class weights that are negative or not finite.
    """
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ValueError(
                f"labels of dtype {labels.dtype} must be class weights of shape (N, {num_classes}), got shape "
                f"{tuple(labels.shape)}; pass integer class indices of shape (N,), or the right num_classes=. To prune "
                'without classes (regression, one logit), use criterion="magnitude" or "taylor"'
            )
        if not bool((torch.isfinite(labels) & (labels >= 0)).all()):
            raise ValueError("class weights in labels must be finite and not negative; pass the mixing proportions")
        return
    if labels.ndim != 1:
        raise ValueError(
            f"labels of dtype {labels.dtype} must have shape (N,), got {tuple(labels.shape)}; pass class indices, or "
            "floating class weights of shape (N, C). To prune without one class per instance (segmentation), use "
            'criterion="magnitude" or "taylor"'
        )
    if _wrong(labels, num_classes) is None:  # as a rule; to look for IGNORED takes a training step several times longer
        return
    wrong = _wrong(labels[labels != IGNORED], num_classes)
    if wrong is not None:
        raise ValueError(
            f"labels must lie in 0 … {num_classes - 1}, found {wrong}; pass num_classes= the number of classes, and "
            f"mark instances without a label by {IGNORED}, or leave them out"
        )


def _wrong(labels: Tensor, num_classes: int) -> int | None:
    """A class index outside 0 … num_classes − 1; None if there is none."""
    if labels.numel() == 0:
        return None
    low, high = (int(bound) for bound in labels.aminmax())
    return low if low < 0 else high if high >= num_classes else None


def f_statistic_update(features: Tensor, labels: Tensor, num_classes: int, shift: Tensor | None = None) -> ClassSums:
    """Sums of one batch.

    Args:
        features: (N, p).
        labels: (N,) class indices or (N, C) class weights.
        num_classes: C.
        shift: (p,) origin; the first instance that counts if None.

    Raises:
        ValueError: as `f_statistic`.
    """
    if features.ndim != 2:
        raise ValueError(f"features must have shape (N, p), got {tuple(features.shape)}")
    if len(features) != len(labels):
        raise ValueError(f"features and labels differ in length: {len(features)} and {len(labels)}")
    check_labels(labels, num_classes)
    labels = labels.to(features.device)
    if shift is None and not len(features):
        shift = torch.zeros_like(features[:0].sum(0), dtype=torch.float64)
    elif shift is None:
        first = 0 if labels.is_floating_point() else (labels != IGNORED).int().argmax()
        shift = features[first].double()
    zeros = torch.zeros(num_classes + 1, features.shape[1], dtype=torch.float64, device=features.device)
    sums = ClassSums(shift, zeros.new_zeros(num_classes), zeros[1:], zeros[0])
    accumulate_(sums, features, labels)
    return sums


def accumulate_(sums: ClassSums, features: Tensor, labels: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Add a batch, measured from `sums.shift`, to the sums in place; without the checks of `f_statistic_update`.

    Args:
        sums: the sums.
        features: (N, p).
        labels: (N,) class indices or (N, C) class weights.
        scratch: the memory that an earlier call returned, to spare its allocation.

    Returns:
        Memory that the next call can use.
    """
    chunk = max(min(_CHUNK // max(features.shape[1], 1), len(features)), 1)
    if scratch is None or len(scratch) < chunk:
        scratch = torch.empty((chunk, features.shape[1]), dtype=torch.float64, device=features.device)
    for start in range(0, len(features), len(scratch)):
        rows = features[start : start + len(scratch)]
        # Converting first is several times faster than a subtraction that promotes.
        offsets = scratch[: len(rows)].copy_(rows).sub_(sums.shift)
        accumulate_offsets_(sums, offsets, labels[start : start + len(scratch)])
    return scratch


def accumulate_offsets_(sums: ClassSums, offsets: Tensor, labels: Tensor) -> None:
    """Add offsets = features − shift, (N, p), to the sums in place; the offsets are overwritten.

    They are summed in their own dtype, float64 or, for batches where that is good enough, float32.
    """
    members = Members(labels, len(sums.sums), offsets.dtype)
    members.leave_out_others_(offsets)
    members.add_(sums.sums, offsets)
    sums.squares.add_(members.total(offsets.square_()))
    members.count_(sums.counts)


def f_statistic_merge(first: ClassSums, second: ClassSums) -> ClassSums:
    """Sums over the union of two disjoint sets of instances; exact, whatever their shifts.

    Measured from a' instead of a, with e = a − a':  S_c' = S_c + n_c e,  Q' = Q + 2 e S + n e².
    """
    empty = first.counts.sum(0) == 0  # a scalar, or per feature: then the other's shift is the one to keep
    shift = torch.where(empty, second.shift, first.shift)
    merged = [move_shift(sums, shift) for sums in (first, second)]
    return ClassSums(
        shift,
        merged[0].counts + merged[1].counts,
        merged[0].sums + merged[1].sums,
        merged[0].squares + merged[1].squares,
    )


def move_shift(sums: ClassSums, shift: Tensor) -> ClassSums:
    """The same sums measured from another origin (p,)."""
    step = sums.shift - shift
    counts = per_feature(sums.counts)
    squares = sums.squares + 2 * step * sums.sums.sum(0) + counts.sum(0) * step**2
    return ClassSums(shift, sums.counts, sums.sums + counts * step, squares)


def f_statistic_compute(sums: ClassSums) -> Tensor:
    """F of every feature, (p,) float64, from the sums of all batches; see `f_statistic`.

    Raises:
        ValueError: fewer than two classes occur.
    """
    return f_from_sums(sums, rounding_of(per_feature(sums.counts).sum(0), sums.squares))


def rounding_of(total: Tensor, squares: Tensor) -> Tensor:
    """Bound of the rounding error of float64 sums of squares over that many instances; below it is no variance."""
    return (64 + total) * _EPS * squares


def f_from_sums(sums: ClassSums, rounding: Tensor) -> Tensor:
    """As `f_statistic_compute`, where sums of squares (p,) are only known up to `rounding` (p,)."""
    counts = per_feature(sums.counts)
    present = counts > 0
    num_classes = present.sum(0)
    if bool((num_classes < 2).any()):
        found = present.any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"the F-statistic compares classes and needs at least two, found {found or 'no instances'}; "
            "feed instances of two classes or more"
        )
    total = counts.sum(0)
    class_means = torch.where(present, sums.sums / counts, 0.0)
    mean = sums.sums.sum(0) / total
    between = (counts * (class_means - mean) ** 2).sum(0)
    within = sums.squares - (counts * class_means**2).sum(0)
    within = torch.where(within <= rounding, 0.0, within)
    degrees_within = total - num_classes
    f = (between / (num_classes - 1)) / (within / degrees_within)
    f = torch.where((within == 0) | (degrees_within <= 0), torch.inf, f)
    f = torch.where((between <= rounding) & torch.isinf(f), 0.0, f)
    return torch.where(torch.isnan(between), torch.nan, f)


def per_feature(counts: Tensor) -> Tensor:
    """Counts (C,) or (C, p) as (C, 1) or (C, p)."""
    return counts.unsqueeze(1) if counts.ndim == 1 else counts


LEVEL = 1e-3
"""Level of the tests: a feature without any bearing on the classes passes one once in a thousand times."""


def f_critical(level: float, between: float, within: float) -> float:
    """The F-statistic that a feature without any bearing on the classes exceeds with probability `level`.

    Paulson's approximation (Annals of Mathematical Statistics 13, 1942): the cube root of F is nearly normal.

    Args:
        level: probability, 0 < level < ½.
        between: degrees of freedom between classes, C − 1.
        within: degrees of freedom within classes, n − C; may be inf.

    Returns:
        The critical value; inf where `within` is so small that the approximation has none.
    """
    if within <= 0:
        return math.inf
    z = NormalDist().inv_cdf(1 - level)
    a, b = 2 / (9 * between), 2 / (9 * within)
    curvature = (1 - b) ** 2 - z**2 * b
    if b >= 1 or curvature <= 0:
        return math.inf
    root = ((1 - a) * (1 - b) + z * math.sqrt(a * (1 - b) ** 2 + b * (1 - a) ** 2 - a * b * z**2)) / curvature
    return float(root**3)
