"""Weights in real trainings: the budget, what stays zero, what is removed at the end."""

import copy
import functools
import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.ranking.criteria import CRITERIA, Criterion
from lightning_fscreen.ranking.schedule import SCHEDULES
from tests.conftest import Classifier, ConvNet, digits, loader, mlp, trainer
from tests.test_channel_fit import residual_net

WeightPruning = functools.partial(ScreeningPruningCallback, granularity="weight")


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


class ZeroWatcher(pl.Callback):
    """After every step, before anything else looks: how many pruned weights are not zero."""

    def __init__(self, callback):
        self.callback = callback
        self.steps = 0
        self.moved = 0

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        modules = dict(pl_module.named_modules())
        for name, kept in self.callback.masks.items():
            self.moved += int((modules[name].weight.detach()[~kept] != 0).sum())
        self.steps += 1


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_budget_is_met_exactly_at_every_epoch(schedule, scope):
    callback = WeightPruning(amount=0.83, schedule=schedule, scope=scope, start_epoch=1, end_epoch=5)
    trainer([callback], max_epochs=6).fit(Classifier(mlp()), loader())
    total = callback.report().total
    for entry in callback.history:
        progress = min(max((entry["epoch"] + 1 - 1) / 4, 0), 1)
        assert entry["scheduled"] == pytest.approx(0.83 * SCHEDULES[schedule](progress))
        assert abs(entry["applied"] * total - entry["scheduled"] * total) <= 1
    assert [entry["applied"] for entry in callback.history] == sorted(entry["applied"] for entry in callback.history)
    assert abs(callback.report().pruned_fraction * total - 0.83 * total) <= 1
    if scope == "layer":
        assert all(abs(layer.kept - 0.17 * layer.total) <= 1 for layer in callback.report().layers)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("net", [mlp, ConvNet])
def test_pruned_weights_stay_exactly_zero_whatever_the_optimizer_does(optimizer, net):
    callback = WeightPruning(amount=0.7, slim=False, end_epoch=3)
    watcher = ZeroWatcher(callback)
    model = Classifier(net(), OPTIMIZERS[optimizer])
    trainer([callback, watcher], gradient_clip_val=0.5).fit(model, loader())
    assert watcher.steps == 16
    assert watcher.moved == 0
    modules = dict(model.named_modules())
    zeros = sum(int((modules[layer.name].weight == 0).sum()) for layer in callback.report().layers)
    assert zeros == callback.report().total - callback.report().kept == round(0.7 * callback.report().total)


