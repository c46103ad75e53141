"""Ranking metrics: from the values of the candidates, and what the activations said, to scores.

A criterion ranks all candidates of a network together, so it sees all layers at once and may normalise over them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranked:
    """The candidates of one layer, as a criterion sees them.

    Attributes:
        weight: the values: connection weights w, or scales γ of batch-norm channels.
        kept: boolean mask of the same shape, False where a candidate is pruned already.
        f: F-statistics of the activations, broadcastable to the same shape; None if no statistics were collected.
        degrees: degrees of freedom of F, between and within classes: (C − 1, n − C).
        mean_square: mean squared activation, like `f`.
        gradient: mean |∂L/∂w| over the steps gathered, of the weight's shape; None if no gradients were.
        taylor: mean |w·∂L/∂w|, likewise; of batch-norm channels |γ·∂L/∂γ + β·∂L/∂β|.
        spread: F-statistics of the activations' squared deviations from their means, like `f`.
        variance: variance of the activations, like `f`.
        learned: whether trained weight matrices had a part in these activations.
    """

    weight: Tensor
    kept: Tensor
    f: Tensor | None = None
    degrees: tuple[float, float] | None = None
    mean_square: Tensor | None = None
    gradient: Tensor | None = None
    taylor: Tensor | None = None
    spread: Tensor | None = None
    variance: Tensor | None = None
    learned: bool = False


Scores = dict[str, Tensor]
Score = Callable[[Mapping[str, Ranked], float, torch.Generator], Scores]


class Explained(Protocol):
    """Why a layer was ranked as it was; its `str` is for the log."""

    def to_dict(self) -> dict[str, Any]:
        """As primitives, for reports."""
        ...


Explain = Callable[[Mapping[str, Ranked], float], Mapping[str, Explained]]


@dataclass(frozen=True)
class Criterion:
    """A named way to score candidates.

    Attributes:
        score: (layers, screening_weight, generator) → {layer: scores}, higher is more important; the scores of
            candidates that are pruned already do not matter.
        needs_statistics: whether it wants what activations say (`f`, `degrees`, `mean_square`), for a given
            screening_weight.
        needs_gradients: whether it wants `gradient` and `taylor`.
        explain: (layers, screening_weight) → {layer: why it is ranked so}, for reports; may be None.
    """

    score: Score
    needs_statistics: Callable[[float], bool]
    needs_gradients: bool = False
    explain: Explain | None = None


CRITERIA: dict[str, Criterion] = {}


def register_criterion(
    name: str,
    needs_statistics: Callable[[float], bool] = lambda screening_weight: False,
    needs_gradients: bool = False,
    explain: Explain | None = None,
) -> Callable[[Score], Score]:
    """Decorator that makes a scoring function available as `criterion=name`; see `Criterion` for the arguments.

    Raises:
        ValueError: the name is taken.
    """

    def register(score: Score) -> Score:
        if name in CRITERIA:
            raise ValueError(f"a criterion named {name!r} is registered already; choose another name")
        CRITERIA[name] = Criterion(score, needs_statistics, needs_gradients, explain)
        return score

    return register


def resolve_criterion(name: str) -> Criterion:
    """The criterion of that name; MODULE:NAME imports MODULE first, which registers it.

    Raises:
        ValueError: unknown name, a module that there is not.
    """
    module, colon, own = name.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"criterion={name!r}: {error}; before the colon comes the module whose import registers the criterion"
            ) from error
        name = own
    if name not in CRITERIA:
        raise ValueError(f"unknown criterion {name!r}; choose one of {sorted(CRITERIA)} or register your own")
    return CRITERIA[name]


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


@register_criterion("gradient", needs_gradients=True)
def gradient(layers: Mapping[str, Ranked], screening_weight: float, generator: torch.Generator) -> Scores:
    """R = mean |∂L/∂w| over the steps gathered: gradient magnitude."""
    return {name: required(layer.gradient, "gradients", name) for name, layer in layers.items()}


@register_criterion("taylor", needs_gradients=True)
def taylor(layers: Mapping[str, Ranked], screening_weight: float, generator: torch.Generator) -> Scores:
    """R = mean |w·∂L/∂w|: how much the loss would change without w, to first order (Molchanov et al. 2019).

    With one step at initialisation (`end_epoch=0`) this is SNIP's connection sensitivity (Lee et al. 2019).
    """
    return {name: required(layer.taylor, "gradients", name) for name, layer in layers.items()}


@register_criterion("activation", needs_statistics=lambda screening_weight: True)
def activation(layers: Mapping[str, Ranked], screening_weight: float, generator: torch.Generator) -> Scores:
    """R = |w|·√(mean x²): magnitude scaled by the activation that it multiplies (as in Sun et al. 2024)."""
    return {
        name: layer.weight.abs().to(scoring_dtype(layer))
        * required(layer.mean_square, "activations", name).to(layer.weight.device, scoring_dtype(layer)).sqrt()
        for name, layer in layers.items()
    }


def scoring_dtype(layer: Ranked) -> torch.dtype:
    """At least float32: what is multiplied or summed may overflow a half precision."""
    return torch.promote_types(layer.weight.dtype, torch.float32)


def required(values: Tensor | None, kind: str, name: str) -> Tensor:
    """What a criterion cannot do without.

    Raises:
        ValueError: it was not gathered.
    """
    if values is None:
        raise ValueError(
            f"the criterion needs the {kind} of layer {name!r}, and none were gathered; register it with what it needs"
        )
    return values
