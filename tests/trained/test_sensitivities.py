"""Sensitivities against weights set to zero by hand, and against networks that were really pruned."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_fscreen import prune, sensitivity
from tests.conftest import digits, loader
from tests.test_channel_fit import post_net
from tests.test_unit_fit import mixed_net, plain_net
from tests.trained.test_pruning import trained


def accuracy(model, batches):
    found = [model(images).argmax(1) == labels for images, labels in batches]
    return torch.cat(found).double().mean()


def likelihood(model, batches):
    return -sum(F.cross_entropy(model(images), labels) for images, labels in batches)


class Counted:
    """A metric that counts its evaluations, and fails at one of them."""

    def __init__(self, fails=None, error=KeyboardInterrupt):
        self.calls, self.fails, self.error = 0, fails, error

    def __call__(self, model, batches):
        self.calls += 1
        if self.calls == self.fails:
            raise self.error
        return accuracy(model, batches)


def state_of(network):
    """All that may not change."""
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modules = [(module.training, len(module._forward_hooks)) for module in network.modules()]
    gradients = [parameter.requires_grad for parameter in network.parameters()]
    return state, modules, gradients, torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()


def check_unchanged(network, before):
    state, *others = before
    now, *rest = state_of(network)
    assert state.keys() == now.keys() and all(torch.equal(tensor, now[name]) for name, tensor in state.items())
    assert torch.equal(others.pop(2), rest.pop(2)) and others == rest


def importance(network):
    """Group → (units,), of the product of norms, or of the scales."""
    if isinstance(network[1], torch.nn.BatchNorm2d):
        neurons = network[5].weight.norm(dim=1) * network[7].weight.norm(dim=0)
        return {("1",): network[1].weight.abs(), ("5",): neurons}
    scales = [network[0].a[1].weight.abs(), network[0].b[1].weight.abs()]
    return {("0.a.1", "0.b.1"): sum(scales), ("2",): network[2].weight.abs()}


@pytest.mark.parametrize("net", [mixed_net, post_net])
def test_it_is_the_metric_with_the_least_important_units_set_to_zero(net):
    network, data = trained(net), loader()
    before = state_of(network)
    found = sensitivity(network, data, likelihood, criterion="magnitude", bias="zero", progress=False)
    check_unchanged(network, before)
    assert found.metric == likelihood(network, data)
    groups = importance(network)
    assert [group.layers for group in found.groups] == list(groups)
    for group in found.groups:
        order = groups[group.layers].argsort()
        assert group.units == len(order)
        for fraction, off, metric in zip(found.fractions, group.off, group.metrics, strict=True):
            by_hand = copy.deepcopy(network)
            assert off == round(fraction * len(order))
            for name in group.layers:
                for parameter in by_hand.get_submodule(name).parameters():
                    parameter.data[order[:off]] = 0
            assert metric == likelihood(by_hand, data) != found.metric


def test_it_is_the_metric_right_after_pruning_one_layer():
    network, data = trained(mixed_net), loader()
    found = sensitivity(network, data, accuracy, [0.5], include="5", progress=False)
    pruned = copy.deepcopy(network)
    prune(pruned, data, 0.5, budget="candidates", include="5", progress=False)
    assert found.groups[0].metrics == (accuracy(pruned, data),)


def test_metrics_of_torchmetrics_are_evaluated_on_batches_of_their_own():
    network, held_out = trained(plain_net), [(digits(400)[0][256:], digits(400)[1][256:])]
    metric = MulticlassAccuracy(10, average="micro")
    same = [
        sensitivity(network, loader(), each, val_dataloader=held_out, progress=False) for each in (metric, accuracy)
    ]
    assert not metric.update_called and same[0].metric == pytest.approx(accuracy(network, held_out))
    for one, other in zip(*(found.groups for found in same), strict=True):
        assert one.layers == other.layers and one.metrics == pytest.approx(other.metrics)


def test_it_goes_on_where_it_was_interrupted(tmp_path):
    network, path = trained(mixed_net), tmp_path / "sensitivity.jsonl"
    network.train()
    network[0].weight.requires_grad_(False)
    whole, before = sensitivity(network, loader(), accuracy, progress=False), state_of(network)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(network, loader(shuffle=True), Counted(fails=5), results=path, progress=False)
    check_unchanged(network, before)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["metric"] for line in lines[:2]] == [whole.metric, whole.groups[0].metrics[0]]
    again = Counted()
    assert sensitivity(network, loader(), again, results=path, progress=False) == whole
    assert len(lines) == 4 and again.calls == 1 + 6 - 3
    network[7].weight.data[:, 0] += 1  # another network: nothing is there
    other = Counted()
    sensitivity(network, loader(), other, results=path, progress=False)
    assert other.calls == 7 and len(path.read_text().splitlines()) == 14
    with pytest.raises(ValueError, match="the metric of the network as it is is -1, but .* another metric"):
        sensitivity(network, loader(), lambda *_: -1, results=path, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": lambda *_: float("nan")}, "the metric of the network as it is is nan; it must be a finite number"),
        ({"metric": lambda *_: torch.ones(2)}, "must be a number, but it is a? ?tensor"),
        ({"metric": "accuracy"}, "metric must be a function .* got 'accuracy'"),
        ({"fractions": [0.5, 1.5]}, r"in \(0, 1\], got \[0.5, 1.5\]"),
        ({"val_dataloader": iter(loader())}, "gives them once; give a DataLoader or a list"),
        ({"val_dataloader": [], "metric": MulticlassAccuracy(10)}, "the dataloader of the metric is empty"),
        ({"criterion": "taylor"}, "'taylor' needs gradients"),
        ({"granularity": "weight"}, '"unit" or "channel", got \'weight\''),
        ({"lines": "{}\n"}, "lines without a run and its metric"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(options, message, tmp_path):
    network = trained(plain_net, steps=1)
    if lines := options.pop("lines", None):
        (tmp_path / "file").write_text(lines)
        options["results"] = tmp_path / "file"
    before = state_of(network)
    with pytest.raises(ValueError, match=message):
        sensitivity(network, **{"dataloader": loader(), "metric": accuracy, "progress": False, **options})
    check_unchanged(network, before)


def test_it_can_be_read_and_kept():
    found = sensitivity(trained(post_net, steps=1), loader(), accuracy, [0.25, 1.0], progress=False)
    text = str(found)
    assert "25 % masked" in text and "0.a.1, 0.b.1" in text and "<table>" in found._repr_html_()
    assert json.loads(found.to_json())["groups"][0]["layers"] == ["0.a.1", "0.b.1"]
    assert [group.off[1] for group in found.groups] == [9, 29]  # one stays
