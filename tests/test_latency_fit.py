"""A budget of latency: in trainings and in one call, under a clock that counts, and once under a real one."""

import copy
import os
import random

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_fscreen import Latency, ScreeningPruningCallback, explain, prune
from lightning_fscreen.candidates.latency import capture_for, operations_of
from lightning_fscreen.costs.timings import Timings
from lightning_fscreen.fit.networks import Network
from lightning_fscreen.fit.pruner import Pruner
from lightning_fscreen.fit.spending import Spending
from tests.candidates.test_latency import counted
from tests.conftest import Classifier, digits, loader, trainer
from tests.processes import run_ranks
from tests.test_channel_fit import OPTIMIZERS, fitted, post_net
from tests.test_cost_fit import wide_net
from tests.test_unit_fit import Attentive, convnext, plain_net


def totals(network, timings, modules):
    """Of modules with the inputs of a `Network`, and a little more."""
    inputs = network.inputs_on_device()
    captured = [capture_for(module, *inputs, timings.batch_size) for module in modules]
    return [0.01 + sum(map(counted, operations_of(each))) for each in captured]


def times_some(factor):
    """As `totals`, all that are measured in turns times a factor that is drawn anew."""

    def times(*args):
        now = factor()
        return [time * now for time in totals(*args)]

    return times


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(Timings, "_measured", lambda self, operation: counted(operation))
    monkeypatch.setattr(Network, "times", totals)


@pytest.mark.parametrize(
    ("granularity", "net", "options"),
    [
        ("channel", post_net, {"scope": "layer"}),
        ("unit", wide_net, {}),
        ("unit", plain_net, {"latency": Latency(batch_size=5)}),
        ("unit", Attentive, {"amount": 0.3}),
        ("unit", convnext, {"amount": 0.3, "bias": "mean"}),
    ],
)
def test_a_share_of_the_latency_goes(granularity, net, options, clock):
    options = {"amount": 0.4, **options}
    callback = ScreeningPruningCallback(granularity, budget="latency", end_epoch=2, **options)
    fitted(callback, net=net, max_epochs=3)
    report = callback.report()
    assert report.after.latency / report.before.latency == pytest.approx(1 - options["amount"], abs=0.04)
    measured = report.latency
    assert measured.batch_size == options.get("latency", Latency()).batch_size and measured.device == "cpu"
    assert measured.after > 0 and measured.target == pytest.approx((1 - options["amount"]) * measured.before)
    assert "ms were asked for" in str(report) and report.to_dict()["latency_budget"]["before"] == measured.before
    assert callback.history[-1]["applied"] == pytest.approx(options["amount"], abs=0.04)


def test_resumed_it_goes_on_with_the_times_that_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(Timings, "_measured", lambda self, operation: counted(operation) * random.uniform(0.5, 2))
    monkeypatch.setattr(Network, "times", times_some(lambda: random.uniform(0.5, 1)))

    def run(**options):
        torch.manual_seed(0)
        model = Classifier(wide_net(), OPTIMIZERS["adamw"])
        callback = ScreeningPruningCallback("unit", budget="latency", amount=0.5, end_epoch=4)
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit = trainer([callback, saver], max_epochs=6, enable_checkpointing=True)
        fit.fit(model, loader(), weights_only=True, **options)
        return model.state_dict(), callback

    whole, callback = run()
    for epoch in (1, 4):  # in the window, after slimming
        resumed, again = run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
        assert again.history[:4] == callback.history[:4]  # then the slim network is measured
        measured_again = epoch < 4  # beside the slim network
        assert measured_again or again.report().before.latency == callback.report().before.latency


def test_what_was_asked_of_a_latency_says_nothing_of_another_budget():
    def asked(budget, timings):
        settings = ScreeningPruningCallback("unit", 0.4, budget=budget).settings
        return Spending(settings, None, None, timings, 0.9).asked

    assert asked("latency", Timings(Latency(), torch.device("cpu"))) == 0.9
    assert asked("macs", None) is None


