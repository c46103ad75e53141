"""The decisions of a fit: its phase, and the purpose of a training step. Pure functions; the hooks carry them out.

A fit goes from round to round: epochs, or so many optimizer steps, at whose end candidates may be pruned. A round is
known by the position of its end; see `ranking/window.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.ranking.budget import Budget
from lightning_fscreen.ranking.window import Unit


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
        round_end: position where the running round ends; None between two rounds.
        batches: batches of the running round that have begun; for rounds in steps, which epochs do not interrupt.
        unit: whether rounds are epochs or steps.
        step: the running training step.
    """

    phase: Phase = Phase.ANNEALING
    round_end: int | None = None
    batches: int = 0
    unit: Unit = "epoch"
    step: Step = IDLE

    def state_dict(self) -> dict[str, Any]:
        """All but the running step, as primitives."""
        tuning = self.phase is Phase.FINE_TUNING
        return {"tuning": tuning, "round_end": self.round_end, "batches": self.batches, "unit": self.unit}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Progress:
        """From what `state_dict` gave, or earlier versions, whose rounds were epochs; empty at the beginning."""
        phase = Phase.FINE_TUNING if state.get("tuning") else Phase.ANNEALING
        epoch = state.get("epoch")
        round_end = state.get("round_end") if epoch is None else epoch + 1
        return cls(phase, round_end, state.get("batches", 0), state.get("unit", "epoch"))


def gathers(settings: Settings, budget: Budget, round_end: int) -> bool:
    """Whether statistics are gathered in a round: if it ends with pruning that needs them, or one of the next epochs.

    `collect_epochs` is 1 for rounds in steps, so that the rounds before a pruning are the next positions.
    """
    if not (settings.needs_activations or settings.needs_gradients):
        return False
    return any(budget.asks_for_more(last) for last in range(round_end, round_end + settings.collect_epochs))


def searches(budget: Budget, round_end: int, first: bool) -> bool:
    """Whether modules that were not called before are looked for: in the first round, and before a pruning.

    Observed steps do not run compiled, so that not every round can.
    """
    return first or budget.asks_for_more(round_end)


def plan_step(
    settings: Settings, budget: Budget, round_end: int, batch: int, inputs_known: bool, stride: int | None
) -> Step:
    """Decide what the callback does in a training step.

    Args:
        settings: the callback's arguments.
        budget: the budget.
        round_end: position where the running round ends.
        batch: index of the batch in the round.
        inputs_known: whether the network's inputs have been recorded.
        stride: every so many-th batch is gathered; None while that is not known, for each of them.
    """
    record, gather, gather_gradients = not inputs_known, False, False
    if gathers(settings, budget, round_end):
        gather = settings.needs_activations and batch % (stride or 1) == 0
        gather_gradients = settings.needs_gradients
    prunes_now = budget.window.end == 0 and budget.asks_for_more(round_end)
    return (
        Step(record, gather, gather_gradients, prunes_now)
        if record or gather_gradients or gather or prunes_now
        else IDLE
    )


def next_phase(phase: Phase, budget: Budget, position: int, ready: bool) -> Phase:
    """The phase of a round that begins.

    Args:
        phase: that of the round before.
        budget: the budget.
        position: where the round begins.
        ready: whether the network can be made smaller, if that belongs to fine-tuning.
    """
    pruned = position >= budget.window.end and not budget.asks_for_more(position)
    return Phase.FINE_TUNING if ready and pruned else phase


def holds(settings: Settings, budget: Budget, round_end: int) -> bool:
    """Whether candidates pruned at the end of a round stay pruned; with `soft` only those of the window's last one."""
    return not settings.soft or round_end >= budget.window.end
