"""Removing dead units leaves everything else as it was, and takes inputs of any form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_fscreen.slimming import remove_dead_units
from tests.slimming import difference, outputs, zero_columns, zero_rows
from tests.slimming.networks import CONV


@pytest.mark.parametrize(("rank", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_memory_format_stays(rank: int, layout: torch.memory_format) -> None:
    network = nn.Sequential(CONV[rank](3, 8, 3, bias=False), nn.ReLU(), CONV[rank](8, 4, 3)).to(memory_format=layout)
    zero_rows(network[0], 1, 2)
    remove_dead_units(network, (torch.randn(2, 3, *[7] * rank),))
    assert network[0].out_channels == 6
    assert all(network[i].weight.is_contiguous(memory_format=layout) for i in (0, 2))


def test_hooks_stay_and_the_random_state_is_not_used() -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2))
    zero_columns(network[3], 0)
    calls: list[tuple[int, ...]] = []
    handle = network[0].register_forward_hook(lambda module, args, output: calls.append(tuple(output.shape)))
    state = torch.get_rng_state()
    remove_dead_units(network, (torch.randn(2, 3, generator=torch.Generator()),))
    assert torch.equal(torch.get_rng_state(), state)
    calls.clear()
    network(torch.randn(7, 3))
    assert calls == [(7, 4)]
    handle.remove()
    network(torch.randn(7, 3))
    assert len(calls) == 1


def test_buffers_that_forward_writes_are_left_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)
            self.register_buffer("calls", torch.tensor(7))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.fc2(self.fc1(x).relu())

    network = Counting()
    zero_columns(network.fc2, 0)
    remove_dead_units(network, (torch.randn(2, 3),))
    assert network.fc1.out_features == 4
    assert network.calls == 7


def test_shared_parameters_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).relu()).relu())

    network = Tied().double()
    zero_columns(network.head, 1)
    zero_columns(network.a, 1)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 4).double(),))
    assert network.a.weight is network.b.weight
    x = torch.randn(5, 4).double()
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


def test_depthwise_layers_sharing_a_weight_both_change_their_groups() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
            self.a, self.b = (nn.Conv2d(6, 6, 3, padding=1, groups=6) for _ in range(2))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.stem(x)).relu()))

    network = Shared().double()
    zero_columns(network.head, 0, 5)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 3, 5, 5).double(),))
    assert (network.a.groups, network.b.groups) == (4, 4)
    x = torch.randn(3, 3, 6, 7).double()
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


def test_boolean_and_integer_buffers_are_cut_with_their_units() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)
            self.register_buffer("gate", torch.tensor([True, True, False, True, True]))
            self.register_buffer("times", torch.tensor([1, 2, 3, 4, 5]))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).relu() * self.gate * self.times)

    network = Gated().double()
    zero_columns(network.fc2, 0)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 3).double(),))
    assert network.gate.dtype == torch.bool and network.times.tolist() == [2, 4, 5]
    x = torch.randn(5, 3).double()
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


def test_keyword_and_nested_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, batch: dict[str, Tensor], *, scale: Tensor) -> Tensor:
            return self.fc2(self.fc1(batch["x"]).relu()) * scale

    network = Net().double()
    zero_columns(network.fc2, 1)
    masked = copy.deepcopy(network)
    remove_dead_units(network, ({"x": torch.randn(2, 3).double()},), {"scale": torch.ones(2, 1).double()})
    assert network.fc1.out_features == 4
    inputs = {"x": torch.randn(4, 3)}
    scale = torch.randn(4, 1)
    assert difference(outputs(masked, inputs, scale=scale), outputs(network, inputs, scale=scale)) < 1e-9


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)])
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2)).double()
    zero_rows(network[0], 1)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(shape).double(),))
    assert network[0].out_features == 4
    x = torch.randn(shape)
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_images_without_a_batch_dimension(rank: int) -> None:
    network = nn.Sequential(CONV[rank](2, 5, 2), nn.ReLU(), CONV[rank](5, 2, 2)).double()
    zero_rows(network[0], 1)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, *[5] * rank).double(),))
    assert network[0].out_channels == 4
    x = torch.randn(2, *[6] * rank)
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


@pytest.mark.parametrize("method", ["view", "reshape"])
def test_convolutions_are_viewed_into_a_linear_layer(method: str) -> None:
    """LeNet's `x.view(x.size(0), -1)`: each channel is a run of columns."""

    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 6, 3), nn.Linear(6 * 16, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x).sigmoid()
            return self.fc(getattr(h, method)(h.size(0), -1))

    network = LeNet().double()
    zero_rows(network.conv, 1, 4)
    zero_columns(network.fc, *range(32, 48))
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 1, 6, 6).double(),))
    assert (network.conv.out_channels, network.fc.in_features) == (3, 48)
    x = torch.randn(5, 1, 6, 6)
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


def test_a_network_that_casts_its_input_to_float32_can_be_slimmed() -> None:
    """As networks fed with bytes do: `x.float() / 255`."""

    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x.float() / 255).relu())

    network = Bytes()
    zero_columns(network.fc2, 1)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randint(0, 256, (2, 3), dtype=torch.uint8),))
    assert network.fc1.out_features == 4
    x = torch.randint(0, 256, (9, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(masked(x), network(x), atol=1e-5)
