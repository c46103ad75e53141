"""The decisions of a fit: its phase, and the purpose of a training step. Pure functions; the hooks carry them out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.ranking.budget import Budget


class Phase(Enum):
    """A fit anneals until the whole amount is pruned, then it fine-tunes what remains."""

    ANNEALING = "annealing"
    FINE_TUNING = "fine-tuning"


class Step(NamedTuple):
    """The purpose of one training step, besides keeping pruned values at zero.

    Attributes:
        record: record the inputs of the network, which are not known yet.
        gather: gather the activations.
        gather_gradients: gather the gradients.
        prunes_now: prune before the optimizer's step, at initialisation.
    """

    record: bool = False
    gather: bool = False
    gather_gradients: bool = False
    prunes_now: bool = False

    @property
    def observes(self) -> bool:
        """Whether hooks are active in the forward pass."""
        return self.record or self.gather


IDLE = Step()


@dataclass
class Progress:
    """Where a fit is.

    Attributes:
        phase: the phase.
        open_epoch: index of the running epoch; None between epochs.
        step: the running training step.
    """

    phase: Phase = Phase.ANNEALING
    open_epoch: int | None = None
    step: Step = IDLE


def gathers(settings: Settings, budget: Budget, epoch: int) -> bool:
    """Whether statistics are gathered in an epoch: if it, or one of the next few, ends with pruning that needs them."""
    if not (settings.needs_activations or settings.needs_gradients):
        return False
    return any(budget.asks_for_more(last) for last in range(epoch, epoch + settings.collect_epochs))


def plan_step(
    settings: Settings, budget: Budget, epoch: int, batch_idx: int, inputs_known: bool, stride: int | None
) -> Step:
    """Decide what the callback does in a training step.

    Args:
        settings: the callback's arguments.
        budget: the budget.
        epoch: index of the running epoch.
        batch_idx: index of the batch in the epoch.
        inputs_known: whether the network's inputs have been recorded.
        stride: every so many-th batch is gathered; None while that is not known, for each of them.
    """
    record, gather, gather_gradients = not inputs_known, False, False
    if gathers(settings, budget, epoch):
        gather = settings.needs_activations and batch_idx % (stride or 1) == 0
        gather_gradients = settings.needs_gradients
    prunes_now = budget.window[1] == 0 and budget.asks_for_more(epoch)
    return (
        Step(record, gather, gather_gradients, prunes_now)
        if record or gather_gradients or gather or prunes_now
        else IDLE
    )


def next_phase(phase: Phase, budget: Budget, epoch: int, ready: bool) -> Phase:
    """The phase of an epoch that begins.

    Args:
        phase: that of the epoch before.
        budget: the budget.
        epoch: index of the epoch that begins.
        ready: whether the network can be made smaller, if that belongs to fine-tuning.
    """
    pruned = epoch >= budget.window[1] and not budget.asks_for_more(epoch)
    return Phase.FINE_TUNING if ready and pruned else phase


def holds(settings: Settings, budget: Budget, epoch: int) -> bool:
    """Whether candidates pruned at the end of an epoch stay pruned; with `soft` only those of the window's last one."""
    return not settings.soft or epoch + 1 >= budget.window[1]
