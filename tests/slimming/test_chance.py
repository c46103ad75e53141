"""Networks that draw random numbers in train mode are verified with the same ones, however wide they are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fscreen import slim
from lightning_fscreen.slimming.chance import SameChance

Use = Callable[[Tensor], Tensor]

NOISE: dict[str, Use] = {
    "Gaussian dropout": lambda h: h * (1 + 0.3 * torch.randn_like(h)),
    "dropout by hand": lambda h: h * (torch.rand_like(h) > 0.3),
    "dropout by a mask": lambda h: h * torch.bernoulli(torch.full_like(h, 0.7)) / 0.7,
    "in place": lambda h: h * torch.empty_like(h).normal_(1.0, 0.2) * torch.empty_like(h).uniform_(0.5, 1.5),
    "randomised slope": lambda h: F.rrelu(h, training=True),
    "dropped paths": lambda h: h * torch.rand(len(h), 1).bernoulli_(0.8),
    "torch's own": lambda h: F.feature_alpha_dropout(F.dropout(h), 0.0),
}


class Noisy(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        out: Tensor = self.last(self.second(self.use(h) if self.training else h).tanh())
        return out


@pytest.mark.parametrize("use", NOISE.values(), ids=NOISE)
def test_any_mask_is_accepted_and_the_masked_network_computed(use: Use) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        network, x = Noisy(use).double(), torch.randn(4, 6, dtype=torch.float64)
        nn.init.normal_(network.first.bias)
        keep = torch.rand(8) < 0.5
        keep[seed] = True
        masked = copy.deepcopy(network)
        with torch.no_grad():
            masked.first.weight[~keep] = masked.first.bias[~keep] = 0  # type: ignore[index]
        assert slim(network, {"first": keep}, x).removed == {"first": int((~keep).sum())}
        for training in (True, False):
            outputs = []
            for each in (network, masked):
                with SameChance():
                    outputs.append(each.train(training)(x))
            torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


def test_a_noise_that_is_added_lets_no_unit_go() -> None:
    torch.manual_seed(0)
    network, keep = Noisy(lambda h: h + torch.randn_like(h)).double(), torch.arange(8) < 4
    plan = slim(network, {"first": keep}, torch.randn(4, 6, dtype=torch.float64))
    assert not plan.removed and "4 of 4 pruned channels stay" in plan.kept_for["first"]


@pytest.mark.parametrize("name", [name for name in nn.modules.dropout.__all__ if "Alpha" not in name])
def test_what_every_dropout_layer_of_torch_reads_can_go(name: str) -> None:
    torch.manual_seed(0)
    rank = int(name[-2]) if name[-1] == "d" else 2
    conv = getattr(nn, f"Conv{rank}d")
    network = nn.Sequential(conv(3, 8, 3), nn.ReLU(), getattr(nn, name)(), conv(8, 4, 1), nn.ReLU(), conv(4, 2, 1))
    plan = slim(network, {"0": torch.arange(8) < 3, "3": torch.arange(4) < 3}, torch.randn(2, 3, *[4] * rank))
    assert plan.removed == {"0": 5, "3": 1}


def test_an_operator_that_says_what_it_drops_drops_nothing() -> None:
    x = torch.randn(3, 4)
    with SameChance():
        values, left = torch.native_dropout(x, 0.5, True)
    assert torch.equal(values, x) and bool(left.all())


DRAWS: dict[str, tuple[Callable[[int], Tensor], float, float]] = {  # mean, and how far all are from it at most
    "rand": (lambda width: torch.rand(500, width), 0.5, 0.5),
    "randn": (lambda width: torch.randn(500, width), 0.0, 5.0),
    "uniform_": (lambda width: torch.empty(500, width).uniform_(2.0, to=6.0), 4.0, 2.0),
    "normal_": (lambda width: torch.empty(500, width).normal_(3.0, std=0.1), 3.0, 0.5),
    "normal": (lambda width: torch.normal(torch.full((500, width), 2.0), 0.1), 2.0, 0.5),
    "bernoulli": (lambda width: torch.bernoulli(torch.full((500, width), 0.25)), 0.25, 0.75),
    "bernoulli_": (lambda width: torch.empty(500, width).bernoulli_(0.75), 0.75, 0.75),
    "exponential_": (lambda width: torch.empty(500, width).exponential_(2.0), 0.5, 5.0),
}


@pytest.mark.parametrize(("draw", "mean", "most"), DRAWS.values(), ids=DRAWS)
def test_the_numbers_are_of_the_distribution_and_do_not_depend_on_the_width(draw, mean, most):
    with SameChance():
        wide, more = draw(20), draw(20)
    with SameChance():
        narrow, other = draw(3), draw(3)
    assert torch.equal(wide[:, :3], narrow) and torch.equal(more[:, :3], other) and not torch.equal(wide, more)
    assert float(wide.mean()) == pytest.approx(mean, abs=0.15) and float((wide - mean).abs().max()) <= most
