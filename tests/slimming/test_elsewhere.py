"""Constants that are right at the sizes of the example alone are not carried: the network is the same at all sizes."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fscreen import slim

KEEP = torch.tensor([True, True, False, True, False, False])


class Padded(nn.Module):
    """Images of odd sizes are padded before every second position is read."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 2, stride=2)
        self.last, self.activation = nn.Linear(5, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.first(x))
        h = self.second(F.pad(h, (0, h.shape[-1] % 2, 0, h.shape[-2] % 2)))
        out: Tensor = self.last(h.relu().mean((2, 3)))
        return out


class Averaged(nn.Module):
    """The mean over a text, times the square root of its length."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.first(x)).mean(1) * x.shape[1] ** 0.5
        out: Tensor = self.last(self.second(h).tanh())
        return out


class Joined(nn.Module):
    """Half the positions, repeated, and filled up to as many as there were, as in a U-Net."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(9, 3, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(F.max_pool1d(self.activation(self.first(x)), 2), scale_factor=2)
        out: Tensor = self.second(torch.cat([x, F.pad(h, (0, x.shape[-1] - h.shape[-1]))], 1))
        return out


CASES = {
    "padded, a constant of its own": (Padded, torch.sigmoid, "zero", (3, 8, 8), (3, 9, 11)),
    "padded, folded": (Padded, F.silu, "fold", (3, 8, 8), (3, 9, 8)),
    "averaged, a constant of its own": (Averaged, torch.sigmoid, "zero", (9, 4), (14, 4)),
    "averaged, folded": (Averaged, torch.relu, "fold", (9, 4), (5, 4)),
    "joined, folded": (Joined, torch.tanh, "fold", (3, 8), (3, 9)),
}


def masked(network: nn.Module, bias: str) -> nn.Module:
    reference = copy.deepcopy(network)
    with torch.no_grad():
        first = reference.get_submodule("first")
        first.weight[~KEEP] = 0  # type: ignore[index, operator]
        if bias == "zero":
            first.bias[~KEEP] = 0  # type: ignore[index, operator]
    return reference


@pytest.mark.parametrize(("make", "activation", "bias", "shape", "other"), CASES.values(), ids=CASES)
def test_the_network_is_the_same_at_other_sizes(make, activation, bias, shape, other):
    torch.manual_seed(0)
    network = make(activation).double()
    reference = masked(network, bias)
    plan = slim(network, {"first": KEEP}, torch.randn(4, *shape, dtype=torch.float64), bias=bias)
    for size in (shape, other):
        x = torch.randn(3, *size, dtype=torch.float64)
        torch.testing.assert_close(network(x), reference(x), rtol=1e-9, atol=1e-9)
    assert plan.removed.get("first", 0) < 3 and "depends on the sizes of the input" in plan.kept_for["first"]


@pytest.mark.parametrize(("make", "shape"), [(Padded, (3, 8, 8)), (Averaged, (9, 4))])
def test_zeros_go_whatever_the_sizes(make, shape):
    torch.manual_seed(0)
    network = make(torch.relu).double()
    plan = slim(network, {"first": KEEP}, torch.randn(4, *shape, dtype=torch.float64))
    assert plan.removed == {"first": 3} and not plan.kept_for


def test_what_differs_elsewhere_for_another_reason_is_said(caplog):
    """The network has another part for other lengths, of which the captured graph knows nothing."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            h = self.first(x).relu().mean(1)
            return self.second(h) if x.shape[1] == 9 else self.last(h)

    torch.manual_seed(0)
    network = Parts().double()
    reference, x = masked(network, "fold"), torch.randn(4, 9, 4, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        plan = slim(network, {"first": KEEP}, x, bias="fold")
    assert plan.removed == {"first": 3} and "at the sizes of the example alone" in caplog.text
    torch.testing.assert_close(network(x), reference(x), rtol=1e-9, atol=1e-9)


class PaddedAndScaled(nn.Module):
    """As `Padded`, behind which a width is counted, as no graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.second, self.counted, self.last = nn.Conv2d(6, 6, 2, stride=2), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        h = self.counted(self.second(F.pad(h, (0, h.shape[-1] % 2, 0, h.shape[-2] % 2)))).relu()
        out: Tensor = self.last(h / math.sqrt(h.shape[1]))
        return out


@pytest.mark.parametrize("bias", ["zero", "fold"])
def test_constants_of_one_gate_do_not_hide_that_another_is_to_blame(bias: str) -> None:
    torch.manual_seed(0)
    network, x = PaddedAndScaled(), torch.randn(2, 3, 8, 8)
    for norm in (network.norm, network.counted):
        nn.init.normal_(norm.bias)
    masked = copy.deepcopy(network).eval()
    with torch.no_grad():
        for norm in (masked.norm, masked.counted):
            norm.weight[~KEEP] = 0
            if bias == "zero":
                norm.bias[~KEEP] = 0
    plan = slim(network, {"norm": KEEP, "counted": KEEP}, x, bias=bias)
    assert "counted" in plan.kept_for and network.counted.num_features == 6 and network.first.out_channels == 3
    for size in (8, 7):
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(network.eval()(x), masked(x), rtol=1e-4, atol=1e-5)
