"""Layers that the training never calls are left alone, all at once; what is pruned but stays is reported."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.fit.masks import Masks
from lightning_fscreen.members import Members
from lightning_fscreen.slimming import SlimmingPlan


class Net(nn.Module):
    """`used` by its weight, `dead` not at all."""

    def __init__(self):
        super().__init__()
        self.first, self.used, self.dead, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.last(self.norm(F.linear(self.first(x).relu(), self.used.weight).relu()))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(**arguments):
    torch.manual_seed(0)
    callback = ScreeningPruningCallback(granularity="weight", end_epoch=1, num_classes=3, **arguments)
    data = torch.utils.data.TensorDataset(torch.randn(12, 6), torch.arange(12) % 3)
    trainer = pl.Trainer(barebones=True, max_epochs=2, accelerator="cpu", callbacks=[callback])
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=6))
    return callback


def test_layers_that_are_never_called_are_listed_and_the_others_meet_the_budget():
    callback = fit(amount=0.5)
    report = callback.report()
    assert [layer.name for layer in report.layers] == ["net.first", "net.last"]
    assert report.total == 72 and report.kept == 36
    assert set(report.not_pruned) == {"net.used", "net.dead"}
    assert "forward uses its weight without calling it" in report.not_pruned["net.used"]


def test_by_gradients_only_a_layer_without_any_is_left_out():
    report = fit(amount=0.5, criterion="taylor").report()
    assert list(report.not_pruned) == ["net.dead"] and "the loss does not depend on it" in report.not_pruned["net.dead"]


def test_an_included_layer_that_is_never_called_is_an_error_that_names_all():
    with pytest.raises(ValueError, match=r"layers \['net.used', 'net.dead'\] cannot be ranked: it was not called"):
        fit(amount=0.5, include="net.*")


def test_a_report_says_that_zeros_stay_in_full_tensors():
    report = fit(amount=0.3, criterion="magnitude").report()
    assert not report.removed and "zeros in tensors that keep their size" in report.not_removed


def test_kept_connections_of_units_that_went_are_counted_as_dead():
    kept = torch.tensor([[True, True, False], [True, True, True], [False, False, True], [True, False, True]])
    plan = SlimmingPlan({"a.weight": (4, 3)}, {"a.weight": {0: (0, 2, 3), 1: (0, 2)}})
    masks = Masks({"a": Members(nn.Parameter(torch.ones(3, 2)))}, {"a": kept}, plan=plan, names={"a": "a.weight"})
    assert masks.num_kept == {"a": 8} and masks.num_dead == {"a": 8 - 4}
