"""Annealing schedules: pure functions of training progress, without state.

A schedule maps progress in [0, 1] through the pruning window to the fraction, in [0, 1], of the final amount that is
pruned by then. It must reach 1 at progress 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Callable[[float], float]

_STEEPNESS = 10.0
_ROUNDS = 5


def logistic(progress: float) -> float:
    """Slow, fast, slow: the paper's annealing function (its Fig. 1), scaled to start at 0 and end at 1.

    (σ(k (t − ½)) − σ(−k/2)) / (σ(k/2) − σ(−k/2)) with progress t and k = 10 (the paper gives no k).
    """

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    low, high = sigmoid(-_STEEPNESS / 2), sigmoid(_STEEPNESS / 2)
    return (sigmoid(_STEEPNESS * (progress - 0.5)) - low) / (high - low)


def one_shot(progress: float) -> float:
    """Nothing before the end of the window, then everything at once."""
    return 1.0 if progress >= 1 else 0.0


def linear(progress: float) -> float:
    """In equal steps."""
    return progress


def cubic(progress: float) -> float:
    """1 − (1 − t)³: fast first, then slower (Zhu & Gupta, "To prune, or not to prune", arXiv 1710.01878)."""
    return 1 - (1 - progress) ** 3


def iterative(progress: float) -> float:
    """Prune and retrain in five rounds: the k-th leaves 1 − k/5 of the way (Han et al. 2015)."""
    return math.floor(_ROUNDS * progress + 1e-9) / _ROUNDS


def constant(progress: float) -> float:
    """Everything at once, at the end of the first epoch of the window."""
    return 1.0 if progress > 0 else 0.0


ScheduleName = Literal["logistic", "one_shot", "linear", "cubic", "iterative", "constant"]
SCHEDULES: dict[str, Schedule] = {
    "logistic": logistic,
    "one_shot": one_shot,
    "linear": linear,
    "cubic": cubic,
    "iterative": iterative,
    "constant": constant,
}


def resolve_schedule(schedule: ScheduleName | Schedule) -> Schedule:
    """The schedule of that name, or the callable itself once it is known to behave.

    Raises:
        ValueError: unknown name; a callable that does not return 1 at progress 1.
        TypeError: neither a name nor a callable.
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; choose one of {sorted(SCHEDULES)} or pass a callable")
        return SCHEDULES[schedule]
    if not callable(schedule):
        raise TypeError(f"schedule must be one of {sorted(SCHEDULES)} or a callable progress → fraction: {schedule!r}")
    end = float(schedule(1.0))
    if not math.isclose(end, 1.0, abs_tol=1e-9):
        raise ValueError(f"schedule must return 1 at progress 1 (everything is pruned by then), it returns {end}")
    return schedule


def scheduled_fraction(schedule: Schedule, position: float, start: int, end: int) -> float:
    """Fraction of the amount due at a position in the training, for a window from position `start` to `end`.

    Raises:
        ValueError: the schedule returned something outside [0, 1].
    """
    if position >= end:
        return 1.0
    if position <= start:
        return 0.0
    progress = (position - start) / (end - start)
    fraction = float(schedule(progress))
    if not -1e-9 <= fraction <= 1 + 1e-9:
        raise ValueError(f"schedule must return a fraction in [0, 1]; at progress {progress:.4g} it gave {fraction}")
    return min(max(fraction, 0.0), 1.0)
