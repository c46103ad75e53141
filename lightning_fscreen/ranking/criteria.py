"""Ranking metrics: from the values of the candidates, and statistics of the activations, to scores.

A criterion ranks all candidates of a network together, so it sees all layers at once and may normalise over them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoringInputs:
    """The candidates of one layer, as a criterion sees them.

    Attributes:
        weight: the values: connection weights w, scales γ of batch-norm channels, or what stands for the magnitude of
            other units (see `candidates.magnitude`).
        kept: boolean mask of the same shape, False where a candidate is pruned already.
        f: F-statistics of the activations, broadcastable to the same shape; None if no statistics were collected.
        degrees: degrees of freedom of F, between and within classes: (C − 1, n − C).
        mean_square: mean squared activation, like `f`.
        gradient: mean |∂L/∂w| over the steps gathered, of the weight's shape; None if no gradients were. Of a unit, the
            norm over its incoming weights.
        taylor: mean |w·∂L/∂w|, likewise; of units the sum over all that goes with them, |γ·∂L/∂γ + β·∂L/∂β|.
        spread: F-statistics of the activations' squared deviations from their means, like `f`.
        variance: variance of the activations, like `f`.
        shared: share of the activations' variance within classes that is common with features that differ between the
            classes, like `f`; see `statistics.common.shared_variance`.
        learned: whether trained weight matrices had a part in the activations, bool, like `f`; None if in none.
        error: of units, what their absence adds to the errors of the layers that read them, as a share of the outputs,
            if the others make up for it as well as they can; not a number where it is not known. None if it was not
            asked for.
        unmatched: why there are no statistics of activations although they were gathered: on how many instances the
            layer ran, other than there are labels. None if there are.
        last: what the criterion's own `explain` said of the layer at the last ranking, as primitives; None if nothing.
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
    shared: Tensor | None = None
    learned: Tensor | None = None
    error: Tensor | None = None
    unmatched: str | None = None
    last: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ScoringContext:
    """All that a criterion may use; later versions may add to it.

    Attributes:
        layers: the candidates, by layer.
        screening_weight: λ of the criteria that join F and magnitude, 0 ≤ λ ≤ 1.
        generator: random numbers, the same in every process.
        progress: share of the whole amount that is pruned already, 0 ≤ progress ≤ 1; 1 for the ranking that prunes the
            rest.
        explained: what the criterion's own `explain` has found for this context, if it has one; else empty.
    """

    layers: Mapping[str, ScoringInputs]
    screening_weight: float = 0.25
    generator: torch.Generator = field(default_factory=torch.Generator)
    progress: float = 1.0
    explained: Mapping[str, Any] = field(default_factory=dict)


Scores = dict[str, Tensor]
Score = Callable[[ScoringContext], Scores]


class Explained(Protocol):
    """Why a layer was ranked as it was; its `str` is for the log."""

    def to_dict(self) -> dict[str, Any]:
        """As primitives, for reports."""
        ...


Explain = Callable[[ScoringContext], Mapping[str, Explained]]


def _never(screening_weight: float) -> bool:
    return False


@dataclass(frozen=True)
class Criterion:
    """A named way to score candidates.

    Attributes:
        score: context → {layer: scores}, of the shape of the candidates' values; higher is more important, and the
            scores of candidates that are pruned already do not matter.
        needs_statistics: whether it wants what activations say (`f`, `degrees`, `mean_square`), for a given
            screening_weight.
        needs_gradients: whether it wants `gradient` and `taylor`.
        needs_errors: whether it wants `error`, and its scores are such: they add up, over layers too.
        idle_first: whether connections that would do nothing under its own ranking go before all others, for a given
            screening_weight: those that no path of connections reaches from an input of the network, or leads from to
            an output.
        explain: context → {layer: why it is ranked so}, for reports; may be None.
    """

    score: Score
    needs_statistics: Callable[[float], bool]
    needs_gradients: bool = False
    explain: Explain | None = None
    needs_errors: bool = False
    idle_first: Callable[[float], bool] = _never

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", _of_context(self.score))


_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _of_context(score: Callable[..., Scores]) -> Score:
    """The same function of the context; one that needs three arguments gets the parts that there were before it."""
    needed = [p for p in inspect.signature(score).parameters.values() if p.default is p.empty and p.kind not in _ANY]
    if len(needed) < 3:
        return score
    return lambda context: score(context.layers, context.screening_weight, context.generator)


CRITERIA: dict[str, Criterion] = {}

Function = TypeVar("Function", bound=Callable[..., Scores])