def decide(folder):
    """In each of two processes, with clocks that disagree."""
    rank = int(os.environ["LOCAL_RANK"])
    Timings._measured = lambda self, operation: counted(operation) * random.Random(rank).uniform(1, 2)
    Network.times = times_some(lambda: 1 + rank)
    callback = ScreeningPruningCallback("unit", budget="latency", amount=0.4, end_epoch=2)
    torch.manual_seed(0)
    model = Classifier(wide_net())
    trainer([callback], max_epochs=3, strategy="ddp", devices=2).fit(model, loader(32, 128))
    torch.save(callback.masks, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_decide_the_same(tmp_path):
    run_ranks(2, decide, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())
    assert not all(bool(mask.all()) for mask in first.values())


def test_one_call_asks_again_where_the_network_is_slower_than_its_operations(clock, monkeypatch):
    seen = []

    def times(*args):
        seen.append([time**1.3 for time in totals(*args)])
        return seen[-1]

    monkeypatch.setattr(Network, "times", times)
    torch.manual_seed(0)
    network = post_net()
    _, report = prune(network, loader(), 0.3, budget="latency", progress=False)
    assert report.latency.after / report.latency.before == pytest.approx(0.7, abs=0.03)
    assert len(seen) >= 4


@pytest.mark.parametrize(("granularity", "schedule"), [("unit", "cubic"), ("channel", "one_shot")])
def test_a_training_asks_for_what_the_network_takes_and_nothing_changes(granularity, schedule, clock, monkeypatch):
    """Slower than the sum of its operations, by far; the first pruning and the last one find out."""
    monkeypatch.setattr(Network, "times", lambda *args: [time**1.3 for time in totals(*args)])
    found = []

    def watched(self, *args, find=Pruner.find_asked):
        state, numbers, training = copy.deepcopy(self._model.state_dict()), torch.get_rng_state(), self._model.training
        found.append(find(self, *args))
        assert all(torch.equal(state[name], tensor) for name, tensor in self._model.state_dict().items())
        assert torch.equal(numbers, torch.get_rng_state()) and self._model.training == training
        return found[-1]

    monkeypatch.setattr(Pruner, "find_asked", watched)
    callback = ScreeningPruningCallback(granularity, 0.3, budget="latency", schedule=schedule, end_epoch=2)
    fitted(callback, net=post_net, max_epochs=3)
    report = callback.report().latency
    assert report.after / report.before == pytest.approx(0.7, abs=0.04)
    assert len(found) == (1 if schedule == "one_shot" else 2)
    assert not any(0.28 < float(each["asked"]) < 0.32 for each in found)


def test_a_latency_that_cannot_be_met_as_measured_is_refused(clock, monkeypatch):
    monkeypatch.setattr(Network, "times", lambda *args: [10 + time for time in totals(*args)])
    callback = ScreeningPruningCallback("unit", 0.5, budget="latency", end_epoch=1)
    with pytest.raises(ValueError, match=r"amount=0.5 of the latency cannot go: .* lower amount to 0.\d+ or less"):
        fitted(callback, net=plain_net, max_epochs=2)
    assert not callback.plan and not callback.history


def test_explain_rehearses_it(clock, tmp_path):
    torch.manual_seed(0)
    network, table = post_net(), tmp_path / "times.json"
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    latency = Latency(2, "cpu", table)
    found = explain(network, dataloader=loader(), amount=0.4, budget="latency", latency=latency, progress=False)
    assert found.prediction.report.latency.batch_size == 2 and table.exists()
    assert "on cpu, 2 at once" in str(found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_real_clock():
    """So little that a busy machine does not matter."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 10))
    _, report = prune(network, [digits(32)], 0.01, budget="latency", latency=Latency(64), progress=False)
    assert report.latency.before > 0 and report.latency.after > 0 and report.latency.target < report.latency.before


def test_the_largest_amount_is_the_target(clock):
    torch.manual_seed(0)
    options = {"metric": lambda network, batches: 1.0, "val_dataloader": loader()}
    _, report = prune(post_net(), loader(), "auto", budget="latency", progress=False, **options)
    measured = report.latency
    assert measured.after / measured.before == pytest.approx(measured.target / measured.before, abs=0.04)
    assert measured.target < 0.7 * measured.before


def test_a_batch_that_the_network_does_not_take(monkeypatch):
    def compare(networks, args, kwargs, batch_size):
        raise RuntimeError("too many")

    monkeypatch.setattr("lightning_fscreen.fit.networks.compare_latency", compare)
    with pytest.raises(ValueError, match=r"forward cannot be timed with a batch of 3 on cpu \(too many\), .* another"):
        prune(post_net(), loader(), 0.3, budget="latency", latency=Latency(3), progress=False)


def test_it_is_for_budgets_of_latency():
    with pytest.raises(ValueError, match=r'Latency\(batch_size=2, .*\) is for budget="latency", got budget=\'macs\''):
        ScreeningPruningCallback("unit", budget="macs", latency=Latency(2))
    with pytest.raises(ValueError, match=r"latency must be a lightning_fscreen.Latency, got \{'batch_size': 2\}"):
        ScreeningPruningCallback("unit", budget="latency", latency={"batch_size": 2})


def test_a_compiled_network_is_timed_as_it_was_written(monkeypatch):
    """Like the one before it was slimmed: what compiling gains is another matter, and takes minutes."""
    monkeypatch.setattr(Timings, "_measured", lambda self, operation: counted(operation))  # the network's time is real
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 10))
    model = Classifier(torch.compile(network, backend=backend))
    callback = ScreeningPruningCallback("unit", amount=0.1, budget="latency", latency=Latency(128), end_epoch=1)
    trainer([callback], max_epochs=1).fit(model, loader())
    assert callback.plan and not graphs  # of the only epoch every step was observed


def test_one_call_asks_for_no_more_than_can_go_when_times_differ_from_one_measurement_to_the_next(clock, monkeypatch):
    factors = random.Random(4)
    monkeypatch.setattr(Network, "times", times_some(lambda: factors.uniform(0.5, 2)))
    torch.manual_seed(0)
    _, report = prune(post_net(), loader(), 0.5, budget="latency", progress=False)
    assert report.after.macs < report.before.macs


def test_one_call_needs_a_copy():
    network = post_net()
    network.loader = (number for number in range(3))
    with pytest.raises(
        ValueError, match=r"cannot be copied \(cannot pickle 'generator' object\), .* take budget=.macs"
    ):
        prune(network, loader(), 0.5, budget="latency", progress=False)


def test_how_much_can_go_is_measured(clock, monkeypatch):
    """Operations that take longer together than one by one: what their sum leaves over is not all beyond reach."""
    monkeypatch.setattr(Network, "times", times_some(lambda: 3))
    torch.manual_seed(0)
    _, report = prune(post_net(), loader(), 0.6, budget="latency", progress=False)
    assert report.latency.after / report.latency.before == pytest.approx(0.4, abs=0.03)
    with pytest.raises(ValueError, match=r"amount=0.99 of the latency cannot go: .* lower amount to 0\.[6-9]") as error:
        prune(post_net(), loader(), 0.99, budget="latency", progress=False)
    most = float(str(error.value).split("lower amount to ")[1].split()[0])
    _, report = prune(post_net(), loader(), most, budget="latency", progress=False)
    assert report.latency.after / report.latency.before == pytest.approx(1 - most, abs=0.03)
