"""Stacks of branches, attention over them, parts of tensors: slimmed exactly, or kept where numbers count channels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fscreen import slim
from lightning_fscreen.slimming.fits import check_fits
from lightning_fscreen.slimming.plan import SlimmingPlan
from lightning_fscreen.slimming.resize import grow, slim_like
from lightning_fscreen.slimming.state import PLAN_KEY
from tests.slimming import difference, outputs
from tests.slimming.masked import find_gates, masked_copy, randomize

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()


def normed(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class SelectiveKernel(nn.Module):
    """Branches are stacked, and weighted by a softmax over them (Li et al. 2019); its width is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.stem, self.left, self.right = normed(3, 8), normed(4, 6, 3), normed(4, 6)
        self.reduce, self.select = normed(6, 4), nn.Conv2d(4, 12, 1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.stem(x), self.width // 2, 1)
        stacked = torch.stack([self.left(first), self.right(second)], dim=1)
        weights = self.select(self.reduce(stacked.sum(1).mean((2, 3), keepdim=True)))
        weights = weights.view(len(x), 2, weights.shape[1] // 2, 1, 1).softmax(1)
        y: Tensor = self.last((stacked * weights).sum(1) + stacked.unbind(1)[0] + stacked[:, 1].amax((2, 3), True))
        return y


class SplitAttention(nn.Module):
    """Radix 2 (Zhang et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = normed(3, 4), normed(4, 12, 3, groups=2)
        self.reduce, self.select, self.last = normed(6, 4), nn.Conv2d(4, 12, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        n, channels, *size = y.shape
        y = y.reshape(n, 2, channels // 2, *size)
        weights = self.select(self.reduce(y.sum(1).mean((2, 3), keepdim=True)))
        weights = F.softmax(weights.view(n, 1, 2, -1).transpose(1, 2), dim=1).reshape(n, -1).view(n, -1, 1, 1)
        out: Tensor = self.last((y * weights.reshape(n, 2, channels // 2, 1, 1)).sum(1))
        return out


class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(108, 6 * 4 * 4), nn.Unflatten(1, (6, 4, 4)), nn.BatchNorm2d(6), nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3),
        )  # fmt: skip


def prune(network: nn.Module, every: int = 3) -> tuple[nn.Module, SlimmingPlan, dict[str, Tensor]]:
    """Slim units away; the masked network, the plan, and the masks."""
    gates = find_gates(network, X)
    assert [gate.excluded for gate in gates] == [None] * len(gates)
    dead = {unit for gate in gates for unit in gate.units if unit % every == 0}
    keep = {gate.name: torch.tensor([unit not in dead for unit in gate.units]) for gate in gates}
    masked = masked_copy(network, keep, "zero")
    return masked, slim(network, keep, X), keep


@pytest.mark.parametrize("make", [SelectiveKernel, SplitAttention, Generator])
def test_all_pruned_channels_go_exactly(make: Any) -> None:
    torch.manual_seed(0)
    network = make().double()
    randomize(network)
    fresh = copy.deepcopy(network)
    masked, plan, keep = prune(network)
    for name, kept in keep.items():
        assert network.get_submodule(name).num_features == int(kept.sum()) < len(kept)
    assert difference(outputs(masked, X), outputs(network, X)) < 1e-9
    masked.train(), network.train()
    assert difference([masked(X)], [network(X)]) < 1e-9
    slim_like(fresh, SlimmingPlan.from_json(plan.to_json()))
    fresh.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if name != PLAN_KEY})
    assert difference(outputs(network, X), outputs(fresh, X)) == 0


def test_attributes_that_count_channels_follow_them_and_come_back() -> None:
    torch.manual_seed(0)
    network = SelectiveKernel().double()
    _, plan, keep = prune(network)
    left = 2 * int(keep["stem.1"][:4].sum())
    assert plan.attributes == {"": {"width": (8, left)}} and network.width == left < 8
    undo = grow(network)
    assert network.width == 8
    undo()
    assert network.width == left
    with pytest.raises(ValueError, match="'width' equal to 8, this model's is 6"):
        other = SelectiveKernel()
        other.width = 6
        check_fits(plan, other)


def test_one_unit_for_each_channel_that_a_generator_unflattens() -> None:
    gates = find_gates(Generator().double(), X)
    assert [len(set(gate.units)) for gate in gates] == [6, 4]


class Literal(nn.Module):
    """One line has a size written as a number, another computes it."""

    def __init__(self, bound: int) -> None:
        super().__init__()
        self.stem, self.other, self.last = normed(3, 8), normed(3, 8), nn.Conv2d(8 + 8, 2, 1)
        self.cut = lambda y: torch.cat([y[:, :bound], y[:, bound:] * 2], 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.cut(self.stem(x))
        n, channels, *size = self.other(x).shape
        second = self.other(x).view(n, 2, channels // 2, *size).transpose(1, 2).reshape(n, channels, *size)
        y: Tensor = self.last(torch.cat([first, second], 1))
        return y


@pytest.mark.parametrize(("bound", "left"), [(3, 5), (4, 8)])
def test_numbers_in_forward_keep_only_what_they_count(bound: int, left: int) -> None:
    """Channels behind a bound can go; where half of the channels is written as a number, that line's stay."""
    torch.manual_seed(0)
    network = Literal(bound).double()
    pruned = [5, 6, 7] if bound == 3 else [1, 5]
    keep = {
        "stem.1": torch.tensor([index not in pruned for index in range(8)]),
        "other.1": torch.tensor([True, True, False, True] * 2),
    }
    masked = masked_copy(network, keep, "zero")
    plan = slim(network, keep, X)
    assert network.stem[1].num_features == left and network.other[1].num_features == 6
    assert difference(outputs(masked, X), outputs(network, X)) < 1e-9
    if left == 8:
        assert "2 of 2 pruned channels stay: 2 because slice has sizes written into forward" in plan.kept_for["stem.1"]


def test_reasons_are_in_plain_words() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = normed(3, 8), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.body(x).softmax(1) * 2)
            return y

    assert find_gates(Mixes().double(), X)[0].excluded == "operation 'softmax': it normalises over all channels"