def test_several_optimizers_under_manual_optimization():
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                loss = F.cross_entropy(self(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            first, second = self.net[:3].parameters(), self.net[3:].parameters()
            return torch.optim.SGD(first, lr=0.1, momentum=0.9), torch.optim.AdamW(second, weight_decay=0.1)

    callback = WeightPruning(amount=0.7, slim=False, end_epoch=2)
    model = Manual(mlp())
    trainer([callback]).fit(model, loader())
    modules = dict(model.named_modules())
    assert all(bool((modules[name].weight[~kept] == 0).all()) for name, kept in callback.masks.items())
    assert callback.report().pruned_fraction == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("net", [mlp, ConvNet])
def test_slimming_removes_parameters_and_keeps_the_function(net):
    torch.manual_seed(0)
    dense = Classifier(net())
    slim = copy.deepcopy(dense)
    masked, slimmed = (WeightPruning(amount=0.93, slim=slim) for slim in (False, True))
    trainer([masked]).fit(dense, loader())
    trainer([slimmed]).fit(slim, loader())
    images = digits()[0].double()
    dense.double().eval()
    slim.double().eval()
    assert torch.allclose(dense(images), slim(images), rtol=1e-5, atol=1e-6)  # folded in float32
    before, after = slimmed.report().before, slimmed.report().after
    assert after.params == sum(p.numel() for p in slim.parameters()) < before.params
    assert after.macs < before.macs
    assert sum(slimmed.report().removed.values()) > 0
    assert set(slimmed.report().removed) <= {layer.name for layer in slimmed.report().layers}
    assert masked.plan is None and slimmed.plan


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_a_checkpoint_saved_after_the_fit_holds_optimizer_state_of_the_slim_network(optimizer, tmp_path):
    make = (OPTIMIZERS | {"adafactor": torch.optim.Adafactor})[optimizer]
    callback, model = WeightPruning(amount=0.93), Classifier(mlp(), make)
    training = trainer([callback], max_epochs=2)
    training.fit(model, loader())
    assert sum(callback.report().removed.values()) > 0
    if optimizer == "adafactor":
        return  # its state cannot be cut: that is no error when nothing is trained any more
    training.save_checkpoint(tmp_path / "after.ckpt")
    resumed, longer = Classifier(mlp(), make), trainer([WeightPruning(amount=0.93)], max_epochs=3)
    longer.fit(resumed, loader(), ckpt_path=tmp_path / "after.ckpt", weights_only=True)
    state = longer.optimizers[0].state
    assert all(state[p]["exp_avg"].shape == p.shape for p in resumed.parameters())


def test_network_that_is_never_called_as_a_whole_is_pruned_but_not_slimmed(caplog):
    class Parts(Classifier):
        def training_step(self, batch, batch_idx):
            x = batch[0]
            for layer in self.net:
                x = layer(x)
            return F.cross_entropy(x, batch[1])

    callback = WeightPruning(amount=0.9)
    with caplog.at_level(logging.WARNING):
        trainer([callback]).fit(Parts(mlp()), loader())
    assert callback.report().pruned_fraction == pytest.approx(0.9, abs=1e-3)
    assert "'net' was not called" in callback.report().not_removed
    assert "nothing was physically removed" in caplog.text


def test_constants_that_slimming_put_into_pruned_weights_stay_in_this_fit_and_in_the_next(monkeypatch):
    """Where zero padding meets a constant, a retained channel carries it into a weight whose connection is pruned."""
    torch.manual_seed(0)
    model = Classifier(residual_net(), OPTIMIZERS["sgd"])
    masked = {}

    class Keep(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            masked["net"] = copy.deepcopy(pl_module.net).double().eval()

    def every_other_unit_first(layers, screening_weight, generator):
        return {
            name: layer.weight.abs() + (torch.arange(len(layer.weight)) % 2).view(-1, *[1] * (layer.weight.ndim - 1))
            for name, layer in layers.items()
        }

    monkeypatch.setitem(CRITERIA, "every_other", Criterion(every_other_unit_first, lambda screening_weight: False))
    callback = WeightPruning(amount=0.7, end_epoch=2, criterion="every_other")
    trainer([callback, Keep()], limit_train_batches=3).fit(model, loader(batch_size=48))
    x = digits(64)[0].double()
    weights = dict(model.named_modules())
    carried = sum(
        int((weights[name].weight[~callback.plan.cut(f"{name}.weight", kept)] != 0).sum())
        for name, kept in callback.masks.items()
    )
    assert carried > 0
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model.net).double().eval()(x), masked["net"](x), rtol=1e-6, atol=1e-8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    trainer([callback], max_epochs=3).fit(model, loader(batch_size=48))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def with_fresh_head():
    torch.manual_seed(0)
    net = mlp()
    nn.init.zeros_(net[-1].weight)
    return Classifier(net, functools.partial(torch.optim.SGD, lr=1e-3))


def test_a_fresh_head_on_a_trained_network_is_left_alone_also_when_its_fit_goes_on(tmp_path):
    whole, saving = WeightPruning(amount=0.9, end_epoch=3), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer([whole, saving], enable_checkpointing=True).fit(with_fresh_head(), loader())
    assert "net.5" not in whole.masks and "zero when the fit began" in whole.report().not_pruned["net.5"]
    chosen = WeightPruning(amount=0.9, end_epoch=3, include="*")
    trainer([chosen]).fit(with_fresh_head(), loader())
    assert chosen.masks["net.5"].sum() < 10  # of 320: what would become of it

    rest = WeightPruning(amount=0.9, end_epoch=3)
    trainer([rest]).fit(with_fresh_head(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert rest.masks.keys() == whole.masks.keys() and "net.5" in rest.report().not_pruned
    assert all(torch.equal(mask, rest.masks[name]) for name, mask in whole.masks.items())


def test_where_all_layers_begin_with_zeros_they_are_alike():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(net[1].weight)
    callback = WeightPruning(amount=0.5, end_epoch=2)
    trainer([callback], max_epochs=2).fit(Classifier(net), loader())
    assert callback.report().kept == 320


class Table(pl.LightningModule):
    """Numbers, of which two count, beside the embedding of a category."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(4, 3), nn.BatchNorm1d(22)
        self.layers = nn.Sequential(nn.Dropout(0.1), nn.Linear(25, 24), nn.ReLU(), nn.Linear(24, 2))

    def training_step(self, batch, batch_idx):
        joined = torch.cat([self.embedding(batch["kind"]), self.norm(batch["numbers"])], 1)
        return F.cross_entropy(self.layers(joined), batch["label"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def test_numbers_beside_embeddings_are_screened():
    """Only these: what the network has learned of the category is ranked by magnitude."""
    numbers, kinds = torch.randn(600, 22), torch.randint(4, (600,))
    labels = (numbers[:, :2].sum(1) + 2 * (kinds % 2) > 1).long()
    rows = [{"numbers": numbers[i], "kind": kinds[i], "label": labels[i]} for i in range(600)]
    model, callback = Table(), WeightPruning(amount=0.8, include="layers.1")
    trainer([callback], max_epochs=12).fit(model, torch.utils.data.DataLoader(rows, 50, shuffle=True))
    (found,) = (layer.evidence for layer in callback.report().layers)
    assert (found["features"], found["learned"], found["trusted"]) == (22, 3, None)
    assert found["mean"] >= 2 and found["shrunk"] >= 15
    kept = callback.masks["layers.1"].sum(0)
    assert kept[5:].sum() <= 0.3 * kept.sum()  # by magnitude, nearly half
