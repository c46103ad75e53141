"""The arguments of `ScreeningPruningCallback`: types, ranges, and read-only access to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Generic, Literal, TypeVar, get_args, overload

import torch
from torch import Tensor, nn

from lightning_fscreen.candidates.costs import Currency
from lightning_fscreen.candidates.granularity import GRANULARITIES, Granularity, Patterns
from lightning_fscreen.candidates.prunable import SILENT, Compensation, Feature
from lightning_fscreen.candidates.weights import Connections
from lightning_fscreen.costs.timings import DEFAULT, Latency, Timings
from lightning_fscreen.functional import check_num_classes
from lightning_fscreen.ranking.amounts import Amount, check_range
from lightning_fscreen.ranking.budgeted import Scope
from lightning_fscreen.ranking.criteria import Criterion, resolve_criterion
from lightning_fscreen.ranking.schedule import Schedule

_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {  # by annotation
    "int": (lambda value: isinstance(value, Integral), "a whole number"),
    "float": (lambda value: isinstance(value, Real), "a number"),
    "bool": (lambda value: value in (True, False), "True or False"),
    "Patterns": (
        lambda value: value is None or (isinstance(value, Collection) and all(isinstance(one, str) for one in value)),
        "a glob pattern over module names, or a list of them",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `ScreeningPruningCallback`, which documents them; the schedule is resolved to a function.

    Raises:
        ValueError: an argument outside its range; the message names the allowed values.
    """

    granularity: str
    amount: Amount
    screening_weight: float
    schedule: Schedule
    start_epoch: int
    end_epoch: int | None
    scope: Scope
    criterion: str
    min_channels: int
    include: Patterns
    exclude: Patterns
    num_classes: int | None
    labels: Callable[[Any], Tensor]
    slim: bool
    collect_every: int | Literal["auto"]
    collect_epochs: int
    connections: Connections = "factored"  # with defaults: those that not all granularities have
    bias: Compensation = "zero"
    feature: Feature = "activation"
    rewind_lr: bool
    rewind_weights: bool
    soft: bool
    start_step: int | None
    end_step: int | None
    prune_every: int | None
    budget: Currency = "candidates"
    round_to: int = 1
    streams: bool = False
    latency: Latency = DEFAULT

    def __post_init__(self) -> None:
        self._check_kinds()
        _check_choice("granularity", self.granularity, list(GRANULARITIES))
        _check_choice("scope", self.scope, get_args(Scope))
        _check_choice("connections", self.connections, get_args(Connections))
        _check_choice("bias", self.bias, get_args(Compensation))
        _check_choice("feature", self.feature, get_args(Feature))
        _check_choice("budget", self.budget, get_args(Currency))
        resolve_criterion(self.criterion)
        check_range(self.amount)
        if not 0 <= self.screening_weight <= 1:
            raise ValueError(f"screening_weight (λ) must lie in [0, 1], got {self.screening_weight}")
        _check_least("min_channels", self.min_channels, 0, "none")
        if self.collect_every != "auto":
            if not isinstance(self.collect_every, int):
                raise ValueError(f'collect_every must be "auto" or a number of batches, got {self.collect_every!r}')
            _check_least("collect_every", self.collect_every, 1, "every batch")
        _check_least("collect_epochs", self.collect_epochs, 1, "the epoch before a pruning")
        _check_least("round_to", self.round_to, 1, "any width")
        check_num_classes(self.num_classes)
        self._check_combinations()
        self._check_window()

    def _check_kinds(self) -> None:
        for field in fields(self):
            kind, value = str(field.type), getattr(self, field.name)  # annotations are strings here
            is_one, meaning = _KINDS.get(kind.removesuffix(" | None"), (None, ""))
            may_be_none = kind.endswith(" | None") and value is None
            if is_one is not None and not is_one(value) and not may_be_none:
                raise ValueError(f"{field.name} must be {meaning}, got {value!r}")
        if not callable(self.labels):
            raise ValueError(
                "labels must be a function of the batch that returns its labels, such as labels=lambda batch: "
                f"batch['class'], got {self.labels!r}"
            )

    def _check_combinations(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            having = [name for name, kind in GRANULARITIES.items() if field.name in kind.options]
            if field.name == "budget":
                having = [name for name, kind in GRANULARITIES.items() if kind.has_costs]
            if having and self.granularity not in having and value != field.default:
                own = " or ".join(f'"{name}"' for name in having)
                raise ValueError(
                    f'{field.name}={value!r} is for granularity={own}; leave it out with "{self.granularity}"'
                )
        if self.budget != "candidates" and isinstance(self.amount, Mapping):
            raise ValueError(
                f"amounts by patterns count candidates; with budget={self.budget!r} give one amount for all"
            )
        if self.streams and self.budget == "candidates":
            raise ValueError(
                'streams=True compares what units save, which budget="candidates" does not count; use budget="macs", '
                '"params" or "latency", or leave it out'
            )
        if not isinstance(self.latency, Latency):
            raise ValueError(f"latency must be a lightning_fscreen.Latency, got {self.latency!r}")
        if self.latency != DEFAULT and self.budget != "latency":
            raise ValueError(f'{self.latency} is for budget="latency", got budget={self.budget!r}')
        if self.rewind_weights and self.bias != "zero":
            raise ValueError(f'rewind_weights=True undoes bias={self.bias!r}; use bias="zero"')
        if self.feature != "activation":
            given = f"feature={self.feature!r}"
            if self.bias == "mean":
                raise ValueError(
                    f'bias="mean" needs the mean activation, which {given} does not gather; use another bias'
                )
            if self.criterion == "activation":
                raise ValueError(f'criterion="activation" needs feature="activation", got {given}')

    @property
    def in_steps(self) -> bool:
        """Whether the window is given in optimizer steps."""
        return any(value is not None for value in (self.start_step, self.end_step, self.prune_every))

    def _check_window(self) -> None:
        if self.in_steps:
            self._check_steps()
        start, end = self.start_epoch, self.end_epoch
        _check_least("start_epoch", start, 0, "from the first epoch on")
        if end is not None and end <= start and not start == end == 0:
            raise ValueError(
                f"end_epoch must lie after start_epoch={start} (or both be 0, at initialisation), got {end}"
            )
        if self.soft and end == 0:
            raise ValueError(
                "soft=True needs epochs in which pruned weights can grow again; set end_epoch later than 0"
            )

    def _check_steps(self) -> None:
        steps = {name: getattr(self, name) for name in ("start_step", "end_step", "prune_every")}
        given = ", ".join(f"{name}={value}" for name, value in steps.items() if value is not None)
        epochs = {"start_epoch": 0, "end_epoch": None, "collect_epochs": 1}
        for name, default in epochs.items():
            if getattr(self, name) != default:
                way_out = (
                    "statistics are gathered in the prune_every steps before each pruning"
                    if name == "collect_epochs"
                    else "give the window in one of both"
                )
                raise ValueError(f"{name}={getattr(self, name)} is in epochs, but {given} in steps; {way_out}")
        start = self.start_step or 0
        _check_least("start_step", start, 0, "from the first step on")
        if self.prune_every is not None:
            _check_least("prune_every", self.prune_every, 1, "after every step")
        if self.end_step is not None and self.end_step <= start:
            raise ValueError(
                f"end_step must lie after start_step={start}, got {self.end_step}; to prune at initialisation, use "
                "end_epoch=0"
            )

    def find_candidates(self, model: nn.Module) -> Granularity[Any]:
        """The candidates of a model.

        Raises:
            ValueError: nothing to prune, patterns that match nothing.
        """
        kind = GRANULARITIES[self.granularity]
        return kind(model, self.include, self.exclude, **{name: getattr(self, name) for name in kind.options})

    def timings(self, device: torch.device, known: Mapping[str, Any] | None = None) -> Timings | None:
        """What a budget of latency is measured with; None for others.

        Args:
            device: where the model is.
            known: as of `Timings`.
        """
        return Timings(self.latency, device, known) if self.budget == "latency" else None

    @property
    def resolved_criterion(self) -> Criterion:
        """The criterion of that name."""
        return resolve_criterion(self.criterion)

    @property
    def slims_in_fit(self) -> bool:
        """Whether training goes on with a network that has been made smaller."""
        return self.slim and GRANULARITIES[self.granularity].slims_in_fit

    @functools.cached_property  # asked for in every step
    def needs_activations(self) -> bool:
        """Whether statistics of activations are needed, for the criterion or for the bias."""
        return self.resolved_criterion.needs_statistics(self.screening_weight) or self.bias == "mean"

    @property
    def needs_moments(self) -> bool:
        """Whether second moments of what weights multiply are needed, for the criterion or for the bias."""
        return self.resolved_criterion.needs_errors or self.bias == "ridge"

    @property
    def silences(self) -> bool:
        """Whether what is pruned is zero, so that no constants are left of it."""
        return self.bias in SILENT

    @functools.cached_property
    def needs_gradients(self) -> bool:
        """Whether the criterion needs statistics of gradients."""
        return self.resolved_criterion.needs_gradients


Value = TypeVar("Value")


class Setting(Generic[Value]):
    """A field of `settings`, read-only: the arguments were checked together, so none of them changes alone."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Setting[Value]: ...
    @overload
    def __get__(self, instance: HasSettings, owner: type) -> Value: ...
    def __get__(self, instance: HasSettings | None, owner: type) -> Setting[Value] | Value:
        if instance is None:
            return self
        value: Value = getattr(instance.settings, self._name)
        return value

    def __set__(self, instance: HasSettings, value: Any) -> None:
        kind, name = type(instance).__name__, self._name
        raise AttributeError(f"{name} of a {kind} cannot be changed; make a new one, {kind}({name}={value!r}, …)")


class HasSettings:
    """Gives every field of `settings` as a read-only attribute of the same name."""

    settings: Settings

    granularity = Setting[str]()
    amount = Setting[Amount]()
    screening_weight = Setting[float]()
    schedule = Setting[Schedule]()
    start_epoch = Setting[int]()
    end_epoch = Setting[int | None]()
    scope = Setting[Scope]()
    criterion = Setting[str]()
    min_channels = Setting[int]()
    include = Setting[Patterns]()
    exclude = Setting[Patterns]()
    num_classes = Setting[int | None]()
    labels = Setting[Callable[[Any], Tensor]]()
    slim = Setting[bool]()
    collect_every = Setting[int | Literal["auto"]]()
    collect_epochs = Setting[int]()
    connections = Setting[Connections]()
    bias = Setting[Compensation]()
    feature = Setting[Feature]()
    rewind_lr = Setting[bool]()
    rewind_weights = Setting[bool]()
    soft = Setting[bool]()
    start_step = Setting[int | None]()
    end_step = Setting[int | None]()
    prune_every = Setting[int | None]()
    budget = Setting[Currency]()
    round_to = Setting[int]()
    streams = Setting[bool]()
    latency = Setting[Latency]()


def _check_choice(argument: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {argument} {value!r}; choose one of {list(allowed)}")


def _check_least(argument: str, value: int, least: int, meaning: str) -> None:
    if value < least:
        raise ValueError(f"{argument} must be at least {least} ({meaning}), got {value}")
