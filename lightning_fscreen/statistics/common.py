"""What features that say nothing of the classes have in common with those that do.

A feature may have the same distribution in all classes and help nevertheless: where it moves with another one, it tells
what in that one has nothing to do with the class (a *suppressor* variable: the intensity of a spectrum, the drift of a
sensor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fscreen.functional import LEVEL, ClassSums, f_critical

_ROWS, _BYTES = 256, 4 * 2**20  # of a sample
_FEWEST = 30  # instances; with so many, half of the variance is in common by accident once in 10⁵ times
_PARTNERS = 64


class CrossSums(NamedTuple):
    """Products of a features with b others over instances, all float64; w is measured from the mean of its class.

    Attributes:
        products: (a, b) Σ w_i w_j.
        squares: (a,) Σ w_i².
        fourths: (a,) Σ w_i⁴.
        others: (b,) Σ w_j².
    """

    products: Tensor
    squares: Tensor
    fourths: Tensor
    others: Tensor


class Marks(NamedTuple):
    """In how many processes something holds of every feature.

    Attributes:
        counts: (p,) float64.
    """

    counts: Tensor


class Sample:
    """The first instances of a round at some features; where these are very many, too few to say anything.

    Args:
        columns: of these features among all, in order.
    """

    def __init__(self, columns: Tensor) -> None:
        self._columns = columns
        self._missing = min(_ROWS, _BYTES // (4 * len(columns))) if len(columns) else 0
        self._rows: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, features: Tensor, labels: Sequence[Tensor]) -> None:
        """Take what is missing.

        Args:
            features: (N, all features).
            labels: of one batch after another, N in all: (N,) class indices or (N, C) class weights.
        """
        if self._missing:
            rows = features[: self._missing].index_select(1, self._columns)
            self._rows.append(rows)
            self._labels.append(torch.cat(list(labels))[: len(rows)])
            self._missing -= len(rows)

    def offsets(self, columns: Tensor, means: Tensor) -> Tensor:
        """Deviations (n, features) from the class means (C, features), float64; instances without a label are left out.

        Args:
            columns: of some of the features, among all.
            means: theirs.
        """
        if not self._rows:
            return means[:0]
        places = torch.searchsorted(self._columns, columns)
        rows, labels = torch.cat(self._rows).index_select(1, places).double(), torch.cat(self._labels)
        if labels.is_floating_point():
            return rows - labels.double() @ means
        inside = (labels >= 0) & (labels < len(means))
        return rows[inside] - means[labels[inside].long()]

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and primitives."""
        rows, labels = list(self._rows), list(self._labels)
        return {"columns": self._columns, "missing": self._missing, "rows": rows, "labels": labels}

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> Sample:
        """From what `state_dict` gave."""
        sample = cls(state["columns"].to(device))
        sample._missing = state["missing"]
        sample._rows, sample._labels = ([part.to(device) for part in state[key]] for key in ("rows", "labels"))
        return sample


def shared_variance(
    sample: Sample,
    first: int,
    sums: ClassSums,
    marginal: Tensor,
    degrees: tuple[float, float],
    learned: Tensor,
    merge: Callable[[CrossSums], CrossSums],
) -> Tensor:
    """How much of a feature's variance within classes it has in common with one that differs between the classes.

    The largest squared correlation within classes of a *silent* feature, whose statistic is below its critical value at
    level α = 0.001, with up to 64 of the features that exceed it at level α/p, p the number of features.

    Args:
        sample: instances of this process.
        first: column of the first of these p features among all.
        sums: of their classes in all processes, with counts (C, p).
        marginal: (p,) the larger of the F-statistics of the mean and of the spread.
        degrees: of freedom of both.
        learned: (p,) whether the network has learned the feature, in any process; then it is not looked at.
        merge: adds the sums of other processes; all of them call it, or none.

    Returns:
        (p,) float64; 0 for the others, and where fewer than 30 instances, as (Σ w²)² / Σ w⁴ counts them, make up a
        feature's variance: the same few outliers in two features are no common cause.
    """
    shared, given = torch.zeros_like(marginal), ~learned
    number = int(given.sum())
    if not number:
        return shared
    silent = given & (marginal <= f_critical(LEVEL, *degrees))
    partners = (given & (marginal > f_critical(LEVEL / number, *degrees))).nonzero().flatten()
    if not len(partners) or not bool(silent.any()):
        return shared
    partners = partners[:: -(-len(partners) // _PARTNERS)]
    means = sums.shift + sums.sums / sums.counts.clamp(min=1)
    own, others = (
        sample.offsets(first + places, means[:, places]) for places in (silent.nonzero().flatten(), partners)
    )
    squares = own.square()
    cross = merge(CrossSums(own.T @ others, squares.sum(0), squares.square().sum(0), others.square().sum(0)))
    correlation = cross.products.square() / (cross.squares.unsqueeze(1) * cross.others)
    enough = cross.squares**2 >= _FEWEST * cross.fourths
    return shared.masked_scatter(silent, torch.where(enough, correlation.nan_to_num(0).amax(1), 0.0))
