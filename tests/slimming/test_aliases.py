"""What is written to a view is seen by its base and by its other views."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fscreen import slim
from tests.slimming import difference, outputs
from tests.slimming.masked import find_gates, masked_copy, randomize

X = torch.randn(3, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()


class TwoBranches(nn.Module):
    """A function of two normed maps, of `width` and of 8 channels, which a convolution reads."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.other, self.other_norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.function = function
        example = function(torch.ones(2, width, 5, 5), torch.ones(2, 8, 5, 5))
        self.last = nn.Conv2d(example.shape[1], 2, 1)
        self.double()
        randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.norm(self.first(x)), self.other_norm(self.other(x))))
        return y


def adds_to_a_slice(y: Tensor, z: Tensor) -> Tensor:
    out = torch.cat([y, y], 1)[:, :8]
    out += z
    return out


def writes_to_a_chunk_and_reads_the_whole(y: Tensor, z: Tensor) -> Tensor:
    first, second = y.relu().chunk(2, 1)
    whole = torch.cat([first, second], 1)
    parts = whole.chunk(2, 1)
    parts[1].add_(z)
    return whole.view(len(y), 2, -1, *y.shape[2:]).flatten(1, 2)


def assigns_a_part(y: Tensor, z: Tensor) -> Tensor:
    half = y.shape[1] // 2
    out = torch.zeros_like(y)
    out[:, :half] = z
    out[:, half:] = y[:, half:]
    return out.sigmoid()


def overwrites(y: Tensor, z: Tensor) -> Tensor:
    view = y.transpose(2, 3)
    y.copy_(z)
    y[:, :, 0].zero_()
    return view.relu()


def changes_its_own_shape(y: Tensor, z: Tensor) -> Tensor:
    first = y[:, :, 0]
    y.unsqueeze_(2).transpose_(3, 4)
    y.add_(z.unsqueeze(2))
    y.transpose_(3, 4)
    y.squeeze_(2)
    y[:, :, 1] = 0
    return y + first.unsqueeze(2)


@pytest.mark.parametrize(
    ("function", "width"),
    [
        (adds_to_a_slice, 4),
        (writes_to_a_chunk_and_reads_the_whole, 16),
        (assigns_a_part, 16),
        (overwrites, 8),
        (changes_its_own_shape, 8),
    ],
)
@pytest.mark.parametrize("bias", ["zero", "fold"])
def test_what_is_written_through_a_view_is_slimmed_exactly(function: Any, width: int, bias: Any) -> None:
    torch.manual_seed(1)
    network = TwoBranches(function, width)
    gates = find_gates(network, X)
    assert not any(gate.excluded for gate in gates) or function is overwrites
    dead = {unit for gate in gates for unit in gate.units if unit % 3 == 0}
    keep = {gate.name: torch.tensor([unit not in dead for unit in gate.units]) for gate in gates}
    masked = masked_copy(network, keep, bias)
    slim(network, keep, X, bias)
    assert network.other.out_channels < 8
    assert difference(outputs(masked, X), outputs(network, X)) < 1e-9


def test_a_tensor_that_takes_the_shape_of_another_can_be_written_to() -> None:
    def resizes(y: Tensor, z: Tensor) -> Tensor:
        out = y.new_empty(0).resize_as_(y).copy_(y)
        out += z
        return out.relu()

    network = TwoBranches(resizes, 8)
    masked = masked_copy(network, keep := {"norm": torch.arange(8) < 2}, "zero")
    assert "resize_as_" in slim(network, keep, X).kept_for["norm"]
    assert difference(outputs(masked, X), outputs(network, X)) < 1e-9


def test_a_write_ends_what_was_known_of_the_base() -> None:
    """Constants that the base had before must not be folded."""

    def adds(y: Tensor, z: Tensor) -> Tensor:
        out = y * 1
        out[:, :8] += z
        return out

    network = TwoBranches(adds, 8)
    keep = {"norm": torch.arange(8) < 2, "other_norm": torch.arange(8) >= 0}
    masked = masked_copy(network, keep, "fold")
    slim(network, keep, X, "fold")
    assert difference(outputs(masked, X), outputs(copy.deepcopy(network), X)) < 1e-9
    assert network.last.in_channels == 8
