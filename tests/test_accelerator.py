"""Whole fits on a pretended accelerator: no operands on two devices, no waiting in the training step."""

import contextlib
import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.costs.latency import measure_latency
from lightning_fscreen.fit import hooks
from tests.conftest import Classifier, digits, loader, mlp, trainer
from tests.pretended import pretended, pretended_trainer, pretending
from tests.saving.test_checkpoints import momentum
from tests.test_channel_fit import residual_net
from tests.test_unit_fit import mixed_net

CUDA = torch.device("cuda", 0)
SCALERS = {"bf16-mixed": lambda: None, "16-mixed": lambda: torch.amp.GradScaler("cpu")}


def fit(arguments, callbacks=(), net=residual_net, ckpt_path=None, make_optimizer=momentum, **options):
    torch.manual_seed(0)
    callback = ScreeningPruningCallback(**{"amount": 0.5, "end_epoch": 2, **arguments})
    model = Classifier(net(), make_optimizer)
    first, *rest = callbacks or [pl.Callback()]
    trainer = pretended_trainer([first, callback, *rest], **options)
    trainer.fit(model, loader(64, 128), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return callback, model


def test_tensors_pretend_to_be_where_they_were_sent():
    with pretending() as operators:
        x = torch.arange(3.0).to("cuda")
        assert x.device == CUDA and x.is_cuda and pretended(x * 2 + torch.tensor(1.0)) == CUDA
        assert torch.zeros(2, device="cuda:1").device.index == 1 and copy.deepcopy(x).device == CUDA
        linear = nn.Linear(3, 2).to("cuda")
        linear(x).sum().backward()
        assert linear.weight.grad.device == CUDA and linear.cpu().weight.device.type == "cpu"
        for meet in (lambda: x + torch.ones(3), lambda: x.index_select(0, torch.tensor([1]))):
            with pytest.raises(RuntimeError, match="on the same device"):
                meet()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        operators.waits.clear()
        assert x[torch.tensor([0])].item() == 0 and len(operators.waits) == 1
        y = torch.ones(3, requires_grad=True)
        (y.to("cuda") * x).sum().backward()
        assert y.grad.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {"precision": "bf16-mixed"}),
        ({"bias": "mean", "criterion": "screening_rank"}, {"index": 1}),
        ({"criterion": "taylor", "end_epoch": 0}, {"precision": "bf16-true"}),
        ({"soft": True, "scope": "layer", "bias": "fold", "feature": "output_square"}, {}),
        ({"granularity": "weight", "connections": "exact"}, {"max_epochs": 2}),
        ({"granularity": "weight", "criterion": "screening_sum", "rewind_weights": True}, {"precision": "bf16-mixed"}),
        ({"granularity": "weight", "criterion": "gradient", "soft": True}, {"index": 1}),
        ({"granularity": "weight", "criterion": "activation", "scope": "layer"}, {}),
        ({"granularity": "unit", "criterion": "random", "scope": "kind", "bias": "mean"}, {"precision": "bf16-mixed"}),
        ({"granularity": "unit", "criterion": "taylor", "soft": True}, {"precision": "bf16-true"}),
        ({"granularity": "unit", "criterion": "screening_product", "rewind_weights": True}, {"index": 1}),
        ({"granularity": "unit", "criterion": "magnitude", "scope": "layer", "bias": "fold"}, {}),
    ],
)
def test_devices_never_meet_in_a_fit(arguments, options):
    with pretending():
        callback, model = fit(arguments, net=mixed_net if "unit" in arguments.values() else residual_net, **options)
    report = callback.report()
    assert abs(report.kept - report.total / 2) <= 1 and callback.plan is not None
    assert report.after.params == sum(p.numel() for p in model.parameters())


def test_a_deterministic_fit_asks_for_nothing_that_has_no_deterministic_form(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # Lightning sets it
    try:
        with pretending():
            callback, _ = fit({"granularity": "weight", "criterion": "screening"}, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=0.01)


class Waits(pl.Callback):
    """For every training step, where in the package the host waited for the device."""

    def __init__(self, operators):
        self.operators, self.steps, self.before = operators, [], 0

    def on_train_batch_start(self, *_):
        self.before = len(self.operators.waits)

    def end(self):
        self.steps.append([where for _, where in self.operators.waits[self.before :] if where])


class End(pl.Callback):
    def __init__(self, waits):
        self.waits = waits

    def on_train_batch_end(self, *_):
        self.waits.end()


@pytest.mark.parametrize(
    ("granularity", "net"), [("channel", residual_net), ("weight", residual_net), ("unit", mixed_net)]
)
def test_no_step_waits_for_the_device(granularity, net):
    with pretending() as operators:
        waits = Waits(operators)
        fit({"granularity": granularity, "collect_every": 1}, [waits, End(waits)], net, max_epochs=4)
    # Two batches an epoch. The first step of all learns the network; the labels of an epoch's first batch are checked.
    assert [len(where) for where in waits.steps[3::2]] == [0, 0, 0]
    assert not waits.steps[6], "an ordinary step waits"
    assert set(waits.steps[2]) <= {place for place in waits.steps[2] if "functional" in place or "labels" in place}


@pytest.mark.parametrize("granularity", ["channel", "weight", "unit"])
def test_resumed_in_an_epoch_and_when_only_the_end_of_the_last_is_left(granularity, tmp_path):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step in (3, 6):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    arguments = {"granularity": granularity, "end_epoch": 3}
    with pretending():
        whole, model = fit(arguments, [Saves()], mixed_net)
        middle, _ = fit(arguments, net=mixed_net, ckpt_path=tmp_path / "3.ckpt")  # with other batches
        resumed, again = fit(arguments, net=mixed_net, ckpt_path=tmp_path / "6.ckpt")
    assert resumed.report().kept == middle.report().kept == whole.report().kept < whole.report().total
    for (name, first), second in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7, msg=name)


