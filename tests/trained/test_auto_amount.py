"""`amount="auto"` against really pruning by every amount of a grid."""

import copy

import pytest
from torchmetrics.classification import MulticlassAccuracy, MulticlassHammingDistance

from lightning_fscreen import explain, prune
from tests.conftest import digits, loader
from tests.test_cost_fit import count
from tests.test_unit_fit import mixed_net
from tests.trained.test_pruning import trained
from tests.trained.test_sensitivities import Counted, accuracy, check_unchanged, state_of

HELD_OUT = [(digits(1000)[0][256:], digits(1000)[1][256:])]
AUTO = {"amount": "auto", "val_dataloader": HELD_OUT, "progress": False}


@pytest.mark.parametrize("budget", ["macs", "candidates"])
def test_it_is_the_best_of_a_grid(budget):
    network, step, max_drop = trained(mixed_net, steps=60), 1 / 16, 0.05
    before, metric, pruned = accuracy(network, HELD_OUT), Counted(), copy.deepcopy(network)
    _, report = prune(pruned, loader(), metric=metric, max_drop=max_drop, budget=budget, **AUTO)
    assert metric.calls == 11 and accuracy(pruned, HELD_OUT) >= before - max_drop
    after, full = (report.kept, report.total) if budget == "candidates" else (report.after.macs, report.before.macs)
    within = {0.0: True}
    for amount in (step * place for place in range(1, 14)):
        each = copy.deepcopy(network)
        prune(each, loader(), amount, budget=budget, progress=False)
        within[amount] = bool(accuracy(each, HELD_OUT) >= before - max_drop)
    best = max(amount for amount, good in within.items() if good)
    assert 0 < best < max(within) and within == {amount: amount <= best for amount in within}  # it grows
    unit = max(layer.macs for layer in explain(network, digits(2)[0]).layers) / count(network, "macs")
    margin = 0.02 if budget == "candidates" else 0.01 + unit / 2
    assert best - margin <= 1 - after / full  # to the nearest unit; more where the metric rises again within a step


def test_metrics_of_which_less_is_better():
    plans = []
    for metric in (MulticlassHammingDistance(10, average="micro"), MulticlassAccuracy(10, average="micro")):
        network = trained(mixed_net)
        plans.append(prune(network, loader(), metric=metric, max_drop=0.1, **AUTO).plan)
    assert plans[0] and plans[0] == plans[1]


def test_where_nothing_can_go_that_is_said():
    network = trained(mixed_net)
    before, worst = state_of(network), iter(range(0, -99, -1))
    with pytest.warns(UserWarning, match=r"nothing was pruned: already with amount=0.00\d+ .* max_drop=0.01"):
        plan, report = prune(network, loader(), metric=lambda *_: next(worst), **AUTO)
    assert not plan and report.before == report.after
    check_unchanged(network, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": None}, 'amount="auto" needs metric='),
        ({"val_dataloader": None}, "and val_dataloader=None"),
        ({"max_drop": -0.1}, "max_drop must be a finite number of at least 0, got -0.1"),
        ({"amount": 0.5}, 'are for amount="auto"'),
        ({"amount": "half"}, "amount must be a fraction.* got 'half'"),
        ({"metric": lambda *_: {"accuracy": 1}}, "must be a number, but it is"),
        ({"metric": Counted(fails=4, error=ValueError("mine"))}, "mine"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(options, message):
    network = trained(mixed_net, steps=1)
    before = state_of(network)
    with pytest.raises(ValueError, match=message):
        prune(network, loader(), **{"metric": accuracy, **AUTO, **options})
    check_unchanged(network, before)
