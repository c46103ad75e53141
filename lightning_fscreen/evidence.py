"""What speaks for a feature: three tests of whether it has any bearing on the classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_fscreen.criteria import Ranked, required
from lightning_fscreen.functional import f_critical

# A feature without any bearing on the classes passes each of the first two tests once in a thousand times.
LEVEL = 1e-3
_FEWEST = 10  # features that make a null distribution
_NORMAL_MAD = NormalDist().inv_cdf(0.75)  # median absolute deviation of a standard normal variable


@dataclass(frozen=True)
class Evidence:
    """What the tests say of the features that one layer reads (or, with channels, puts out).

    Attributes:
        strength: the largest ratio of a test's statistic to its critical value, broadcastable to the weight; above 1 a
            test speaks for the feature. 1 everywhere where `trusted`.
        features: number of features.
        mean: how many the test of means speaks for.
        spread: how many of the others the test of spread speaks for.
        joint: how many of the others the test of joint effects speaks for, or too few are left to be tested.
        trusted: why magnitude alone ranks the layer; None if the tests decide.
    """

    strength: Tensor
    features: int
    mean: int
    spread: int
    joint: int
    trusted: str | None = None

    @property
    def silent(self) -> int:
        """Features that no test speaks for."""
        return self.features - self.mean - self.spread - self.joint

    def __str__(self) -> str:
        if self.trusted:
            return f"ranked by magnitude alone, for {self.trusted}"
        return (
            f"of {self.features} features {self.mean} are spoken for by class means, {self.spread} more by spread, "
            f"{self.joint} more by joint effects; {self.silent} are shrunk"
        )

    def to_dict(self) -> dict[str, int | str | None]:
        """The counts, as in a report."""
        counts: dict[str, int | str | None] = {name: getattr(self, name) for name in ("features", "mean", "spread")}
        shrunk = 0 if self.trusted else self.silent
        return counts | {"joint": self.joint, "shrunk": shrunk, "trusted": self.trusted}


def gather_evidence(layer: Ranked, name: str) -> Evidence:
    """Test the features of a layer at level α = 0.001.

    - **mean**: F, the F-statistic of the feature, above its critical value.
    - **spread**: the F-statistic of its squared deviation from its mean, (x − x̄)², above the same value: Levene's test
      with squares. It sees classes that differ in variance, or in sign.
    - **joint** effects, which no test of one feature sees: how much the network makes of it, g = Σ w² over what is left
      of its connections. Features that the first two tests are silent about are each other's null distribution: log g
      above its median by more than z(1 − α/p) standard deviations (from the median absolute deviation), p the number of
      features: pruning thins that distribution out, and what is left of it must not pass. Where fewer than ten of them
      have connections left nothing can be told, and these count as spoken for.

    Features that the network has learned (`Ranked.learned`) are not tested but trusted: training itself shrinks the
    weights of those that do not help, and in all that was tried screening them as well made nothing better. So are
    those of a layer of which nothing is known yet: where no feature passes any test at level α/p (the union bound),
    there is no telling relevant from irrelevant ones.

    Args:
        layer: with `f` and `degrees`; without `spread` or `variance` those tests are left out.
        name: of the layer, for messages.

    Raises:
        ValueError: no statistics were gathered.
    """
    f = required(layer.f, "activations", name).double()
    between, within = layer.degrees or (1.0, math.inf)
    shape = f.shape if layer.variance is None else layer.variance.shape
    number = math.prod(shape)
    critical, strict = (f_critical(level, between, within) for level in (LEVEL, LEVEL / number))
    varies = _by_feature(f > 0, shape) if layer.variance is None else layer.variance > 0
    # A statistic that could not be computed (its sums overflowed) says nothing.
    marginal = f if layer.spread is None else torch.maximum(f, layer.spread.double().nan_to_num(nan=0, posinf=math.inf))
    spoken = _by_feature(marginal > critical, shape)
    outliers = _outliers(layer, ~spoken & varies)
    joint = NormalDist().inv_cdf(1 - LEVEL / number)
    mean = _by_feature(f > critical, shape)
    counts = {
        "features": number,
        "mean": int(mean.sum()),
        "spread": int((spoken & ~mean).sum()),
        "joint": int((outliers > joint).sum()),
    }
    trusted = None
    if layer.learned:
        trusted = "the network has learned these features"
    elif math.isinf(critical):
        trusted = "too few instances for any test"
    elif not bool((marginal > strict).any()) and not bool((outliers > joint).any()):
        trusted = "no test speaks for any feature"
    strength = torch.ones_like(f) if trusted else torch.maximum(marginal / critical, outliers / joint)
    return Evidence(strength=strength, trusted=trusted, **counts)


def _outliers(layer: Ranked, silent: Tensor) -> Tensor:
    """By how many standard deviations log g lies above its median over the `silent` features; 0 for all others.

    Infinity for silent features that are too few to be compared.
    """
    nothing = torch.zeros_like(silent, dtype=torch.float64)
    if layer.variance is None:
        return nothing
    made = (layer.weight * layer.kept).double().square().sum_to_size(silent.shape)
    null = silent & (made > 0)
    logarithms = made[null].log()
    if len(logarithms) < _FEWEST:
        return torch.where(null, math.inf, nothing)
    offsets = logarithms - logarithms.median()
    deviation = (offsets.abs().median() / _NORMAL_MAD).clamp(min=torch.finfo(torch.float64).tiny)
    return nothing.masked_scatter(null, (offsets / deviation).clamp(min=0))


def _by_feature(true: Tensor, shape: torch.Size) -> Tensor:
    """Whether it is true of any connection of a feature."""
    return true.double().expand(torch.broadcast_shapes(true.shape, shape)).sum_to_size(shape) > 0