class NeedsItsDevice(nn.Module):
    """A forward pass with a constant on the device where it is trained."""

    def __init__(self):
        super().__init__()
        self.first, self.second = mlp(classes=10), nn.Linear(10, 10)

    def forward(self, x):
        return self.second(self.first(x) + torch.ones(10, device="cuda"))


def test_a_network_that_runs_on_its_device_alone_survives_the_end_of_its_fit():
    with pretending():
        callback, _ = fit({"granularity": "weight"}, net=NeedsItsDevice)
    assert "fails on the CPU, where Lightning moves a model" in callback.report().not_removed
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=1e-3)


def test_learning_rates_that_are_tensors_are_rewound_in_place():
    def make(parameters):
        return torch.optim.Adam(parameters, lr=torch.tensor(0.01), capturable=False, foreach=False)

    seen = []

    class Halves(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(trainer.optimizers[0].param_groups[0]["lr"]))
            trainer.optimizers[0].param_groups[0]["lr"].mul_(0.5)

    with pretending():
        fit({"rewind_lr": True}, [pl.Callback(), Halves()], make_optimizer=make, max_epochs=4)
    torch.testing.assert_close(seen, [0.01, 0.005, 0.01, 0.005])


def test_latency_is_measured_on_the_device():
    with pretending():
        assert measure_latency(mlp().to("cuda"), (torch.zeros(2, 1, 8, 8),), batch_sizes=(2,))[2] > 0


def test_inputs_that_change_in_place_behind_autocasts_back_are_seen_as_they_were():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 10)

        def forward(self, x):
            hidden = self.first(x.flatten(1)).float()
            out = self.second(hidden)  # under autocast it reads a copy
            hidden.detach().zero_()
            return out

    from lightning_fscreen.statistics.collector import ActivationCollector
    from lightning_fscreen.statistics.probes import Probe

    network, (images, labels) = Overwrites(), digits(64)
    collector = ActivationCollector([Probe("second", network.second)], 10)
    collector.attach()
    with torch.autocast("cpu", torch.bfloat16):
        network(images)
    collector.update(labels)
    assert bool((collector.statistics()["second"].mean != 0).any())


@pytest.mark.parametrize("soft", [True, False])
def test_masks_that_another_process_has_decided_go_to_the_device(soft, monkeypatch):
    def from_the_first_process(trainer, decide):
        return {name: mask.cpu() for name, mask in decide().items()}

    monkeypatch.setattr(hooks, "decide_once", from_the_first_process)
    weights = ScreeningPruningCallback("weight", amount=0.9, end_epoch=3, soft=soft)
    with pretending():
        channels, _ = fit({"end_epoch": 1}, [pl.Callback(), weights], max_epochs=4)
    assert channels.plan and weights.report().pruned_fraction == pytest.approx(0.9, abs=0.01)


class Divided(Classifier):
    """The second of its two networks gets what autocast has computed in lower precision."""

    def __init__(self):
        first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        second = nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten()
        )
        super().__init__(nn.ModuleDict({"first": first, "second": second.append(nn.Linear(8 * 4 * 4, 10))}))

    def training_step(self, batch, batch_idx):
        hidden = self.net["first"](batch[0])
        return F.cross_entropy(self.net["second"](hidden), batch[1])


@pytest.mark.parametrize("granularity", ["channel", "weight"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("make_trainer", [trainer, pretended_trainer])
def test_networks_that_get_inputs_of_lower_precision(granularity, precision, make_trainer):
    callback = ScreeningPruningCallback(granularity, amount=0.5, end_epoch=1)
    options = {"plugins": [MixedPrecision(precision, "cpu", SCALERS[precision]())]} if make_trainer is trainer else {}
    options = options or {"precision": precision}
    with contextlib.nullcontext() if make_trainer is trainer else pretending():
        make_trainer([callback], max_epochs=2, **options).fit(Divided(), loader(64, 128))
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=0.01)
    assert callback.plan if granularity == "channel" else "zeros in tensors" in callback.report().not_removed
