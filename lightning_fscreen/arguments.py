"""What the arguments of `ScreeningPruningCallback` may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_fscreen.channels import FEATURES
from lightning_fscreen.criteria import resolve_criterion
from lightning_fscreen.ranking import SCOPES

if TYPE_CHECKING:
    from lightning_fscreen.callback import ScreeningPruningCallback

GRANULARITIES = ("channel", "weight")
CONNECTIONS = ("factored", "exact")
BIASES = ("zero", "fold", "mean")


def check_arguments(callback: ScreeningPruningCallback) -> None:
    """Check the arguments that a callback was made with, as far as they can be without a trainer.

    Raises:
        ValueError: an argument outside its range; the message names the allowed values.
    """
    _check_choice("granularity", callback.granularity, GRANULARITIES)
    _check_choice("scope", callback.scope, SCOPES)
    _check_choice("connections", callback.connections, CONNECTIONS)
    _check_choice("bias", callback.bias, BIASES)
    _check_choice("feature", callback.feature, FEATURES)
    resolve_criterion(callback.criterion)
    if not 0 <= callback.amount < 1:
        raise ValueError(f"amount is the fraction pruned in the end and must lie in [0, 1), got {callback.amount}")
    if not 0 <= callback.screening_weight <= 1:
        raise ValueError(f"screening_weight (λ) must lie in [0, 1], got {callback.screening_weight}")
    _check_least("min_channels", callback.min_channels, 0, "none")
    if callback.collect_every != "auto":
        if not isinstance(callback.collect_every, int):
            raise ValueError(f'collect_every must be "auto" or a number of batches, got {callback.collect_every!r}')
        _check_least("collect_every", callback.collect_every, 1, "every batch")
    _check_least("collect_epochs", callback.collect_epochs, 1, "the epoch before a pruning")
    if callback.granularity == "channel" and callback.connections == "exact":
        raise ValueError('connections="exact" is for granularity="weight"; channels have no connections of their own')
    if callback.granularity == "weight" and callback.bias != "zero":
        raise ValueError(f'bias={callback.bias!r} is for granularity="channel"; pruned weights are zero')
    if callback.rewind_weights and callback.bias != "zero":
        raise ValueError(f'rewind_weights=True takes back what bias={callback.bias!r} sets; use bias="zero"')
    if callback.feature != "activation":
        wants = f"feature={callback.feature!r}"
        if callback.granularity == "weight":
            raise ValueError(f'{wants} is for granularity="channel"; connections are screened by what they read')
        if callback.bias == "mean":
            raise ValueError(f'bias="mean" needs the mean activation, which {wants} does not gather; use another bias')
        if callback.criterion == "activation":
            raise ValueError(f'criterion="activation" needs feature="activation", got {wants}')
    start, end = callback.start_epoch, callback.end_epoch
    _check_least("start_epoch", start, 0, "from the first epoch on")
    if end is not None and end <= start and not start == end == 0:
        raise ValueError(f"end_epoch must lie after start_epoch={start} (or both be 0, at initialisation), got {end}")
    if callback.soft and end == 0:
        raise ValueError("soft=True needs epochs in which what was pruned grows again; set end_epoch later than 0")
    if callback.num_classes is not None and callback.num_classes < 2:
        raise ValueError(
            f"num_classes must be at least 2 (the F-statistic compares classes), got {callback.num_classes}"
        )


def _check_choice(argument: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {argument} {value!r}; choose one of {list(allowed)}")


def _check_least(argument: str, value: int, least: int, meaning: str) -> None:
    if value < least:
        raise ValueError(f"{argument} must be at least {least} ({meaning}), got {value}")
