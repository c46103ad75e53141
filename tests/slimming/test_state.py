"""State_dicts of slim networks, loaded into others: what they hold is taken, what they lack stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fscreen import load_slimmed, slim
from tests.slimming.networks import Function

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net(width: int = 8) -> nn.Sequential:
    layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = net()
        self.key = self.query

    def forward(self, x: Tensor) -> Any:
        return self.query(x) - self.key(x.flip(3))


class Named(nn.Module):
    """A part of the network has a name of its own, before or after the network."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        if before:
            self.backbone = body = net()[:3]
        whole = net()
        self.net = nn.Sequential(body if before else whole[:3], whole[3:])
        if not before:
            self.backbone = self.net[0]

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class Shares(nn.Module):
    """Two layers with one weight, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)
        self.b.weight = self.a.weight
        self.head = self.last

    def forward(self, x: Tensor) -> Any:
        x = x[:, 0, 0]
        return self.head(self.a(x).relu() + self.b(x).relu())


ALIASED = {
    "siamese": (Siamese, "query.1", 5),
    "named before": (lambda: Named(True), "backbone.1", 5),
    "named after": (lambda: Named(False), "net.0.1", 5),
    "shared": (Shares, "a", 5),
}


@pytest.mark.parametrize(("make", "gate", "kept"), ALIASED.values(), ids=ALIASED)
def test_modules_under_two_names_are_slimmed_once_and_their_state_dicts_are_read(make, gate, kept) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    network, dtypes = make().eval(), {p.dtype for p in make().state_dict().values()}
    keep = {gate: torch.arange(8) < kept} | ({"b": torch.arange(8) < kept} if gate == "a" else {})
    masked = copy.deepcopy(network)
    with torch.no_grad():
        for name, own in keep.items():
            module = masked.get_submodule(name)
            module.weight[~own] = module.bias[~own] = 0
    plan = slim(network, keep, X)
    assert sum(plan.removed.values()) >= 3
    assert {tensor.dtype for name, tensor in network.state_dict().items() if "fscreen" not in name} == dtypes
    torch.testing.assert_close(network(X), masked(X))
    again = load_slimmed(make().eval(), network.state_dict())
    assert torch.equal(again(X), network(X))
    listening = copy.deepcopy(again)
    listening.load_state_dict(network.state_dict())
    assert torch.equal(listening(X), network(X)) and list(again.state_dict()) == list(network.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_that_lacks_some_tensors_takes_nothing_from_them(strict: bool) -> None:
    """Of a dense stem, say: the network takes its size, and what is not in it keeps its values."""
    torch.manual_seed(0)
    network, dense = net().eval(), net().eval()
    slim(network, {"1": torch.arange(8) < 5}, X)
    weight, head = network[3].weight.detach().clone(), network[7].weight.detach().clone()
    expected = network(X)
    part = {name: value for name, value in dense.state_dict().items() if name.startswith("1.")}
    if strict:
        with pytest.raises(RuntimeError, match=r"Missing key.*3\.weight"):
            network.load_state_dict(part)
    else:
        network.load_state_dict(part, strict=False)
    assert network[0].out_channels == 8 and torch.equal(network[7].weight, head)
    assert torch.equal(network[3].weight[:, :5], weight) and not network[3].weight[:, 5:].any()
    rest = {name: value for name, value in dense.state_dict().items() if name.startswith("0.")}
    assert not network[0].weight[5:].any() and network[0].weight[:5].any()
    network.load_state_dict(rest, strict=False)
    assert torch.equal(network[0].weight, dense[0].weight) and expected.shape == network(X).shape


def test_what_was_on_the_meta_device_has_the_values_of_the_file_and_its_indices() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Function(
            lambda x, stem, first, last: last((x := stem(x)) + first(x)),
            nn.Conv2d(3, 8, 3),
            nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)),
            nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        ).eval()

    network = make()
    slim(network, {"parts.1.0": torch.arange(8) % 2 == 0}, X)
    state = network.state_dict()
    with torch.device("meta"):
        empty = make()
    again = load_slimmed(empty, state)
    assert torch.equal(again(X), network(X))
    moved = copy.deepcopy(network).to("meta")
    moved.load_state_dict(state, assign=True)
    emptied = copy.deepcopy(network).to("meta").to_empty(device="cpu")
    emptied.load_state_dict(state)
    for each in (moved, emptied):
        assert torch.equal(each(X), network(X))


def test_parameters_keep_their_attributes_and_hooks() -> None:
    network, seen = net(), []
    for name, parameter in network.named_parameters():
        parameter.lr_scale = 0.5  # type: ignore[attr-defined]
        parameter.register_hook(lambda gradient, name=name: seen.append(name))
    network[1].bias.requires_grad_(False)
    slim(network, {"1": torch.arange(8) < 5}, X)
    network(X).sum().backward()
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert set(seen) == trained.keys()
    assert all(parameter.lr_scale == 0.5 for parameter in network.parameters())
