"""When a training is pruned: a window in epochs or in optimizer steps, and the rounds between two prunings.

A *position* in a training is the number of epochs, or of optimizer steps, that are completed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Unit = Literal["epoch", "step"]

_DEFAULT_END = 0.5  # without an end, the second half of the training fine-tunes the remaining network
_DEFAULT_ROUNDS = 10  # of a window in steps: prunings small enough to recover from, rounds long enough to gather in


@dataclass(frozen=True)
class Window:
    """The stretch of a training in which candidates are pruned.

    The training is divided into rounds, epochs or `every` steps, one of which ends where the window does. Every round
    ends with pruning, if the schedule asks for it then.

    Attributes:
        start: position where it begins.
        end: position where the whole amount is pruned; 0 to prune in the first step.
        every: length of a round.
        unit: what positions count.
    """

    start: int
    end: int
    every: int = 1
    unit: Unit = "epoch"

    def round_end(self, position: int) -> int:
        """Where the round ends that begins at a position, or that holds it."""
        return self.end + ((position - self.end) // self.every + 1) * self.every

    def name(self, position: int) -> str:
        """What has just ended at a position, for messages: epochs count from 0, as Lightning's do."""
        return f"epoch {position - 1}" if self.unit == "epoch" else f"step {position}"


@dataclass(frozen=True)
class Length:
    """How long a training is at most; None where that is not known.

    Attributes:
        epochs: number of epochs.
        steps: number of optimizer steps.
        steps_per_epoch: of them in an epoch.
    """

    epochs: int | None = None
    steps: int | None = None
    steps_per_epoch: int | None = None

    @property
    def total_steps(self) -> int | None:
        """Number of optimizer steps, by either limit."""
        known = [] if self.steps is None else [self.steps]
        if self.epochs is not None and self.steps_per_epoch is not None:
            known.append(self.epochs * self.steps_per_epoch)
        return min(known, default=None)

    def last(self, unit: Unit) -> int | None:
        """Position at the end of the training."""
        total = self.total_steps
        if unit == "step":
            return total
        if total is None or self.steps_per_epoch is None:
            return self.epochs
        ends = math.ceil(total / self.steps_per_epoch)
        return ends if self.epochs is None else min(self.epochs, ends)

    @property
    def is_short(self) -> bool:
        """Whether it is known to have fewer than two epochs, or no epochs to count at all."""
        if self.epochs is None:
            return self.steps is not None
        total, one = self.total_steps, self.steps_per_epoch
        return total is not None and one is not None and total < 2 * one


def window_in_epochs(start: int, end: int | None, length: Length) -> Window:
    """A window in epochs.

    Args:
        start: first epoch.
        end: first epoch after it; None for half of the training; 0 to prune in the first step.
        length: of the training.

    Raises:
        ValueError: a window that ends after the training, or none given for a training without an end.
    """
    last = length.epochs
    if end == 0:
        return Window(0, 0)
    if last is None:
        if end is None:
            raise ValueError(
                "this training has no max_epochs, so end_epoch= (when pruning is done), or end_step= for a window in "
                "optimizer steps, must be given"
            )
        return Window(start, end)
    resolved = max(round(_DEFAULT_END * last), start + 1) if end is None else end
    if resolved > last:
        raise ValueError(
            f"pruning would end with epoch {resolved} (end_epoch={end}, start_epoch={start}), but "
            f"the training has max_epochs={last}; lower end_epoch or train longer"
        )
    return Window(start, resolved)


def window_in_steps(start: int | None, end: int | None, every: int | None, length: Length) -> Window:
    """A window in optimizer steps.

    Args:
        start: steps before it; None for none.
        end: steps after which everything is pruned; None for half of the training.
        every: steps between two prunings; None for a tenth of the window.
        length: of the training.

    Raises:
        ValueError: a window that ends after the training, or none given for a training of unknown length.
    """
    first, last = start or 0, length.total_steps
    if end is None:
        if last is None:
            raise ValueError(
                "it is not known how many optimizer steps this training has, so end_step= (when pruning is done) must "
                "be given; with Trainer(max_steps=…) it is half of them"
            )
        end = max(round(_DEFAULT_END * last), first + 1)
    if last is not None and end > last:
        raise ValueError(
            f"pruning would end with step {end} (start_step={first}), but the training has {last} optimizer steps; "
            "lower end_step or train longer"
        )
    return Window(first, end, every or math.ceil((end - first) / _DEFAULT_ROUNDS), "step")
