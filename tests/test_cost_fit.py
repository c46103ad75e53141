"""Budgets of parameters and multiply–adds in real trainings, counted afterwards on the network that is left."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_fscreen import ScreeningPruningCallback
from tests.conftest import Classifier, digits, loader, trainer
from tests.processes import run_ranks
from tests.test_channel_fit import OPTIMIZERS, Block, fitted, post_net
from tests.test_unit_fit import Attentive, convnext, plain_net, sigmoid_net


def wide_net():
    """Pre-activation blocks, wide enough for 1 %."""
    head = [nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(nn.Conv2d(1, 24, 3, padding=1, bias=False), Block(24, 24), Block(24, 32, 2), *head)


def count(net, budget):
    """By torch's own counter."""
    if budget == "params":
        return sum(p.numel() for p in net.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        copy.deepcopy(net).eval()(digits(1)[0])
    return counter.get_total_flops() // 2


CASES = [
    ("channel", wide_net, {}),
    ("channel", wide_net, {"scope": "layer"}),
    ("channel", wide_net, {"streams": True, "scope": "layer"}),
    ("unit", wide_net, {"streams": True}),
    ("channel", post_net, {"bias": "fold"}),
    ("unit", wide_net, {"schedule": "linear", "min_channels": 4}),
    ("unit", plain_net, {"criterion": "magnitude"}),
    ("unit", Attentive, {"amount": 0.3}),
    ("unit", sigmoid_net, {"bias": "mean"}),
    ("unit", convnext, {"amount": 0.3, "soft": True}),
    ("unit", plain_net, {"end_epoch": 0, "criterion": "taylor"}),
    ("unit", plain_net, {"end_epoch": None, "end_step": 9, "prune_every": 2}),
]


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize(("granularity", "net", "options"), CASES)
def test_a_share_of_the_cost_goes(granularity, net, options, budget):
    options = {"amount": 0.5, "end_epoch": 3, **options}
    callback = ScreeningPruningCallback(granularity, budget=budget, **options)
    torch.manual_seed(0)
    dense = count(net(), budget)
    model, _ = fitted(callback, net=net, max_epochs=4)
    report = callback.report()
    left = count(model.net, budget)
    assert (getattr(report.before, budget), getattr(report.after, budget)) == (dense, left)
    half_a_unit = 0.01 if net in (wide_net, convnext) else 0.04
    assert left / dense == pytest.approx(1 - options["amount"], abs=half_a_unit)
    floor = options.get("min_channels", 1)
    assert all(layer.kept >= min(floor, layer.total) for layer in report.layers)
    applied = [entry["applied"] for entry in callback.history]
    scheduled = [entry["scheduled"] for entry in callback.history]
    assert applied == sorted(applied) or "soft" in options
    if options.get("end_epoch") == 3 and "soft" not in options:
        assert applied == pytest.approx(scheduled, abs=0.02)
    if options.get("bias", "zero") == "zero":
        assert applied[-1] == pytest.approx(1 - left / dense, abs=1e-9)


def test_channels_of_a_stream_go_if_that_is_asked_for():
    """With the whole stream of a stage narrower, the convolution that starts it is, too."""
    for streams in (False, True):
        callback = ScreeningPruningCallback(budget="macs", amount=0.5, streams=streams, scope="layer", end_epoch=2)
        model, _ = fitted(callback, net=wide_net, max_epochs=3)
        assert (model.net[0].out_channels < 24) == ("net.2.skip.inputs" in callback.masks) == streams


def test_masks_alone_are_those_of_slimming():
    kept = []
    for slim in (True, False):
        callback = ScreeningPruningCallback(budget="macs", amount=0.5, slim=slim, end_epoch=2)
        fitted(callback, net=wide_net, max_epochs=3)
        kept.append(callback.masks)
    assert all(torch.equal(mask, kept[1][name]) for name, mask in kept[0].items())
    assert callback.history[-1]["applied"] == pytest.approx(0.5, abs=0.01)


def test_resumed_in_the_window_it_ends_the_same(tmp_path):
    def run(epochs, **options):
        torch.manual_seed(0)
        model = Classifier(wide_net(), OPTIMIZERS["adamw"])
        callback = ScreeningPruningCallback("unit", budget="macs", amount=0.6, end_epoch=4, streams=True)
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit = trainer([callback, saver], max_epochs=epochs, enable_checkpointing=True)
        fit.fit(model, loader(), weights_only=True, **options)
        return model.state_dict(), callback

    whole, callback = run(6)
    for epoch in (1, 4):  # in the window, after slimming
        resumed, again = run(6, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
        assert again.history == callback.history and again.report().after == callback.report().after


def test_two_callbacks_share_a_network():
    """The second counts what the first has removed."""
    first = ScreeningPruningCallback(budget="macs", amount=0.05, end_epoch=1, include="net.1.*")
    second = ScreeningPruningCallback(budget="macs", amount=0.25, end_epoch=3, exclude="net.1.*")
    model, _ = fitted(first, net=wide_net, callbacks=[second], max_epochs=4)
    assert count(model.net, "macs") / count(wide_net(), "macs") == pytest.approx(0.75, abs=0.015)


def test_what_cannot_go_is_said_at_the_start():
    callback = ScreeningPruningCallback("unit", budget="macs", amount=0.9, end_epoch=2)
    with pytest.raises(ValueError, match=r"amount=0.9 of the cost cannot go: .* lower amount to 0\.\d+ or less"):
        fitted(callback, net=convnext)
    assert not callback.history


def decide(folder):
    """In each of two processes."""
    callback = ScreeningPruningCallback("unit", budget="macs", amount=0.5, end_epoch=2, streams=True)
    torch.manual_seed(0)
    model = Classifier(wide_net())
    trainer([callback], max_epochs=3, strategy="ddp", devices=2).fit(model, loader(32, 128))
    found = {"masks": callback.masks, "left": count(model.net, "macs"), "history": callback.history}
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")


@pytest.mark.slow
def test_two_processes_decide_the_same(tmp_path):
    run_ranks(2, decide, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(mask, second["masks"][name]) for name, mask in first["masks"].items())
    assert first["history"] == second["history"]
    assert first["left"] == second["left"] == pytest.approx(count(wide_net(), "macs") / 2, rel=0.02)
