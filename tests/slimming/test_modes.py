"""A forward that never asks for its mode computes the same in both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fscreen.slimming.modes import without_mode
from lightning_fscreen.slimming.verify import Verification

X = torch.randn(4, 6)


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Switches(nn.Module):
    """Knows its mode by a name of its own."""

    fast = False

    def train(self, mode: bool = True) -> Any:
        self.fast = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.fast else 2 * x


class Within(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Asks()

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if self.part.training else x


class OwnDropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return input + 1 if self.training else input


SAME = [
    nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.LayerNorm(6), nn.AlphaDropout()),
    nn.TransformerEncoderLayer(6, 2, 8),
]
DIFFERENT = [nn.BatchNorm1d(6), Asks(), Switches(), Within(), OwnDropout(), nn.RReLU(), nn.InstanceNorm1d(4)]


@pytest.mark.parametrize(("network", "once"), [(n, True) for n in SAME] + [(n, False) for n in DIFFERENT])
@pytest.mark.parametrize("training", [False, True])
def test_who_asks_is_found_and_every_mode_put_back(network: nn.Module, once: bool, training: bool) -> None:
    before = {module: module.training for module in network.train(training).modules()}
    calls: list[bool | None] = []
    handle = network.register_forward_pre_hook(lambda module, _: calls.append(vars(module).get("training")))
    try:
        Verification(network, (X,), {}, training=True).check({})
    finally:
        handle.remove()
    own = {nn.TransformerEncoderLayer: False}.get(type(network))  # what does the same in both keeps its mode
    if once:
        assert calls == [own, own]
    else:
        assert calls[-4:] == [True, False] * 2
    assert {module: module.training for module in network.modules()} == before


def test_an_error_inside_puts_the_modes_back() -> None:
    network = nn.Sequential(nn.Linear(6, 2)).eval()
    with pytest.raises(AttributeError, match="training"), without_mode(network):
        _ = network[0].training
    assert not network.training and not network[0].training


class FromPairs(nn.Module):
    """Fails on a single instance."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2)
        return F.dropout(first, 0.5, self.training) + second


@pytest.mark.parametrize(
    ("network", "rows"), [(Asks(), [1, 4]), (nn.BatchNorm1d(6), [4, 4]), (FromPairs(), [4, 4]), (nn.Linear(6, 2), [4])]
)
def test_train_mode_sees_one_instance_where_that_is_enough(network: nn.Module, rows: list[int]) -> None:
    seen: list[int] = []
    verification = Verification(network, (X,), {}, training=True)
    handle = network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        verification.check({})
    finally:
        handle.remove()
    assert seen == rows
