"""Evidence for features: four tests of whether a feature has any bearing on the classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from lightning_fscreen.functional import LEVEL, f_critical
from lightning_fscreen.ranking.criteria import ScoringInputs, required

_FEWEST = 10  # features that make a null distribution
_WORTH = 0.01  # of the error
_MOST = 0.5  # of a feature's variance
_SIMILAR, _APART = 2 / 3, 0.95
_MEDIAN_ERROR = math.sqrt(math.pi / 2)  # of a median of n normal variables, in σ/√n
_NORMAL_MAD = NormalDist().inv_cdf(0.75)  # median absolute deviation of a standard normal variable


@dataclass(frozen=True)
class Evidence:
    """Results of the tests for the features that one layer reads (or, with channels, for its outputs).

    Attributes:
        significant: boolean, broadcastable to the weight: whether a test speaks for the feature. Where `trusted`, True
            of all that are not dead.
        features: number of features that were tested.
        mean: how many the test of means speaks for.
        spread: how many of the others the test of spread speaks for.
        shared: how many of the others have most of their variation in common with such features.
        joint: how many of the others the test of joint effects speaks for.
        dead: how many of those with candidates left are zero on all instances.
        learned: how many more features there are, which the network has learned; not tested unless all of them are.
        preferred: whether the network makes half as much again of the silent features as of the established ones, now
            or at an earlier ranking.
        trusted: why magnitude alone ranks the layer; None if the tests decide.
    """

    significant: Tensor
    features: int
    mean: int
    spread: int
    joint: int
    shared: int = 0
    dead: int = 0
    learned: int = 0
    preferred: bool = False
    trusted: str | None = None

    @property
    def silent(self) -> int:
        """Features that no test speaks for."""
        return self.features - self.mean - self.spread - self.shared - self.joint

    @property
    def shrunk(self) -> int:
        """Features whose weights go before the others."""
        return self.dead if self.trusted else self.silent

    def __str__(self) -> str:
        others = f"; {self.learned} more are learned" if self.learned else ""
        if self.trusted:
            dead = f"; {self.dead} that are always zero are shrunk" if self.dead else ""
            return f"ranked by magnitude alone, for {self.trusted}{others}{dead}"
        return (
            f"of {self.features} features {self.mean} are spoken for by class means, {self.spread} more by spread, "
            f"{self.shared} more by what they have in common with these, {self.joint} more by joint effects; "
            f"{self.silent} are shrunk{others}"
        )

    def to_dict(self) -> dict[str, int | str | None]:
        """The counts, as in a report."""
        names = ("features", "mean", "spread", "shared", "joint", "shrunk", "learned", "preferred", "trusted")
        return {name: getattr(self, name) for name in names}


def gather_evidence(layer: ScoringInputs, name: str) -> Evidence:
    """Test the features of a layer at level α = 0.001.

    - **mean**: F, the F-statistic of the feature, above its critical value.
    - **spread**: the F-statistic of its squared deviation from its mean, (x − x̄)², above the same value: Levene's test
      with squares. It sees classes that differ in variance, or in sign.
    - **shared** variation: of a feature that both are silent about, more than half of its variance within the classes
      is common with one that passes at level α/p, p the number of features (the union bound): whatever moves the two
      can be taken off the other one. Seen on 256 instances (`statistics.common.shared_variance`).
    - **joint** effects, which no test of one feature sees: how much the network makes of it, g = Σ w² over what is left
      of its connections. It speaks for a feature that the other tests are silent about if log g stands out from the
      others of that kind, by more than z(1 − α) standard deviations (from the median absolute deviation) above their
      median; or, once most of them have no connections left, if it has held on to more connections than by accident at
      level α, their numbers being Poisson-distributed about the mean; or if g is above the upper quartile of the
      *established* features: those that pass a test of mean, spread or joint effects at level α/p.

    Features that the network has learned (`ScoringInputs.learned`) are trusted, not shrunk: training itself shrinks the
    weights of those that do not help; to screen them as well made some networks worse, and only one, trained for a few
    hundred steps, better. Where a layer also reads others (embeddings beside numbers), those are tested alone.

    All features of a layer are trusted where

    - there are no statistics, because it ran on windows or patches that nobody can assign to the labels;
    - none is established: there is no telling relevant from irrelevant ones;
    - the silent features, each of which tells too little to be seen, would help all together: they tell more than
      irrelevant ones do at level α, and enough to lower the error by a point. Told is δ² = Σ (C − 1)(F − F₀)/N, of
      means and of spread, F₀ = the expectation of F for irrelevant features: of independent features, the mean squared
      distance of the class means from their mean. The error is taken for Φ(−δ), that of two classes between which the
      nearest mean decides, of those that a test speaks for and of all;
    - the network makes as much of the silent features as of the established ones, by their medians: it has found uses
      for them that the tests do not see. Two thirds are enough where it tells the two clearly apart (less is made of
      the silent one in 95 % of the pairs), for then what it makes of the silent ones is no accident. If it has once
      made half as much again of them, and that is none at level α either (the medians of log g differ by more than
      z(1 − α) standard errors), they stay trusted: later it makes less of them only because pruning leaves it less.

    *Dead* features are never trusted: where x = 0 on all instances, nothing depends on w·x, and the size of w says only
    where it started. (Where instances are too few for any test, they are too few for this, too.)

    Args:
        layer: with `f` and `degrees`; without `spread`, `variance` or `mean_square` what needs them is left out.
        name: of the layer, for messages.

    Raises:
        ValueError: no statistics were gathered.
    """
    if layer.unmatched is not None:
        everything = torch.ones_like(layer.weight, dtype=torch.bool)
        why = f"it {layer.unmatched}, and it is not known which belong to which"
        return Evidence(significant=everything, features=0, mean=0, spread=0, joint=0, trusted=why)
    f = required(layer.f, "activations", name).double()
    between, within = layer.degrees or (1.0, math.inf)
    shape = f.shape if layer.variance is None else layer.variance.shape
    learned = torch.zeros(shape, dtype=torch.bool, device=f.device) if layer.learned is None else layer.learned
    given = ~learned | learned.all()  # if all are learned, their counts are only reported
    number = int(given.sum())
    critical = f_critical(LEVEL, between, within)
    # A statistic that could not be computed (its sums overflowed) says nothing.
    spread = f if layer.spread is None else layer.spread.double().nan_to_num(nan=0, posinf=math.inf)
    marginal = torch.maximum(f, spread)
    spoken, mean = _by_feature(marginal > critical, shape) & given, _by_feature(f > critical, shape) & given
    counts: dict[str, Any] = {"features": number, "mean": int(mean.sum()), "spread": int((spoken & ~mean).sum())}
    if math.isinf(critical):
        why = "too few instances for any test"
        return Evidence(significant=torch.ones_like(f, dtype=torch.bool), joint=0, trusted=why, **counts)
    alive = torch.ones_like(f, dtype=torch.bool) if layer.mean_square is None else layer.mean_square != 0
    counts["dead"] = int((~_by_feature(alive, shape) & _by_feature(layer.kept, shape)).sum())
    if bool(learned.all()):
        return Evidence(significant=alive, joint=0, trusted="the network has learned these features", **counts)
    counts["learned"] = int(learned.sum())
    strict = f_critical(LEVEL / number, between, within)
    varies = _by_feature(f > 0, shape) if layer.variance is None else layer.variance > 0
    made = (layer.weight * layer.kept).double().square().sum_to_size(shape)
    shared = torch.zeros_like(spoken) if layer.shared is None else (layer.shared > _MOST) & ~spoken & varies & given
    counts["shared"] = int(shared.sum())
    spoken = spoken | shared
    silent = ~spoken & varies & given
    outlying = _deviations(made, layer.kept.double().sum_to_size(shape), silent)
    z, strict_z = (NormalDist().inv_cdf(1 - level) for level in (LEVEL, LEVEL / number))
    established = (_by_feature(marginal > strict, shape) & given) | (outlying > strict_z)
    reference = made[established].sort().values
    joint = outlying / z
    if len(reference):
        quartile = reference[(3 * len(reference)) // 4].clamp(min=torch.finfo(made.dtype).tiny)
        joint = torch.where(silent, torch.maximum(joint, made / quartile), 0.0)
    counts |= {"joint": int((joint > 1).sum())}
    preferred = bool((layer.last or {}).get("preferred")) or _preferred(made[silent & ~established], reference)
    trusted = None
    if not len(reference):
        trusted = "no feature stands out"
    elif _would_help(f, spread, silent, spoken, (between, within)):
        trusted = "those that no test speaks for tell the classes apart all together"
    elif preferred:
        trusted = "the network has made more of features that no test speaks for than of the others"
    elif _used_alike(made[silent & ~established], reference):
        trusted = "the network makes nearly as much of features that no test speaks for as of the others"
    significant = alive if trusted else torch.where(learned, alive, (marginal > critical) | shared | (joint > 1))
    return Evidence(significant=significant, trusted=trusted, preferred=preferred, **counts)


def _deviations(made: Tensor, left: Tensor, silent: Tensor) -> Tensor:
    """By how many standard deviations silent features stand out from each other; 0 elsewhere.

    By log `made`; by the number of connections that are left once most of them have none: what the network has held on
    to is no sample of irrelevant features then. 0 everywhere if they are too few to be compared.
    """
    nothing = torch.zeros_like(made)
    if int(silent.sum()) < _FEWEST:
        return nothing
    null = silent & (made > 0)
    logarithms = made[null].log()
    if len(logarithms) < max(_FEWEST, int(silent.sum()) / 2):
        return nothing.masked_scatter(silent, _surprise(left[silent]))
    offsets, deviation = _spread_of(logarithms)
    return nothing.masked_scatter(null, (offsets / deviation).clamp(min=0))


def _spread_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets from the median, and the standard deviation that their own median stands for; not zero."""
    offsets = values - values.median()
    return offsets, (offsets.abs().median() / _NORMAL_MAD).clamp(min=torch.finfo(values.dtype).tiny)


