"""Modules whose training step calls several networks, each as a whole; every one of them becomes smaller, exactly."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_fscreen import ScreeningPruningCallback
from tests.conftest import digits, loader, trainer

WIDTH = 12


def block(inputs, outputs):
    return [nn.Linear(inputs, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs)]


class Parts(pl.LightningModule):
    """A backbone and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), *block(64, 8), nn.BatchNorm1d(8))
        self.head = nn.Sequential(*block(8, 10))

    def outputs(self, x):
        return self.head(self.backbone(x))

    def loss(self, x, y):
        return F.cross_entropy(self.outputs(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Variational(Parts):
    """The decoder runs inside forward, and by itself on noise."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Flatten(), *block(64, 4)), nn.Sequential(*block(4, 64))

    def forward(self, x):
        return self.head(self.backbone(x))

    def outputs(self, x):
        return self(x)

    def loss(self, x, y):
        noise = torch.ones(len(x), 4, dtype=x.dtype)
        return F.mse_loss(self(x), x.flatten(1)) + self.head(noise).square().mean() / 10


class Adversarial(Parts):
    """Generator inside forward, discriminator by itself, each with an optimizer and its turn."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.backbone = nn.Sequential(*block(4, 64))
        self.head = nn.Sequential(nn.Flatten(), *block(64, 1))

    def forward(self, noise):
        return self.backbone(noise)

    def outputs(self, x):
        return self.head(self(x.flatten(1)[:, 20:24]))

    def training_step(self, batch, batch_idx):
        images, _ = batch
        if batch_idx % 2:
            optimizer, loss = self.optimizers()[1], F.softplus(-self.head(images)).mean()
            self.manual_backward(loss)
            self.manual_backward(F.softplus(self.outputs(images)).mean())
        else:
            optimizer = self.optimizers()[0]
            self.manual_backward(F.mse_loss(self(images.flatten(1)[:, 20:24]), images.flatten(1)))
        optimizer.step()
        self.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.backbone, self.head)]


class Distilled(Parts):
    """A teacher that nobody trains, without being told so."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Flatten(), *block(64, 10))

    def loss(self, x, y):
        with torch.no_grad():
            soft = self.teacher(x).softmax(1)
        return F.cross_entropy(self.outputs(x), soft) + super().loss(x, y)

    def configure_optimizers(self):
        return torch.optim.SGD([*self.backbone.parameters(), *self.head.parameters()], lr=0.05)


class Assisted(Parts):
    """The head has a second output, wider than all else, in training alone."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aside = nn.Sequential(*block(8, 10)), nn.Sequential(nn.Linear(8, 256), nn.ReLU())
            self.aside.append(nn.Linear(256, 10))

        def forward(self, x):
            return self.main(x) + (self.aside(x) if self.training else 0)

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Flatten(), *block(64, 8)), self.Head()


def fit(model, slim=True, **arguments):
    torch.manual_seed(0)
    made = model()
    callback = ScreeningPruningCallback(**{"amount": 0.5, "end_epoch": 2, "slim": slim, **arguments})
    trainer([callback], max_epochs=4, precision="64-true").fit(made, loader(32))
    return made, callback


@pytest.mark.parametrize("model", [Parts, Variational, Adversarial, Distilled])
@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_every_network_becomes_smaller_and_trains_on_as_if_it_were_masked(model, granularity):
    arguments = {"granularity": granularity, "amount": 0.5 if granularity == "channel" else 0.9}
    if model is Adversarial:
        arguments["criterion"] = "magnitude"
    slim, callback = fit(model, **arguments)
    masked, _ = fit(model, slim=False, **arguments)
    x = digits()[0].double()
    torch.testing.assert_close(slim.eval().outputs(x), masked.eval().outputs(x), rtol=1e-8, atol=1e-8)
    report = callback.report()
    assert report.pruned_fraction == pytest.approx(arguments["amount"], abs=0.03)
    own = {name: sum(p.numel() for p in part.parameters(recurse=False)) for name, part in slim.named_modules()}
    assert all(size.params == own[name] for name, size in report.after.layers.items())
    assert {layer.name for layer in report.layers} <= {*report.after.layers}
    if granularity == "channel":
        assert report.not_removed is None
        assert {name.split(".")[0] for name, count in callback.plan.removed.items() if count} == {"backbone", "head"}
    if model is Distilled:
        assert {name for name in report.not_pruned if name.startswith("teacher")}
        assert "none of the parameters of module 'teacher' is in an optimizer" in report.not_pruned.values()
        assert all(bool((p != 0).all()) for p in slim.teacher[1].parameters())


def test_what_runs_in_training_alone_costs_nothing():
    _, callback = fit(Assisted, granularity="unit", budget="macs")
    report = callback.report()
    assert report.after.macs == pytest.approx(0.5 * report.before.macs, rel=0.1)
    assert report.before.layers["head.aside.0"].macs == 0 < report.before.layers["head.main.0"].macs == 8 * WIDTH


def test_what_several_networks_pass_to_each_other_keeps_its_size():
    _, callback = fit(Parts)
    assert callback.report().not_pruned == {"backbone.5": "it is an output of the network"}


def test_layers_that_no_network_holds_are_listed_when_pruning_begins():
    class Loose(Parts):
        def __init__(self):
            super().__init__()
            self.unused, self.norm = nn.Sequential(*block(8, 8)), nn.BatchNorm1d(8)

        def outputs(self, x):
            return self.head(self.norm(self.backbone(x)))

    _, callback = fit(Loose, num_classes=10)
    reasons = callback.report().not_pruned
    assert reasons.keys() == {"backbone.5", "unused.1", "norm"}
    assert "no module that holds it is called as a whole" in reasons["unused.1"] == reasons["norm"]


