from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fscreen.costs.size import LayerSize, Size, measure_size
from tests.slimming import snapshot, untouched


@pytest.mark.parametrize(
    ("network", "shape", "params", "macs"),
    [
        (nn.Linear(7, 5), (3, 7), 7 * 5 + 5, 7 * 5),
        (nn.Linear(7, 5, bias=False), (3, 4, 7), 7 * 5, 4 * 7 * 5),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 6), 3 * 8 * 9 + 8, 10 * 6 * 3 * 8 * 9),
        (nn.Conv2d(3, 8, 3, stride=2), (2, 3, 11, 9), 3 * 8 * 9 + 8, 5 * 4 * 3 * 8 * 9),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 5, 5), 6 * 9, 9 * 6 * 9),
        (nn.Conv1d(4, 6, 5), (1, 4, 9), 4 * 6 * 5 + 6, 5 * 4 * 6 * 5),
        (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4), 2 * 3 * 8 + 3, 27 * 2 * 3 * 8),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (5, 4), 4 * 6 + 6 + 6 * 2 + 2, 4 * 6 + 6 * 2),
        (nn.ReLU(), (2, 3), 0, 0),
    ],
)
def test_size_agrees_with_counting_by_hand(network: nn.Module, shape: tuple[int, ...], params: int, macs: int) -> None:
    size = measure_size(network, ((torch.randn(shape),), {}), shape[0])
    assert (size.params, size.macs) == (params, macs)


def test_nonzero_parameters_are_counted() -> None:
    network = nn.Linear(4, 3)
    with torch.no_grad():
        network.weight[:, 1:3] = 0
        network.bias.zero_()
    assert measure_size(network, None, 2) == Size(params=15, nonzero=6, macs=None)


def test_shared_parameters_count_once_and_their_work_twice() -> None:
    layer = nn.Linear(4, 4)
    size = measure_size(nn.Sequential(layer, nn.ReLU(), layer), ((torch.randn(2, 4),), {}), 2)
    assert (size.params, size.macs) == (20, 32)


def test_keyword_inputs_are_passed() -> None:
    class Keyword(nn.Linear):
        def forward(self, *, x: Tensor) -> Tensor:
            return super().forward(x)

    assert measure_size(Keyword(3, 2), ((), {"x": torch.randn(4, 3)}), 4).macs == 6


def test_measuring_changes_nothing() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    network[1].eval()
    before, state = snapshot(network), torch.get_rng_state()
    measure_size(network, ((torch.ones(5, 3),), {}), 5)
    assert untouched(network, before) and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == [True, True, False, True]
    assert all(parameter.grad is None for parameter in network.parameters())


class Shared(nn.Module):
    """Calls one layer twice, once from inside another, and multiplies without any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.ReLU(), self.first, nn.Linear(6, 2, bias=False))
        self.scale = nn.Parameter(torch.ones(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x)) + F.linear(x @ self.scale, torch.ones(2, 3))


def test_the_size_of_a_layer_is_its_own_part_alone() -> None:
    size = measure_size(Shared(), ((torch.randn(4, 6),), {}), 4, "net")
    assert dict(size.layers) == {
        "net": LayerSize(18, 6 * 3 + 3 * 2),
        "net.first": LayerSize(42, 2 * 36),  # also what the block calls
        "net.block.2": LayerSize(12, 12),
    }
    assert size.params == sum(layer.params for layer in size.layers.values())
    assert size.macs == sum(layer.macs or 0 for layer in size.layers.values())


def test_a_fused_layer_is_counted_by_its_parts() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layers = measure_size(encoder, ((torch.randn(2, 5, 8),), {}), 2).layers
    assert layers["linear1"].macs == layers["linear2"].macs == 5 * 8 * 16


@pytest.mark.parametrize("frozen", [False, True])
def test_an_encoder_with_padding_is_counted(frozen: bool) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).requires_grad_(
        not frozen
    )
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    macs = [
        measure_size(encoder, ((torch.randn(2, 5, 8),), {"src_key_padding_mask": mask}), 2).macs
        for mask in (padding, None)
    ]
    assert macs[0] == macs[1]


def test_parameters_may_be_passed_to_modules() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.inner = nn.Parameter(torch.ones(1, 6)), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.inner(self.token)
            return self.inner(x) + self.last

    network = Token()
    assert measure_size(network, ((torch.randn(2, 6),), {}), 2).macs == 36
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert not hasattr(network, "last")  # what forward keeps, with its graph, could not be copied
