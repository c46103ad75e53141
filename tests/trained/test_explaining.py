"""What `explain` says of a network, against what slimming does to it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_fscreen import explain, find_gates, prune, slim
from tests.conftest import digits, loader
from tests.test_channel_fit import post_net, residual_net
from tests.test_cost_fit import count, wide_net
from tests.test_unit_fit import Attentive, convnext, mixed_net, plain_net
from tests.trained.test_pruning import trained
from tests.trained.test_sensitivities import accuracy, check_unchanged, state_of

NETS = [residual_net, post_net, mixed_net, plain_net, convnext, Attentive]


@pytest.mark.parametrize("granularity", ["unit", "channel"])
@pytest.mark.parametrize("net", NETS)
def test_one_unit_takes_along_what_was_said(net, granularity):
    network, images = net().eval(), digits(4)[0]
    before = copy.deepcopy(network.state_dict())
    if granularity == "channel" and net in (plain_net, convnext, Attentive):
        with pytest.raises(ValueError, match="nothing to prune"):
            explain(network, images, granularity)
        return
    explanation = explain(network, images, granularity)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    kinds = ["channel"] if granularity == "channel" else None
    gates = {gate.name: gate for gate in find_gates(network, images, kinds)}
    for layer in explanation.layers:
        saved = {"params": 0, "macs": 0}
        prunable = [index for index, unit in enumerate(gates[layer.name].units) if unit >= 0]
        assert (layer.units, layer.prunable) == (gates[layer.name].channels, len(prunable))
        for index in prunable[:2]:
            unit = gates[layer.name].units[index]
            keep = {name: torch.tensor([each != unit for each in gate.units]) for name, gate in gates.items()}
            small = copy.deepcopy(network)
            slim(small, {name: mask for name, mask in keep.items() if not mask.all()}, images)
            for what in saved:
                saved[what] += (count(network, what) - count(small, what)) / 2
        shared = {
            name for name, gate in gates.items() if set(gate.units) & {gates[layer.name].units[i] for i in prunable}
        }
        assert set(layer.coupled) == shared - {layer.name}
        if not layer.coupled and net is not residual_net:  # where streams are shared, costs are shared out
            assert (layer.params, layer.macs) == (round(saved["params"]), round(saved["macs"]))


@pytest.mark.parametrize("net", NETS)
def test_no_layer_with_weights_is_left_unexplained(net):
    network = net()
    explanation = explain(network, digits(4)[0])
    said = {layer.name for layer in explanation.layers} | set(explanation.not_pruned)
    own = {
        name: {f"{name}.{attribute}" for attribute, _ in module.named_parameters(recurse=False)}
        for name, module in network.named_modules()
    }
    assert [name for name, parameters in own.items() if parameters and not said & {name, *parameters}] == []


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_no_budget_can_exceed_what_was_said(budget):
    network = plain_net()
    full, least = getattr(explain(network, digits(4)[0], include="2"), budget)
    most, options = 1 - least / full, {"budget": budget, "include": "2", "bias": "zero", "progress": False}
    assert full == count(network, budget)
    with pytest.raises(ValueError, match=f"lower amount to {most:.4g}"):
        prune(network, loader(), most + 0.02, **options)
    prune(network, loader(), most, **options)
    assert count(network, budget) == least


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (wide_net, {"amount": 0.4, "budget": "params"}),
        (mixed_net, {"bias": "zero", "include": ["1", "kind=neuron"]}),
        (residual_net, {"granularity": "channel", "amount": 0.3, "bias": "fold"}),
        (Attentive, {"amount": 0.3, "criterion": "magnitude"}),
        (plain_net, {"amount": {"0": 0.5, "6": 0.25}, "budget": "candidates", "scope": "layer", "min_channels": 2}),
        (plain_net, {"amount": "auto", "max_drop": 0.1, "metric": accuracy, "val_dataloader": loader()}),
    ],
)
def test_what_it_predicts_is_what_pruning_does(net, options):
    network, data = trained(net), loader(shuffle=True)
    before, images = state_of(network), None if net is plain_net else digits(4)[0]
    explanation = explain(network, images, dataloader=data, progress=False, **options)
    check_unchanged(network, before)
    plan, report = prune(network, data, progress=False, **options)
    assert plan and explanation.prediction == (plan, report)
    assert report.after.macs == count(network, "macs") and report.after.params == count(network, "params")
    assert {layer.name: layer.kept for layer in explanation.layers} == {x.name: x.kept for x in report.layers}
    for layer in explanation.layers:
        below, above = layer.cut
        assert (below is None) == (layer.kept == layer.units) and (layer.coupled or not below or below <= above)
    data = json.loads(explanation.to_json())["prediction"]
    assert data["macs"]["after"] == report.after.macs and f"{report.after.params:,} of" in str(explanation)


def test_what_needs_data_is_refused_without():
    network = plain_net()
    for options in ({"amount": 0.3}, {"bias": "mean"}, {"metric": MulticlassAccuracy(10)}):
        with pytest.raises(ValueError, match="depends on the data; give dataloader="):
            explain(network, digits(4)[0], **options)
    with pytest.raises(ValueError, match="needs example_inputs or a dataloader"):
        explain(network)
    with pytest.raises(TypeError, match="wdith"):
        explain(network, dataloader=loader(), wdith=3)


def test_it_can_be_read_and_kept():
    explanation = explain(post_net(), digits(4)[0])
    text = str(explanation)
    assert "lose the same units:" in text and "at most, with one unit left in every layer:" in text
    assert "<table>" in explanation._repr_html_()
    data = json.loads(explanation.to_json())
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in explanation.layers]
    with pytest.raises(ValueError, match='"unit" or "channel", got \'weight\''):
        explain(post_net(), digits(4)[0], "weight")


class Experts(nn.Module):
    """Rows go to one of two layers, so that their numbers depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            rows = (x[:, 0] > 0) == bool(place)
            result[rows] = expert(x[rows])
        return result


def test_layers_on_rows_whose_number_depends_on_values_count_as_measured() -> None:
    x = torch.tensor([1.0, -1.0])[:, None] * torch.ones(2, 6)
    costs = {layer.name: layer.macs for layer in explain(Experts(), x).layers}
    assert costs == {"experts.0.0": 6, "experts.1.0": 6}  # half of the instances, and 12 weights