def _surprise(counts: Tensor) -> Tensor:
    """How improbable it is that a number is so large, as deviations of a normal variable; 0 for those below the median.

    P(X ≥ k) of a Poisson variable with the mean m of all numbers is the regularised incomplete gamma function P(k, m).
    """
    tail = torch.special.gammainc(counts.clamp(min=1), counts.mean()).clamp(min=torch.finfo(counts.dtype).tiny)
    return torch.where(counts > 0, -torch.special.ndtri(tail), 0.0).clamp(min=0)


def _would_help(f: Tensor, spread: Tensor, silent: Tensor, spoken: Tensor, degrees: tuple[float, float]) -> bool:
    """Whether silent features together tell more than by accident, and so much that the error would be lower."""
    between, within = degrees
    if not within > 2:  # else F has no expectation
        return False
    means, spreads = (
        between * (each - 1 / (1 - 2 / within)).nan_to_num(nan=0, posinf=math.inf).sum_to_size(silent.shape)
        for each in (f, spread)
    )
    alike = f.numel() / silent.numel()  # connections with a statistic of their own
    accident = math.sqrt(2 * between * int(silent.sum()))
    if not float(means[silent].sum()) / alike > NormalDist().inv_cdf(1 - LEVEL) * accident:
        return False
    known, more = (
        max(float((means + spreads)[those].sum()) / alike / (between + within + 1), 0.0) for those in (spoken, silent)
    )
    error, lower = (NormalDist().cdf(-math.sqrt(told)) for told in (known, known + more))
    return error - lower > _WORTH


def _preferred(silent: Tensor, established: Tensor) -> bool:
    """Whether half as much again is made of silent features as of established ones, and not by accident."""
    if len(silent) < _FEWEST or not len(established) or not bool(silent.median() * established.median() > 0):
        return False
    logarithms = silent[silent > 0].log()
    error = _MEDIAN_ERROR * float(_spread_of(logarithms)[1]) * math.sqrt(1 / len(silent) + 1 / len(established))
    least = max(NormalDist().inv_cdf(1 - LEVEL) * error, -math.log(_SIMILAR))
    return float(logarithms.median() - established.log().median()) > least


def _used_alike(silent: Tensor, established: Tensor) -> bool:
    """Whether as much is made of silent features as of established ones (sorted), or two thirds without overlap."""
    if not len(silent) or not bool(silent.median() > 0):
        return False
    ratio = float(silent.median() / established.median())
    below = 1 - torch.searchsorted(established, silent, right=True).double().mean() / len(established)
    return ratio >= 1 or (ratio >= _SIMILAR and float(below) >= _APART)


def _by_feature(true: Tensor, shape: torch.Size) -> Tensor:
    """Whether it is true of any connection of a feature."""
    return true if true.shape == shape else true.double().sum_to_size(shape) > 0
