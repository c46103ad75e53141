"""Channels in real trainings: the budget, slimming in the middle of a fit, what the optimizer does afterwards."""

import copy
import functools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F

from lightning_fscreen import ScreeningPruningCallback, load_slimmed, save_slimmed
from lightning_fscreen.ranking.schedule import SCHEDULES
from lightning_fscreen.slimming import CaptureError
from tests.conftest import Classifier, digits, loader, trainer
from tests.processes import run_ranks

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


class Block(nn.Module):
    """Pre-activation residual block."""

    def __init__(self, width, out, stride=1):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.skip = nn.Identity() if width == out and stride == 1 else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x):
        return self.skip(x) + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


def residual_net():
    return nn.Sequential(
        nn.Identity(),
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        Block(8, 8),
        Block(8, 16, 2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def post_net():
    """Two batch norms whose outputs are added, and one with 30 channels by itself."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(1, 10, 3, padding=1), nn.BatchNorm2d(10))
            self.b = nn.Sequential(nn.Conv2d(1, 10, 1), nn.BatchNorm2d(10))

        def forward(self, x):
            return (self.a(x) + self.b(x)).relu()

    tail = [nn.Conv2d(10, 30, 3), nn.BatchNorm2d(30), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(Sum(), *tail, nn.Linear(30, 10))


SCOPES = [("global", 1), ("layer", 1), ("layer", 3)]
Pruning = functools.partial(ScreeningPruningCallback, granularity="channel", amount=0.5)


def fitted(callback, optimizer="sgd", net=residual_net, callbacks=(), seed=0, **options):
    torch.manual_seed(seed)
    model = Classifier(net(), OPTIMIZERS[optimizer])
    fit = trainer([callback, *callbacks], **options)
    fit.fit(model, loader())
    return model, fit


class Around(pl.Callback):
    """Loss of a fixed batch around slimming, and which parameters move afterwards."""

    def __init__(self, callback):
        self.callback = callback
        self.losses = []
        self.unmoved = None
        self.before = None

    def loss(self, model):
        images, labels = (part[:256] for part in digits())
        double = copy.deepcopy(model.net).double().eval()
        with torch.no_grad():
            return float(F.cross_entropy(double(images.double()), labels))

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(self.loss(pl_module))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.callback.plan is not None and self.before is None:
            self.losses.append(self.loss(pl_module))
            self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            listed = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            assert listed == {id(p) for p in pl_module.parameters()}
            assert set(trainer.optimizers[0].state) <= set(pl_module.parameters())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.before is not None and self.unmoved is None:
            self.unmoved = [n for n, p in pl_module.named_parameters() if torch.equal(p, self.before[n])]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bias", ["zero", "fold", "mean"])
def test_slimming_in_the_fit_changes_no_loss_and_every_parameter_goes_on_learning(optimizer, bias):
    callback = Pruning(end_epoch=2, schedule="one_shot", bias=bias)
    around = Around(callback)
    model, _ = fitted(callback, optimizer, callbacks=[around])
    assert callback.plan and callback.report().kept == round(0.5 * callback.report().total)
    assert around.losses[2] == pytest.approx(around.losses[1], rel=1e-6)  # float32 parameters, evaluated in float64
    # A retained channel that carries constants has its scale masked at zero.
    assert [name for name in around.unmoved if "norm" not in name] == []
    report = callback.report()
    assert report.after.params < 0.6 * report.before.params and report.after.macs < 0.6 * report.before.macs
    assert report.after.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["one_shot", "logistic"])
def test_a_run_that_slims_equals_the_run_with_masks_only(optimizer, schedule):
    results = []
    for slim in (True, False):
        callback = Pruning(end_epoch=2, schedule=schedule, slim=slim)
        model, _ = fitted(callback, optimizer)
        images = digits()[0]
        results.append((model.net.eval()(images), callback))
    (slimmed, first), (masked, second) = results
    assert torch.allclose(slimmed, masked, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(first.masks[name], mask) for name, mask in second.masks.items())
    assert first.plan and second.plan is None
    assert first.report().layers == second.report().layers


@pytest.mark.parametrize(
    ("schedule", "scope", "min_channels"),
    [*((schedule, "global", 3) for schedule in SCHEDULES), *(("logistic", *rest) for rest in SCOPES)],
)
def test_the_budget_is_met_at_every_epoch(schedule, scope, min_channels):
    kept = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept.append({name: int(mask.sum()) for name, mask in callback.masks.items()})

    callback = Pruning(
        amount=0.7, schedule=schedule, scope=scope, min_channels=min_channels, start_epoch=1, end_epoch=3
    )
    fitted(callback, callbacks=[Watch()])
    total = callback.report().total
    for counts, entry in zip(kept, callback.history, strict=True):
        assert sum(counts.values()) == total - round(entry["scheduled"] * total)
        assert min(counts.values()) >= min_channels
    assert callback.report().pruned_fraction == pytest.approx(0.7, abs=1 / total)


def test_channels_are_ranked_by_the_feature_asked_for():
    masks = {}
    for feature in ("activation", "activation", "output_square"):
        callback = Pruning(
            amount=0.5, end_epoch=1, criterion="screening_product", screening_weight=1.0, feature=feature
        )
        fitted(callback)
        kept = torch.cat(list(callback.masks.values()))
        assert feature not in masks or torch.equal(kept, masks[feature])
        masks[feature] = kept
    assert not torch.equal(masks["activation"], masks["output_square"])


def test_coupled_channels_are_pruned_as_one_and_the_budget_is_still_met():
    callback = Pruning(amount=0.4, end_epoch=2)
    model, _ = fitted(callback, net=post_net)
    masks = callback.masks
    assert torch.equal(masks["net.0.a.1"], masks["net.0.b.1"])
    assert sum(int(mask.sum()) for mask in masks.values()) == 30
    assert model.net[0].a[0].out_channels == model.net[1].in_channels == int(masks["net.0.a.1"].sum())


def test_statistics_are_collected_only_before_prunings():
    seen = []

    def hooked(pl_module):
        return any(module._forward_hooks for module in pl_module.modules())

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((trainer.current_epoch, hooked(pl_module) and trainer.global_step > 0))  # the first one records

        def on_before_backward(self, trainer, pl_module, loss):
            assert not hooked(pl_module)

    callback = Pruning(end_epoch=3, schedule="one_shot", slim=False)
    fitted(callback, callbacks=[Watch()])
    assert {epoch for epoch, gathers in seen if gathers} == {2}
    seen.clear()
    fitted(Pruning(end_epoch=3, schedule="one_shot", slim=False, collect_epochs=2), callbacks=[Watch()])
    assert {epoch for epoch, gathers in seen if gathers} == {1, 2}


def test_learning_rates_are_rewound_when_fine_tuning_begins():
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])]

    for rewind in (True, False):
        fit = trainer([Pruning(end_epoch=2, rewind_lr=rewind), Watch()])
        fit.fit(Scheduled(residual_net()), loader())
    assert rates == pytest.approx([0.1, 0.01, 0.1, 0.01, 0.1, 0.01, 0.001, 0.001])


def test_channels_parameters_and_macs_are_logged(tmp_path):
    callback = Pruning(end_epoch=2, schedule="one_shot")
    fitted(callback, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    column = {name: [row[header.index(name)] for row in rows] for name in header}
    report = callback.report()
    assert float(column["fscreen/params"][0]) == report.before.params
    assert float(column["fscreen/params"][-1]) == report.after.params
    assert float(column["fscreen/macs"][-1]) == report.after.macs
    assert float(column["fscreen/channels"][-1]) == report.kept


def load(folder):
    """In another process."""
    net = load_slimmed(residual_net(), folder / "model.safetensors").eval()
    torch.save(net(digits()[0]), folder / "out.pt")


def test_another_process_loads_the_same_network_bit_by_bit(tmp_path):
    model, _ = fitted(Pruning(end_epoch=2, bias="fold"))
    save_slimmed(model.net, tmp_path / "model.safetensors")
    run_ranks(1, load, tmp_path)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), model.net.eval()(digits()[0]))
    whole = Classifier(residual_net())
    save_slimmed(model, tmp_path / "whole.safetensors")
    load_slimmed(whole, tmp_path / "whole.safetensors")
    assert torch.equal(whole.net.eval()(digits()[0]), model.net(digits()[0]))


def test_the_head_that_reads_the_last_channels_belongs_to_the_network():
    class Parts(Classifier):
        def __init__(self):
            super().__init__(residual_net()[:-1])
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.net(x))

    torch.manual_seed(0)
    model, callback = Parts(), Pruning(end_epoch=1)
    trainer([callback], max_epochs=2).fit(model, loader())
    assert callback.report().not_pruned == {}
    assert model.head.in_features == int(callback.masks["net.4"].sum())


def test_without_an_epoch_of_fine_tuning_the_network_is_slimmed_when_the_fit_ends():
    callback = Pruning(end_epoch=4)
    model, fit = fitted(callback)
    assert callback.plan and callback.report().after.params == sum(p.numel() for p in model.parameters())
    assert {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]} == set(
        map(id, model.parameters())
    )


def test_a_second_fit_trains_the_slim_network_and_prunes_no_more():
    callback = Pruning(end_epoch=2)
    model, _ = fitted(callback)
    kept, plan = callback.report().kept, callback.plan
    trainer([callback]).fit(model, loader())
    assert callback.report().kept == kept and callback.plan == plan


def test_optimizers_with_factored_state_are_refused():
    callback = Pruning(end_epoch=1)
    with pytest.raises(NotImplementedError, match=r"Adafactor keeps 'row_var' .*slim=False"):
        torch.manual_seed(0)
        trainer([callback]).fit(Classifier(residual_net(), torch.optim.Adafactor), loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bias": "none"}, r"unknown bias 'none'; choose one of \['zero', 'fold', 'mean'\]"),
        ({"collect_epochs": 0}, "collect_epochs must be at least 1"),
        ({"connections": "exact"}, 'is for granularity="weight"'),
        ({"granularity": "weight", "bias": "fold"}, 'is for granularity="unit" or "channel"'),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScreeningPruningCallback(**arguments)


def test_networks_without_gates_are_refused_with_the_reasons():
    with pytest.raises(ValueError, match="it has no batch norms"):
        fitted(Pruning(), net=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(ValueError, match=r"(?s)none of its batch norms can be.*net.0: .*frozen"):
        frozen = nn.Sequential(nn.BatchNorm2d(1).requires_grad_(False), nn.Flatten(), nn.Linear(64, 10))
        fitted(Pruning(), net=lambda: frozen)
    with pytest.raises(
        ValueError, match=r"(?s)nothing to prune in Classifier.forward.*net.2: it is an output of the network"
    ):
        fitted(Pruning(), net=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10)))


def test_a_network_that_cannot_be_captured_is_refused_at_the_first_batch():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)), nn.Linear(64, 8)
            self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 10)

        def forward(self, x):
            x = self.norm(self.body(self.stem(x)))
            return self.fc(x if float(x.mean()) > -1 else -x)

    with pytest.raises(CaptureError, match=r"Branches cannot be captured .*depends on values"):
        fitted(Pruning(), net=Branches)


def test_a_network_that_is_called_in_parts_is_refused():
    class Parts(Classifier):
        def training_step(self, batch, batch_idx):
            x = batch[0]
            for part in self.net:
                x = part(x)
            return F.cross_entropy(x, batch[1])

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="was not called in training_step"):
        trainer([Pruning()]).fit(Parts(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))), loader())


def test_a_dense_checkpoint_is_pruned_first_and_its_learning_rates_rewound(tmp_path):
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                rates.append((trainer.current_epoch, trainer.optimizers[0].param_groups[0]["lr"]))

    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])]

    dense = trainer(max_epochs=4)
    dense.fit(Scheduled(residual_net()), loader())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    callback = Pruning(schedule="one_shot", rewind_lr=True)
    resumed = trainer([callback, Watch()], max_epochs=8)
    resumed.fit(Scheduled(residual_net()), loader(), ckpt_path=tmp_path / "dense.ckpt", weights_only=True)
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=0.01) and callback.plan
    assert [entry["applied"] for entry in callback.history] == pytest.approx([0.5] * 4, abs=0.01)
    assert [epoch for epoch, _ in rates] == [4, 5, 6, 7]
    assert [rate for _, rate in rates] == pytest.approx([0.001, 0.1, 0.01, 0.001])


class Wrapping(torch.optim.Optimizer):
    """Steps by another optimizer, whose groups it shares, as SAM and Lookahead do."""

    def __init__(self, parameters):
        self.inner = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)


def test_the_state_of_an_optimizer_inside_another_follows():
    losses = {}
    for slim in (True, False):
        torch.manual_seed(0)
        model = Classifier(residual_net(), Wrapping)
        fit = trainer([ScreeningPruningCallback(amount=0.5, end_epoch=2, slim=slim)], max_epochs=4)
        fit.fit(model, loader())
        losses[slim] = model.losses
        assert fit.optimizers[0].inner.state.keys() == set(model.parameters())
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
