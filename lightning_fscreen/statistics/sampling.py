"""How many instances the tests need, and which batches of an epoch give them."""

from __future__ import annotations

import math
from statistics import NormalDist

from lightning_fscreen.functional import LEVEL, f_critical

_POWER = 0.9
_EFFECT = 0.01  # share of a feature's variance between the classes


def instances_needed(num_classes: int) -> int:
    """Instances with which the F-test finds a small effect: 1 % of the variance between classes, power 0.9, α = 0.001.

    For many instances (C − 1)·F is χ² with k = C − 1 degrees of freedom, non-central by δ = n·η²/(1 − η²), of mean
    k + δ and variance 2 (k + 2 δ). It exceeds the critical value c with probability 0.9 where
    k + δ − z·√(2 (k + 2 δ)) = c; solved for n: some 2,000 for 2 classes, 3,200 for 10, 21,000 for 1,000.

    Args:
        num_classes: C ≥ 2.
    """
    k = num_classes - 1
    excess = k * f_critical(LEVEL, k, math.inf) - k
    z = NormalDist().inv_cdf(_POWER)
    # (δ − excess)² = 2 z² (k + 2 δ)
    half = excess + 2 * z**2
    delta = half + math.sqrt(half**2 - excess**2 + 2 * z**2 * k)
    return math.ceil(delta * (1 - _EFFECT) / _EFFECT)


def collection_stride(num_batches: float, instances: int, num_classes: int) -> int:
    """The stride of the gathered batches: evenly spaced, with as many instances as the tests need.

    Args:
        num_batches: batches until the next pruning; inf if that is not known, then every batch is gathered.
        instances: of a batch, in all processes together.
        num_classes: number of classes.
    """
    if math.isinf(num_batches):
        return 1
    return max(int(num_batches * instances // instances_needed(num_classes)), 1)