def register_criterion(
    name: str,
    needs_statistics: Callable[[float], bool] = _never,
    needs_gradients: bool = False,
    explain: Explain | None = None,
    needs_errors: bool = False,
    idle_first: Callable[[float], bool] = _never,
) -> Callable[[Function], Function]:
    """Decorator that makes a scoring function available as `criterion=name`; see `Criterion` for the arguments.

    A function of three arguments, (layers, screening_weight, generator), is called with these parts of the context.

    Example:
        >>> @register_criterion("example", needs_statistics=lambda screening_weight: True)
        ... def example(context):
        ...     return {name: layer.weight.abs() * layer.variance.sqrt() for name, layer in context.layers.items()}
        >>> resolve_criterion("example").needs_statistics(0.25)
        True

    Raises:
        ValueError: the name is taken.
    """

    def register(score: Function) -> Function:
        if name in CRITERIA:
            raise ValueError(f"a criterion named {name!r} is registered already; choose another name")
        CRITERIA[name] = Criterion(score, needs_statistics, needs_gradients, explain, needs_errors, idle_first)
        return score

    return register


def resolve_criterion(name: str) -> Criterion:
    """The criterion of that name; MODULE:NAME imports MODULE first, which registers it.

    Raises:
        ValueError: unknown name, a module that there is not.
    """
    module, colon, own = str(name).rpartition(":")
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
def magnitude(context: ScoringContext) -> Scores:
    """R = |w|: the classical baseline (Han et al. 2015)."""
    return {name: layer.weight.abs() for name, layer in context.layers.items()}


@register_criterion("connected_magnitude", idle_first=lambda screening_weight: True)
def connected_magnitude(context: ScoringContext) -> Scores:
    """R = |w|, but first go connections that do nothing because others are pruned.

    Pruning counts what still has an effect then, as in "Connectivity Matters: Neural Network Pruning Through the Lens
    of Effective Sparsity" (Vysogorets and Kempe 2023).
    """
    return magnitude(context)


@register_criterion("random")
def random(context: ScoringContext) -> Scores:
    """R uniform on [0, 1): the baseline that every criterion has to beat."""
    return {
        name: torch.rand(layer.weight.shape, generator=context.generator).to(layer.weight.device)
        for name, layer in context.layers.items()
    }


@register_criterion("gradient", needs_gradients=True)
def gradient(context: ScoringContext) -> Scores:
    """R = mean |∂L/∂w| over the steps gathered: gradient magnitude."""
    return {name: required(layer.gradient, "gradients", name) for name, layer in context.layers.items()}


@register_criterion("taylor", needs_gradients=True)
def taylor(context: ScoringContext) -> Scores:
    """R = mean |w·∂L/∂w|: how much the loss would change without w, to first order (Molchanov et al. 2019).

    With one step at initialisation (`end_epoch=0`) this is SNIP's connection sensitivity (Lee et al. 2019).
    """
    return {name: required(layer.taylor, "gradients", name) for name, layer in context.layers.items()}


@register_criterion("activation", needs_statistics=lambda screening_weight: True)
def activation(context: ScoringContext) -> Scores:
    """R = |w|·√(mean x²): magnitude scaled by the activation that it multiplies (as in Sun et al. 2024)."""
    return {
        name: layer.weight.abs().to(scoring_dtype(layer))
        * required(layer.mean_square, "activations", name).to(layer.weight.device, scoring_dtype(layer)).sqrt()
        for name, layer in context.layers.items()
    }


@register_criterion("reconstruction", needs_errors=True)
def reconstruction(context: ScoringContext) -> Scores:
    """R = what the absence of a unit adds to the errors of the layers that read it, if the others make up for it.

    Shares of the mean squared outputs, see `elimination_errors`: the Optimal Brain Surgeon for units. Where they are
    not known, the unit's share of the squared magnitudes of its layer, R = w² / Σ w².
    """
    scores = {}
    for name, layer in context.layers.items():
        squares = layer.weight.to(scoring_dtype(layer)).square()
        shares = squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)
        error = required(layer.error, "errors without each unit", name).to(shares)
        scores[name] = torch.where(error.isnan(), shares, error)
    return scores


def scoring_dtype(layer: ScoringInputs) -> torch.dtype:
    """At least float32: products and sums may overflow a half precision."""
    return torch.promote_types(layer.weight.dtype, torch.float32)


def required(values: Tensor | None, kind: str, name: str) -> Tensor:
    """Statistics that a criterion cannot do without.

    Raises:
        ValueError: it was not gathered.
    """
    if values is None:
        raise ValueError(
            f"the criterion needs the {kind} of layer {name!r}, and none were gathered: leave the layer out with "
            f"exclude={name!r} if it runs on other numbers of instances than there are labels, or register it with "
            "needs_statistics= or needs_gradients="
        )
    return values
