"""Ways to join the F-statistic with magnitude: λ, the `screening_weight`, goes from magnitude (0) to F alone (1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fscreen.ranking.criteria import (
    Scores,
    ScoringContext,
    ScoringInputs,
    register_criterion,
    required,
    scoring_dtype,
)
from lightning_fscreen.ranking.evidence import Evidence, gather_evidence

_SILENT = 1e-3  # of a feature that no test speaks for, in the end


def _wanted(screening_weight: float) -> bool:
    return screening_weight > 0


def _both(screening_weight: float) -> bool:
    return 0 < screening_weight < 1


def _explain(context: ScoringContext) -> dict[str, Evidence]:
    if context.screening_weight == 0:
        return {}
    return {name: gather_evidence(layer, name) for name, layer in context.layers.items()}


@register_criterion("screening", needs_statistics=_wanted, explain=_explain, idle_first=_both)
def screening(context: ScoringContext) -> Scores:
    """Rank by |w|^(1 − λ) · s^λ: s = 1 where there is evidence for the feature, else 10^(−3t); λ = `screening_weight`.

    Before all others go connections that are *idle*: what they read no longer depends on the input, or nothing reads
    what they write. They do nothing, whatever they weigh, so that others are kept in their place.

    There is evidence if one of the tests of `gather_evidence` speaks for it (the classes' means, their spread, joint
    effects), or if the features of the layer are trusted (because the network has learned them, or because nothing
    tells them apart) and this one is not dead, that is, zero on all instances: then magnitude decides. t is the
    `progress` of pruning, the share of the amount that is pruned already: at first a silent feature is ranked like the
    others, since a joint effect may be learned late; in the end its weights go before nearly all others. With λ = 1,
    the score is F alone.

    The score is the root of that product of order max(λ, 1 − λ), which ranks alike: with λ ≤ ½ it is |w|·s^(λ/(1 − λ)),
    magnitude itself where there is evidence, and takes no power of every weight.
    """
    layers, screening_weight = context.layers, context.screening_weight
    if screening_weight == 0:
        return _magnitudes(layers)
    if screening_weight == 1:
        return {name: _f(layer, name).expand(layer.weight.shape) for name, layer in layers.items()}
    largest = max(screening_weight, 1 - screening_weight)
    scores = {name: value.pow((1 - screening_weight) / largest) for name, value in _magnitudes(layers).items()}
    shrunken = _SILENT ** (context.progress * screening_weight / largest)
    for name, evidence in (context.explained or _explain(context)).items():
        if evidence.dead or not evidence.trusted:
            scores[name] = torch.where(evidence.significant.to(scores[name].device), 1.0, shrunken) * scores[name]
    return scores


@register_criterion("screening_product", needs_statistics=_wanted)
def screening_product(context: ScoringContext) -> Scores:
    """R = |w|^(1 − λ) · F^λ; λ = 1/3 ranks like |w|·√F. An infinite F counts as the largest finite one."""
    layers, screening_weight = context.layers, context.screening_weight
    if screening_weight == 0:
        return _magnitudes(layers)
    magnitudes = _magnitudes(layers)
    return {
        name: magnitudes[name].pow(1 - screening_weight) * f.pow(screening_weight)
        for name, f in _finite(layers).items()
    }


@register_criterion("screening_sum", needs_statistics=_wanted)
def screening_sum(context: ScoringContext) -> Scores:
    """R = λ·F̂ + (1 − λ)·|w|^, the paper's fused metric (Eq. 5 and 6 of arXiv 2502.07189).

    ^ divides by the mean over the candidates that are left, in all layers: F and magnitudes have different units, and
    the paper does not say how it scales them. An infinite F counts as the largest finite one.
    """
    layers, screening_weight = context.layers, context.screening_weight
    magnitudes = _normalised(_magnitudes(layers), layers)
    if screening_weight == 0:
        return magnitudes
    f = _normalised(_finite(layers), layers)
    return {name: screening_weight * f[name] + (1 - screening_weight) * magnitudes[name] for name in layers}


@register_criterion("screening_rank", needs_statistics=_wanted)
def screening_rank(context: ScoringContext) -> Scores:
    """R = λ·rank(F) + (1 − λ)·rank(|w|) among the candidates left in all layers; equal values have equal ranks."""
    layers, screening_weight = context.layers, context.screening_weight
    magnitudes = _ranks(_magnitudes(layers), layers)
    if screening_weight == 0:
        return magnitudes
    f = _ranks({name: _f(layer, name).expand(layer.weight.shape) for name, layer in layers.items()}, layers)
    return {name: screening_weight * f[name] + (1 - screening_weight) * magnitudes[name] for name in layers}


def _magnitudes(layers: Mapping[str, ScoringInputs]) -> Scores:
    return {name: layer.weight.abs().to(scoring_dtype(layer)) for name, layer in layers.items()}


def _f(layer: ScoringInputs, name: str) -> Tensor:
    return required(layer.f, "activations", name).to(layer.weight.device, scoring_dtype(layer))


def _finite(layers: Mapping[str, ScoringInputs]) -> Scores:
    f = {name: _f(layer, name) for name, layer in layers.items()}
    finite = [values[torch.isfinite(values)] for values in f.values()]
    largest = max((float(values.max()) for values in finite if len(values)), default=0.0) or 1.0
    return {name: values.clamp(max=largest) for name, values in f.items()}


def _normalised(values: Mapping[str, Tensor], layers: Mapping[str, ScoringInputs]) -> Scores:
    """Divide by the mean over all candidates that are left."""
    total = sum(float((value * layers[name].kept).sum(dtype=torch.float64)) for name, value in values.items())
    mean = total / max(sum(int(layer.kept.count_nonzero()) for layer in layers.values()), 1)
    scale = 1 / mean if mean > 0 else 1.0
    return {name: value * scale for name, value in values.items()}


def _ranks(values: Mapping[str, Tensor], layers: Mapping[str, ScoringInputs]) -> Scores:
    """Share of the candidates left that are smaller."""
    left = torch.cat([values[name][layer.kept] for name, layer in layers.items()]).sort().values
    return {
        name: torch.searchsorted(left, value.contiguous()).to(value.dtype) / max(len(left), 1)
        for name, value in values.items()
    }
