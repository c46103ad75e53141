"""What forward leaves in attributes keeps its channels, and says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fscreen import find_gates, slim
from lightning_fscreen.slimming.escapes import returning_escapes

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Keeping(nn.Module):
    """Keeps hidden features, in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.way, self.calls = way, 0
        self.seen: list[Tensor] = []
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        hidden = self.first(x).relu()
        if self.way == "attribute":
            self.features = hidden
        elif self.way == "list":
            self.seen.append(hidden)
        elif self.way == "dict":
            self.kept["hidden"] = hidden.detach()
        elif self.way == "sum":
            self.penalty = hidden.square().sum()
        elif self.way == "part":
            self.second.features = hidden
        return self.last(self.second(hidden).relu())


KEPT = {
    "attribute": "forward keeps it in attribute 'features'",
    "list": "forward keeps it in attribute 'seen'",
    "dict": "forward keeps it in attribute 'kept'",
    "part": "forward keeps it in attribute 'features' of module 'second'",
}


@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("way", KEPT)
def test_features_in_attributes_stay_whole(way: str, ran: bool) -> None:
    network = Keeping(way)
    if ran:
        network(X)
    before = {name: value for name, value in vars(network).items() if not name.startswith("_")}
    seen, kept = list(network.seen), dict(network.kept)
    assert {gate.name: gate.excluded for gate in find_gates(network, X)}["first"] == KEPT[way]
    masked = copy.deepcopy(Keeping(way))
    masked.load_state_dict(network.state_dict())
    with torch.no_grad():
        for layer in (masked.first, masked.second):
            layer.weight[5:] = layer.bias[5:] = 0
    keep = torch.arange(8) < 5
    plan = slim(network, {"first": keep, "second": keep}, X)
    assert plan.removed == {"second": 3} and KEPT[way] in plan.kept_for["first"]
    after = {name: value for name, value in vars(network).items() if not name.startswith("_")}
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert network.seen == seen and network.kept == kept
    torch.testing.assert_close(network(X), masked(X))


def test_sums_of_features_stay_what_they_are() -> None:
    network = Keeping("sum")
    masked, keep = copy.deepcopy(network), torch.arange(8) < 5
    with torch.no_grad():
        for layer in (masked.first, masked.second):
            layer.weight[5:] = layer.bias[5:] = 0
    assert slim(network, {"first": keep, "second": keep}, X).removed["second"] == 3
    network(X), masked(X)
    torch.testing.assert_close(network.penalty, masked.penalty)


def test_what_a_module_has_computed_of_its_parameters_is_no_output() -> None:
    """Attention biases of an image size, say, until the mode changes."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.scale = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.rand(8))
            self.cache: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Any:
            if len(self.cache) == 0 or self.training:
                self.cache[0] = self.scale.exp()
            return self.last(self.first(x) * self.cache[0])

    network = Caching()
    masked, keep = copy.deepcopy(network), torch.arange(8) < 5
    with torch.no_grad():
        masked.first.weight[5:] = masked.first.bias[5:] = 0
    assert slim(network, {"first": keep}, X).removed == {"first": 3} and not network.cache
    torch.testing.assert_close(network(X), masked(X))


def test_what_is_returned_anyway_is_returned_once() -> None:
    class Returns(nn.Module):
        def forward(self, x: Tensor) -> Any:
            self.features = x * 2
            return self.features

    network, reasons = Returns(), ["old"]
    with returning_escapes(network, reasons):
        assert torch.equal(network(X), 2 * X) and not reasons
    assert "forward" not in vars(network)
