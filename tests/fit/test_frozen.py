"""Layers that are frozen when the fit begins, and trained when pruning does."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fscreen import ScreeningPruningCallback
from tests.conftest import loader, trainer


class FineTuned(LightningModule):
    """A backbone, and a head of one layer, which alone is trained at first."""

    def __init__(self, in_parts: bool, classes: int = 10) -> None:
        super().__init__()
        self.in_parts = in_parts
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        outputs = self.head(self.backbone(batch[0])) if self.in_parts else self(batch[0])
        return F.cross_entropy(outputs, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad], lr=1e-2)


class Freezing(Callback):
    """Trains a part of the model only from an epoch on."""

    def __init__(self, epoch: int, part: str = "backbone") -> None:
        self.epoch, self.part = epoch, part

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        pl_module.get_submodule(self.part).requires_grad_(trainer.current_epoch >= self.epoch)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("in_parts", [True, False])
def test_a_backbone_that_is_trained_later_is_pruned(in_parts: bool, first: bool, caplog) -> None:
    """Alone, as a network of its own, or in a module of which nothing can be pruned before."""
    model = FineTuned(in_parts)
    callback = ScreeningPruningCallback("unit", 0.5, start_epoch=2, end_epoch=4)
    others = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    trainer([callback, others] if first else [others, callback], max_epochs=5).fit(model, loader())
    layers = ["backbone.1"] if in_parts else ["backbone.1", "backbone.3"]
    assert [layer.name for layer in callback.report().layers] == layers
    assert model.backbone[1].out_features + (0 if in_parts else model.backbone[3].out_features) == (
        16 if in_parts else 24
    )
    assert model.head.in_features == model.backbone[3].out_features
    assert "Some parameters are frozen" in caplog.text


def test_a_short_trial_goes_through() -> None:
    callback = ScreeningPruningCallback("unit", 0.5, start_epoch=2, end_epoch=4)
    others = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    trainer([callback, others], fast_dev_run=True).fit(FineTuned(False), loader())
    assert callback.report().total == callback.report().kept and not callback.plan


@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_what_is_still_frozen_when_pruning_begins_stays(granularity: str) -> None:
    model = FineTuned(False)
    before = [parameter.clone() for parameter in model.backbone.parameters()]
    callback = ScreeningPruningCallback(granularity, 0.5, start_epoch=1, end_epoch=2, slim=granularity == "unit")
    fit = trainer([callback, Freezing(2)], max_epochs=4)
    if granularity == "unit":
        with pytest.raises(ValueError, match=r"(?s)nothing to prune.*backbone.1: frozen.*let start_epoch be later"):
            fit.fit(model, loader())
        return
    model.configure_optimizers = lambda: torch.optim.SGD(model.head.parameters(), lr=0.1)
    fit.fit(model, loader())
    assert [layer.name for layer in callback.report().layers] == ["head"]
    assert all(torch.equal(*pair) for pair in zip(before, model.backbone.parameters(), strict=True))


def test_weights_that_are_trained_later_are_candidates_and_a_new_head_is_none() -> None:
    model = FineTuned(False)
    nn.init.zeros_(model.head.weight)
    model.backbone[1].requires_grad_(False)
    callback = ScreeningPruningCallback("weight", 0.5, start_epoch=2, end_epoch=3)
    trainer([callback, Freezing(1, "backbone.1")], max_epochs=4).fit(model, loader())
    assert [layer.name for layer in callback.report().layers] == ["backbone.1", "backbone.3"]
    assert callback.history[-1]["applied"] == pytest.approx(0.5, abs=1e-3)


def test_an_amount_that_the_head_alone_cannot_meet() -> None:
    model = FineTuned(False)
    model.head = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 10))
    callback = ScreeningPruningCallback("unit", 0.6, budget="macs", start_epoch=2, end_epoch=3)
    trainer([callback, Freezing(1)], max_epochs=4).fit(model, loader())
    report = callback.report()
    assert report.after.macs == pytest.approx(0.4 * report.before.macs, rel=0.05)


def test_nothing_is_looked_for_again_once_pruning_has_begun() -> None:
    model = FineTuned(False)
    nn.init.normal_(model.head.weight)
    callback = ScreeningPruningCallback("weight", 0.5, start_epoch=0, end_epoch=2)
    trainer([callback, BackboneFinetuning(unfreeze_backbone_at_epoch=1)], max_epochs=3).fit(model, loader())
    assert [layer.name for layer in callback.report().layers] == ["head"]


def test_a_checkpoint_with_masks_of_what_is_frozen_now_says_so(tmp_path) -> None:
    model = FineTuned(False)
    fit = trainer([ScreeningPruningCallback("weight", 0.5, end_epoch=2)], max_epochs=3)
    fit.fit(model, loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    other = FineTuned(False)
    other.backbone.requires_grad_(False)
    again = trainer([ScreeningPruningCallback("weight", 0.5, end_epoch=2)], max_epochs=4)
    with pytest.raises(ValueError, match=r"has masks for .*\(backbone.1: frozen.*, backbone.3: frozen"):
        again.fit(other, loader(), ckpt_path=tmp_path / "last.ckpt")
