"""Connections that do nothing go first, and others stay in their place."""

import functools
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.ranking.criteria import CRITERIA, Criterion
from tests.conftest import Classifier, loader, mlp, trainer

WeightPruning = functools.partial(ScreeningPruningCallback, granularity="weight", end_epoch=3)


def fitted(net, **arguments):
    torch.manual_seed(0)
    callback = WeightPruning(**arguments)
    trainer([callback]).fit(Classifier(net), loader())
    return callback


def left_over(callback):
    """Connections that remain, and those of them that went as dead when the fit ended."""
    layers = callback.report().layers
    return sum(layer.kept for layer in layers), sum(layer.dead for layer in layers)


def convolutions():
    return nn.Sequential(
        *[nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()],
        *[nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)],
    )


@pytest.mark.parametrize("schedule", ["logistic", "one_shot"])
@pytest.mark.parametrize(("make", "amount"), [(mlp, 0.97), (convolutions, 0.95)])
def test_nothing_that_remains_does_nothing(make, amount, schedule):
    torch.manual_seed(0)
    screened = left_over(fitted(make(), amount=amount, schedule=schedule))
    torch.manual_seed(0)
    ranked = left_over(fitted(make(), amount=amount, schedule=schedule, criterion="magnitude"))
    assert screened[0] == ranked[0] and screened[1] == 0 < ranked[1]


def test_tasks_without_labels():
    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self(batch[0]), batch[0].flatten(1)[:, :10])

    torch.manual_seed(0)
    callback = WeightPruning(amount=0.97, criterion="connected_magnitude")
    images = loader().dataset.tensors[0]
    trainer([callback]).fit(Regression(mlp()), DataLoader(TensorDataset(images), batch_size=64))
    assert left_over(callback)[1] == 0 and callback.report().pruned_fraction == pytest.approx(0.97, abs=1e-3)


def test_a_network_that_cannot_be_captured_is_pruned_nevertheless(caplog):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x):
            x = self.first(x.flatten(1)).relu()
            return self.last(self.second(x).relu() if float(x.sum()) > 0 else x)

    with caplog.at_level(logging.INFO, "lightning_fscreen"):
        callback = fitted(Branching(), amount=0.97)
    assert callback.report().pruned_fraction == pytest.approx(0.97, abs=1e-3)
    assert caplog.text.count("it is not known which connections") == 1


@pytest.mark.parametrize(("criterion", "idle"), [("connected_magnitude", False), ("magnitude", True)])
def test_two_networks_in_one_module(criterion, idle):
    class Both(Classifier):
        def __init__(self):
            super().__init__(mlp())
            self.other = mlp()

        def forward(self, x):
            return self.net(x) + self.other(x)

    torch.manual_seed(0)
    callback = WeightPruning(amount=0.97, criterion=criterion)
    trainer([callback]).fit(Both(), loader())
    assert (left_over(callback)[1] > 0) is idle


@pytest.mark.parametrize("first", [False, True])
def test_criteria_of_ones_own_can_have_that_whatever_their_scores(monkeypatch, first):
    def below_zero(context):
        return {name: -1 / layer.weight.abs() for name, layer in context.layers.items()}

    own = Criterion(below_zero, idle_first=lambda screening_weight: first, needs_statistics=lambda weight: False)
    monkeypatch.setitem(CRITERIA, "own", own)
    assert (left_over(fitted(mlp(), amount=0.97, criterion="own"))[1] == 0) is first


def test_where_all_paths_would_be_cut_the_ranking_decides(monkeypatch):
    def everything(self, kept):
        return {name: torch.ones_like(mask) for name, mask in kept.items()}

    monkeypatch.setattr("lightning_fscreen.fit.connectivity.Connectivity.idle", everything)
    masks = []
    for criterion in ("connected_magnitude", "magnitude"):
        torch.manual_seed(0)
        masks.append(fitted(mlp(), amount=0.9, criterion=criterion).masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1])
