"""Ranking metrics: from the values of the candidates, and what the activations said, to scores.

A criterion ranks all candidates of a network together, so it sees all layers at once and may normalise over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranked:
    """The candidates of one layer, as a criterion sees them.

    Attributes:
        weight: the values: connection weights w, or scales γ of batch-norm channels.
        kept: boolean mask of the same shape, False where a candidate is pruned already.
        f: F-statistics, broadcastable to the same shape; None if no statistics were collected.
    """

    weight: Tensor
    kept: Tensor
    f: Tensor | None = None


Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Criterion:
    """A named way to score candidates.

    Attributes:
        score: (layers, screening_weight, generator) → {layer: scores}, higher is more important; the scores of
            candidates that are pruned already do not matter.
        needs_statistics: whether it wants `Ranked.f`, for a given screening_weight.
    """

    score: Callable[[Mapping[str, Ranked], float, torch.Generator], Scores]
    needs_statistics: Callable[[float], bool]


CRITERIA: dict[str, Criterion] = {}


def register_criterion(
    name: str, needs_statistics: Callable[[float], bool] = lambda screening_weight: False
) -> Callable[[Callable[[Mapping[str, Ranked], float, torch.Generator], Scores]], Callable[..., Scores]]:
    """Decorator that makes a scoring function available as `criterion=name`.

    Raises:
        ValueError: the name is taken.
    """

    def register(score: Callable[[Mapping[str, Ranked], float, torch.Generator], Scores]) -> Callable[..., Scores]:
        if name in CRITERIA:
            raise ValueError(f"a criterion named {name!r} is registered already; choose another name")
        CRITERIA[name] = Criterion(score, needs_statistics)
        return score

    return register


def resolve_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ValueError: unknown name.
    """
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion {name!r}; choose one of {sorted(CRITERIA)} or register your own")
    return CRITERIA[name]


@register_criterion("screening", needs_statistics=lambda screening_weight: screening_weight > 0)
def screening(layers: Mapping[str, Ranked], screening_weight: float, generator: torch.Generator) -> Scores:
    """R = λ·F̂ + (1 − λ)·|w|^, the paper's fused metric (Eq. 5 and 6), λ = `screening_weight`.

    ^ divides by the mean over the candidates that are left, in all layers: F and magnitudes have different units, and
    the paper does not say how it scales them. An infinite F counts as the largest finite one.
    """
    dtypes = {name: torch.promote_types(layer.weight.dtype, torch.float32) for name, layer in layers.items()}
    magnitudes = _normalised({name: layer.weight.abs().to(dtypes[name]) for name, layer in layers.items()}, layers)
    if screening_weight == 0:
        return magnitudes
    f = {}
    for name, layer in layers.items():
        if layer.f is None:
            raise ValueError(f"criterion 'screening' needs the F-statistics of layer {name!r}, none were collected")
        f[name] = layer.f.to(layer.weight.device, dtypes[name])
    finite = [values[torch.isfinite(values)] for values in f.values()]
    largest = max((float(values.max()) for values in finite if len(values)), default=0.0) or 1.0
    f = _normalised({name: values.clamp(max=largest) for name, values in f.items()}, layers)
    return {name: screening_weight * f[name] + (1 - screening_weight) * magnitudes[name] for name in layers}


@register_criterion("magnitude")
def magnitude(layers: Mapping[str, Ranked], screening_weight: float, generator: torch.Generator) -> Scores:
    """R = |w|: the classical baseline (Han et al. 2015)."""
    return {name: layer.weight.abs() for name, layer in layers.items()}


@register_criterion("random")
def random(layers: Mapping[str, Ranked], screening_weight: float, generator: torch.Generator) -> Scores:
    """R uniform on [0, 1): the baseline that every criterion has to beat."""
    return {
        name: torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
        for name, layer in layers.items()
    }


def _normalised(values: Mapping[str, Tensor], layers: Mapping[str, Ranked]) -> Scores:
    """Divide by the mean over all candidates that are left."""
    total = sum(float((value * layers[name].kept).sum(dtype=torch.float64)) for name, value in values.items())
    mean = total / max(sum(int(layer.kept.sum()) for layer in layers.values()), 1)
    scale = 1 / mean if mean > 0 else 1.0
    return {name: value * scale for name, value in values.items()}
