from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.fit.phases import IDLE, Phase, Step, gathers, holds, next_phase, plan_step
from lightning_fscreen.fit.settings import Settings
from lightning_fscreen.ranking.budget import Budget
from lightning_fscreen.ranking.window import Window

TOTAL = 100


def made(start: int = 0, end: int = 4, **arguments: Any) -> tuple[Settings, Budget]:
    given = {"amount": 0.5, "start_epoch": start, "end_epoch": end, **arguments}
    settings = ScreeningPruningCallback(**given).settings
    return settings, Budget(settings.amount, settings.schedule, Window(start, end), TOTAL)


def plan(settings: Settings, budget: Budget, **changes: Any) -> Step:
    given = {"round_end": 1, "batch": 0, "inputs_known": True, "stride": 1}
    return plan_step(settings, budget, **{**given, **changes})


@pytest.mark.parametrize("known", [True, False])
def test_inputs_are_recorded_until_they_are_known(known: bool) -> None:
    settings, budget = made(criterion="magnitude")
    step = plan(settings, budget, inputs_known=known)
    assert step == Step(record=not known) and step.observes is not known


def test_a_step_that_has_nothing_to_do_is_always_the_same() -> None:
    settings, budget = made(criterion="magnitude")
    assert plan(settings, budget) is IDLE and not IDLE.observes


@pytest.mark.parametrize(
    ("arguments", "activations", "gradients"),
    [
        ({"criterion": "screening"}, True, False),
        ({"criterion": "screening", "screening_weight": 0}, False, False),
        ({"criterion": "magnitude"}, False, False),
        ({"criterion": "magnitude", "bias": "mean"}, True, False),
        ({"criterion": "taylor"}, False, True),
        ({"criterion": "taylor", "bias": "mean"}, True, True),
    ],
)
def test_steps_gather_the_statistics_that_are_needed(
    arguments: dict[str, Any], activations: bool, gradients: bool
) -> None:
    settings, budget = made(**arguments)
    assert plan(settings, budget) == Step(gather=activations, gather_gradients=gradients)
    budget.target = TOTAL // 2
    assert plan(settings, budget) is IDLE


def test_every_so_many_th_batch_is_gathered() -> None:
    settings, budget = made()
    for stride, batch in product((1, 3, 7), range(20)):
        assert plan(settings, budget, batch=batch, stride=stride).gather == (batch % stride == 0)
        assert plan(settings, budget, batch=batch, stride=None).gather


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_statistics_are_gathered_before_each_pruning_and_in_no_other_epoch(epochs: int) -> None:
    settings, budget = made(start=2, end=6, schedule="one_shot", collect_epochs=epochs)
    assert [gathers(settings, budget, epoch + 1) for epoch in range(9)] == [6 - epochs <= epoch for epoch in range(9)]
    budget.met(6)
    assert not any(gathers(settings, budget, epoch + 1) for epoch in range(9))


def test_the_first_step_prunes_without_a_window() -> None:
    settings, budget = made(end=0, criterion="taylor")
    assert plan(settings, budget) == Step(gather_gradients=True, prunes_now=True)
    budget.met(1)
    assert plan(settings, budget) is IDLE


def test_nothing_is_pruned_after_slimming() -> None:
    settings, budget = made()
    assert not budget.falls_short
    budget.closed = True
    assert plan(settings, budget) is IDLE and not budget.asks_for_more(4) and budget.falls_short
    budget.target = TOTAL // 2
    assert not budget.falls_short


def test_fine_tuning_begins_once_when_everything_is_pruned_and_can_be_removed() -> None:
    _, budget = made(start=1, end=3)

    def phases() -> list[Phase]:
        return [next_phase(Phase.ANNEALING, budget, epoch, ready=True) for epoch in range(5)]

    assert set(phases()) == {Phase.ANNEALING}  # an epoch at the window's end that still has to prune
    budget.met(3)
    assert phases() == [Phase.ANNEALING] * 3 + [Phase.FINE_TUNING] * 2
    assert next_phase(Phase.ANNEALING, budget, 3, ready=False) is Phase.ANNEALING
    for epoch, ready in product(range(5), (True, False)):
        assert next_phase(Phase.FINE_TUNING, budget, epoch, ready) is Phase.FINE_TUNING


def test_soft_pruning_holds_at_the_end_of_the_window() -> None:
    settings, budget = made(end=3, soft=True)
    assert [holds(settings, budget, epoch + 1) for epoch in range(5)] == [False, False, True, True, True]
    settings, budget = made(end=3)
    assert all(holds(settings, budget, epoch + 1) for epoch in range(5))
