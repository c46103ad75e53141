"""Operations that torch's own counter does not know."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_fscreen.costs.operations import noting_others
from lightning_fscreen.costs.size import measure_size
from lightning_fscreen.fit.networks import Network

of_groups = pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="torch has none")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers(recurrent: Callable[..., nn.RNNBase], packed: bool, device: str) -> None:
    network = recurrent(5, 7, num_layers=2, bidirectional=True).to(device)
    weights = sum(parameter.numel() for parameter in network.parameters() if parameter.ndim == 2)
    sequences = [torch.randn(length, 5, device=device) for length in ((4, 2) if packed else (4, 4))]
    inputs = pack_sequence(sequences) if packed else torch.stack(sequences, 1)
    assert measure_size(network, ((inputs,), {}), 1).macs == weights * sum(map(len, sequences))


class Experts(nn.Module):
    """Every token goes to one of three."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 8, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.weight, offs=torch.tensor([4, 5, len(x)], dtype=torch.int32))


@of_groups
def test_experts() -> None:
    assert measure_size(Experts(), ((torch.randn(10, 16, dtype=torch.bfloat16),), {}), 1).macs == 10 * 16 * 8


@of_groups
def test_groups_of_columns_share_the_work() -> None:
    left, right = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(16, 8, dtype=torch.bfloat16)

    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch._grouped_mm(x, right, offs=torch.tensor([8, 16], dtype=torch.int32))

    assert measure_size(Product(), ((left,), {}), 1).macs == 8 * 16 * 8


@torch.library.custom_op("fscreen_tests::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    """Nobody can tell what it does."""
    return x @ weight.T


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return product(self.inner(x), self.weight)


def test_operators_of_others_are_noted_with_their_module() -> None:
    with torch.no_grad(), noting_others() as others:
        nn.Sequential(nn.Linear(4, 4), Foreign())(torch.randn(3, 4))
    assert others == {"Sequential.1": {"fscreen_tests::product"}}


def test_there_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    network = Network("", Foreign())
    network.record((torch.randn(3, 4),), {})
    for _ in range(2):
        assert network.measure(network.module).macs == 4 * 4
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "fscreen_tests::product in Foreign are not known" in warnings[0].getMessage()