def test_networks_of_different_sizes_share_one_ranking():
    _, callback = fit(Parts, criterion="magnitude", schedule="one_shot", min_channels=0)
    assert {layer.name for layer in callback.report().layers} == {"backbone.2", "head.1"}
    assert callback.report().kept == WIDTH


class Logging(Parts):
    def forward(self, x):
        outputs = self.head(self.backbone(x))
        self.log("largest", outputs.max())
        self.log_dict({"smallest": outputs.min()}, on_step=True)
        return outputs

    def outputs(self, x):
        return self(x)


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_forward_may_log(granularity, caplog):
    torch.manual_seed(0)
    model, callback = Logging(), ScreeningPruningCallback(granularity, amount=0.5, end_epoch=1)
    run = trainer([callback], max_epochs=2)
    with caplog.at_level(logging.WARNING):
        run.fit(model, loader())
    assert (
        callback.plan is not None and "log" not in vars(model) and {"largest", "smallest"} <= set(run.callback_metrics)
    )
    assert "cannot be captured" not in caplog.text


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_the_size_before_is_that_of_the_dense_network(granularity):
    torch.manual_seed(0)
    dense = sum(int((p != 0).sum()) for p in Parts().parameters())
    _, callback = fit(Parts, granularity=granularity)
    assert callback.report().before.nonzero == dense > callback.report().after.nonzero


class Branches(Parts):
    """Nothing of the network that is called first can be pruned: all of it reaches the other, a single layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
        self.second = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        self.backbone, self.head = nn.Identity(), nn.Linear(16, 10)

    def outputs(self, x):
        return self.head(torch.cat([self.first(x), self.second(x)], 1))


def test_a_budget_is_checked_when_all_networks_are_known():
    model, callback = fit(Branches, granularity="unit", budget="params", num_classes=10)
    report = callback.report()
    assert report.after.params == pytest.approx(0.5 * report.before.params, rel=0.02)
    assert model.second[1].out_features < 64
    with pytest.raises(ValueError, match=r"amount=0.95 of the cost cannot go: .*lower amount to 0\.8"):
        fit(Branches, granularity="unit", budget="params", num_classes=10, amount=0.95)


class Bags(pl.LightningModule):
    """PyTorch's text classification: all words of a batch one after the other, and where each text begins."""

    def __init__(self):
        super().__init__()
        self.net = _Bag()

    def training_step(self, batch, batch_idx):
        labels, words, offsets = batch
        return F.cross_entropy(self.net(words, offsets), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.first, self.last = nn.EmbeddingBag(30, 8), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, words, offsets):
        return self.last(self.first(self.embed(words, offsets)).relu())


@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_inputs_that_name_others_by_numbers_are_kept_whole(granularity):
    lengths = torch.arange(1, 13)
    offsets = lengths.cumsum(0) - lengths
    batch = torch.arange(12) % 3, torch.randint(30, (int(lengths.sum()),)), offsets
    callback = ScreeningPruningCallback(granularity, amount=0.5, labels=lambda batch: batch[0], end_epoch=1)
    trainer([callback], max_epochs=2).fit(model := Bags(), DataLoader([batch] * 4, batch_size=None))
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=0.01)
    assert model.net.first.out_features == 8 or granularity == "weight"


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_sparse_inputs(granularity, layout):
    class Sparse(Parts):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 3))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    words = torch.randn(24, 40).relu() * (torch.rand(24, 40) < 0.1)
    batch = words.to_sparse(layout=layout), torch.arange(24) % 3
    callback = ScreeningPruningCallback(granularity, amount=0.5, end_epoch=1)
    trainer([callback], max_epochs=2).fit(model := Sparse(), DataLoader([batch] * 4, batch_size=None))
    assert model.net[0].out_features == 8 or granularity == "weight"


class Later(Parts):
    """The second of two heads is trained from epoch 2 on."""

    def __init__(self):
        super().__init__()
        self.net = _TwoHeads()
        del self.backbone, self.head

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0], self.current_epoch >= 2), batch[1])


class _TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.one, self.other = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 10)

    def forward(self, x, other):
        return (self.other if other else self.one)(self.body(x.flatten(1)).relu())


def test_layers_that_are_not_used_are_warned_of_once(caplog):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer([ScreeningPruningCallback("unit", amount=0.5, end_epoch=2)], max_epochs=4).fit(Later(), loader())
    warned = [record.getMessage() for record in caplog.records if "does not use net.other" in record.getMessage()]
    assert len(warned) == 1 and "exclude" in warned[0]


class Skipping(Parts):
    def training_step(self, batch, batch_idx):
        return None if self.global_step == 0 and batch_idx < 2 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_batches_that_are_skipped_say_nothing_of_the_network(granularity):
    callback = ScreeningPruningCallback(granularity, amount=0.5, end_epoch=1)
    trainer([callback], max_epochs=2).fit(Skipping(), loader())
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_the_users_are_warned_of_once_and_see_what_is_left(before, caplog):
    class Hooked(Parts):
        def __init__(self):
            super().__init__()
            self.widths = []
            if before:
                self.head[2].register_forward_pre_hook(lambda module, args: self.widths.append(args[0].shape[1]))
            else:
                self.head[1].register_forward_hook(lambda module, args, output: self.widths.append(output.shape[1]))

    callback = ScreeningPruningCallback(amount=0.5, end_epoch=1, scope="layer")
    trainer([callback], max_epochs=3).fit(model := Hooked(), loader())
    warned = [record.getMessage() for record in caplog.records if "forward hooks of" in record.getMessage()]
    assert len(warned) == 1 and f"head.{2 if before else 1}" in warned[0]
    assert model.widths[0] == WIDTH and model.widths[-1] == WIDTH // 2
