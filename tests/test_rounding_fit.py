"""Widths in multiples of 8 in real trainings, on the modules' shapes."""

from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_fscreen import ScreeningPruningCallback, explain, prune
from tests.bad_inputs import by_name, check_refused, using
from tests.candidates.test_rounding import widths
from tests.conftest import Classifier, loader, trainer
from tests.test_channel_fit import OPTIMIZERS, fitted
from tests.test_cost_fit import count, wide_net

CONFIG = Path(__file__).parents[1] / "conf" / "callbacks" / "fscreen.yaml"


def convnet():
    """Two convolutions that meet zero padding, a batch norm between, and a head of 12 units, which stay or become 8."""
    convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)]
    return nn.Sequential(*convolutions, nn.ReLU(), nn.Conv2d(48, 64, 3), nn.ReLU(), *head)


CASES = [
    ("channel", wide_net, {}),
    ("channel", wide_net, {"budget": "macs", "scope": "layer"}),
    ("unit", wide_net, {"budget": "params", "schedule": "linear", "min_channels": 9}),
    ("unit", convnet, {"budget": "macs", "bias": "mean"}),
    ("unit", convnet, {"budget": "candidates", "soft": True}),
    ("unit", convnet, {"budget": "macs", "end_epoch": 0, "criterion": "taylor"}),
    ("unit", convnet, {"end_epoch": None, "end_step": 9, "prune_every": 2, "amount": {"net.3": 0.5, "*": 0.3}}),
]


@pytest.mark.parametrize(("granularity", "net", "options"), CASES)
def test_every_width_is_a_multiple(granularity, net, options):
    options = {"amount": 0.5, "end_epoch": 2, **options}
    callback = ScreeningPruningCallback(granularity, round_to=8, **options)
    model, _ = fitted(callback, net=net, max_epochs=3)
    before, found, report = widths(net()), widths(model.net), callback.report()
    assert all(width % 8 == 0 or width == before[place] for place, width in found.items())
    assert any(width < before[place] for place, width in found.items())
    assert not report.not_removed or options.get("bias") == "mean"
    uneven = {f"net.{name}" for (name, dim), width in found.items() if width == 12}
    assert set(report.not_rounded) == uneven == set(report.to_dict()["not_rounded"])
    budget, floor = options.get("budget", "candidates"), options.get("min_channels", 1)
    assert all(layer.kept >= min(floor, layer.total) for layer in report.layers)
    if budget == "candidates":
        assert report.pruned_fraction == pytest.approx(callback.total_amount, abs=12 / report.total)
    else:
        largest = 0.05  # half of what eight channels cost in so small a network
        assert count(model.net, budget) / count(net(), budget) == pytest.approx(0.5, abs=largest)
        assert getattr(report.after, budget) == count(model.net, budget)


def test_resumed_it_ends_the_same(tmp_path):
    """From the configuration's arguments, in the window and after slimming."""

    def run(**options):
        torch.manual_seed(0)
        model = Classifier(convnet(), OPTIMIZERS["adamw"])
        config = yaml.safe_load(CONFIG.read_text())["fscreen"]
        callback = instantiate(config, granularity="unit", budget="macs", amount=0.6, round_to=8, end_epoch=3)
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit = trainer([callback, saver], max_epochs=5, enable_checkpointing=True)
        fit.fit(model, loader(), weights_only=True, **options)
        return model.state_dict(), callback

    whole, callback = run()
    for epoch in (1, 3):
        resumed, again = run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
        assert again.history == callback.history and again.report() == callback.report()


def test_a_trained_network_in_one_call_as_explained():
    torch.manual_seed(0)
    network = convnet()
    explained = explain(network, dataloader=loader(), amount=0.5, round_to=8, progress=False)
    plan, report = prune(network, loader(), 0.5, round_to=8, progress=False)
    assert explained.prediction is not None and explained.prediction.report == report
    assert explained.macs[1] < report.after.macs
    before = widths(convnet())
    assert plan and all(width % 8 == 0 or width == before[place] for place, width in widths(network).items())
    assert report.after.macs == count(network, "macs") == pytest.approx(report.before.macs / 2, rel=0.05)


TABLE = [
    ("round_to of 0", using(round_to=0), ValueError, "round_to must be at least 1", "any width"),
    ("round_to of 2.5", using(round_to=2.5), ValueError, "round_to.*2.5", "whole number"),
    ("round_to of weights", using(granularity="weight", round_to=8), ValueError, "round_to=8", '"unit" or "channel"'),
    ("streams of candidates", using(streams=True), ValueError, "streams=True.*candidates", 'use budget="macs"'),
    ("round_to beyond all layers", using(round_to=64), ValueError, "round_to=64.*largest has 16", "lower round_to"),
    (
        "round_to beyond the budget",
        using(round_to=8, amount=0.9),
        ValueError,
        r"at least 1 in each.*multiples of round_to=8",
        "lower amount or the floor",
    ),
]


@by_name(TABLE)
def test_bad_input_gets_an_error_that_helps_and_changes_nothing(row, tmp_path):
    check_refused(row, tmp_path)
