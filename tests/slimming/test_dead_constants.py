"""What dead units say all the time goes into biases, or one channel carries it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fscreen.slimming import remove_dead_units
from tests.slimming import difference, outputs, zero_columns, zero_rows
from tests.slimming.networks import CONV


def test_learned_constants_of_a_dense_network_stay_trainable() -> None:
    """A learned query is no unit without incoming weights: nothing was pruned, nothing may go."""

    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 8))
            self.project, self.fc, self.head = nn.Linear(8, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.fc(x) + self.project(self.query)).relu())

    network = Query()
    plan = remove_dead_units(network, (torch.randn(2, 4),))
    assert not plan, plan.cuts
    assert network.query.shape == (1, 8)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_where_zero_padding_meets_constants_one_channel_carries_them(rank: int, bias: bool) -> None:
    first, second = CONV[rank](2, 6, 1), CONV[rank](6, 4, 3, padding=1, bias=bias)
    zero_rows(first, 1, 3, 4)
    network = nn.Sequential(first, nn.Sigmoid(), second, nn.ReLU(), CONV[rank](4, 2, 1)).double()
    masked = copy.deepcopy(network)
    plan = remove_dead_units(network, (torch.randn(2, 2, *[6] * rank).double(),))
    assert first.out_channels == 4 and plan.removed == {"0": 2}
    x = torch.randn(1, 2, *[9] * rank).double()
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


def test_without_padding_constants_go_into_a_new_bias() -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2, bias=False)).double()
    network[2].weight.requires_grad_(False)
    zero_rows(network[0], 0, 4)
    weight, constant = network[2].weight.detach().clone(), network[0].bias.detach().sigmoid()
    plan = remove_dead_units(network, (torch.randn(2, 3).double(),))
    assert plan.biases == ("2",)
    assert torch.allclose(network[2].bias, weight[:, [0, 4]] @ constant[[0, 4]], rtol=1e-12)
    assert not network[2].bias.requires_grad  # as its layer


def test_a_weak_carrier_does_not_ruin_float32() -> None:
    """Exact in float64 is not enough: a carrier with a vanishing constant needs weights that float32 cannot use."""
    first, second = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 3, padding=1)
    zero_rows(first, 0, 1)
    with torch.no_grad():
        first.bias.copy_(torch.tensor([-5.0, 1.0, 0.0]))  # gelu(-5) = -1e-6, in float32 only to a few percent
    skip = nn.Conv2d(3, 3, 1)
    zero_columns(skip, 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.skip = first, second, skip

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x)
            return self.second(F.gelu(h)), h[:, ::2]

    class Reads(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x)
            return self.second(F.gelu(h)), self.skip(h + x.abs())  # unit 0 lives: its sum with x is no constant

    network = Reads()
    x = torch.randn(4, 1, 6, 6)
    with torch.no_grad():
        before = network(x)[0]
        remove_dead_units(network, (torch.randn(2, 1, 6, 6),))
        after = network(x)[0]
    assert torch.allclose(before, after, atol=1e-4), (before - after).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_and_agree_to_their_precision(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, 4)).to(dtype)
    zero_rows(network[0], *range(0, 12, 2))
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 6, dtype=dtype),))
    assert network[0].out_features == 6
    assert {p.dtype for p in network.parameters()} == {dtype}
    x = torch.randn(9, 6)
    assert difference(outputs(masked, x), outputs(network, x)) < 4 * torch.finfo(dtype).eps
