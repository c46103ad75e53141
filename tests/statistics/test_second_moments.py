"""Second moments of what weights multiply, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_fscreen.statistics.padding import Tokens
from lightning_fscreen.statistics.second_moments import SecondMoments


def once(features: int) -> torch.Tensor:
    return torch.arange(features)[None]


@pytest.mark.parametrize(
    ("multiply", "shape", "channels", "weight"),
    [
        (F.linear, (7, 3, 4), -1, (5, 4)),
        (lambda x, w: x @ w, (7, 4), -1, (4, 5)),
        (lambda x, w: torch.addmm(torch.zeros(5), x, w), (7, 4), -1, (4, 5)),
        (lambda x, w: F.conv2d(x, weight=w, padding=1), (2, 4, 3, 3), 1, (5, 4, 3, 3)),
        (F.conv1d, (4, 6), 0, (5, 4, 3)),
        (F.conv_transpose1d, (2, 4, 6), 1, (4, 5, 3)),
        (lambda x, w: x @ w.T, (7, 4), -1, (5, 4)),
        (lambda x, w: torch.addmm(torch.zeros(5), x, w.transpose(0, 1)), (7, 4), -1, (5, 4)),
        (lambda x, w: F.linear(x, w[:, :, 0].squeeze(2)), (7, 4), -1, (5, 4, 1, 1)),
    ],
)
def test_every_position_is_an_instance(multiply, shape, channels, weight):
    torch.manual_seed(0)
    weight, other = nn.Parameter(torch.randn(weight)), nn.Parameter(torch.randn(weight))
    moments, batches = SecondMoments({weight: once(4)}), [torch.randn(shape) for _ in range(3)]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for values in batches:
        output = multiply(values, weight)
        with moments.counting(None):
            assert torch.equal(multiply(values, weight), output)
            multiply(values, other)
        for row in values.movedim(channels, -1).reshape(-1, 4).double():
            expected += torch.outer(row, row)
    found, instances = moments.of(weight)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert instances == 3 * shape[0]
    assert moments.of(other) is None


def test_positions_of_a_flattened_channel_are_instances():
    weight, values = nn.Parameter(torch.randn(5, 12)), torch.randn(7, 3, 4)
    places = torch.arange(12).view(3, 4).mT
    with SecondMoments({weight: places}) as moments:
        F.linear(values.flatten(1), weight)
    rows = values.mT.reshape(-1, 3)
    torch.testing.assert_close(moments.of(weight)[0], rows.mT @ rows)


def test_the_groups_of_a_convolution_are_instances():
    weight, values = nn.Parameter(torch.randn(8, 3, 1, 1)), torch.randn(7, 12, 2, 2)
    with SecondMoments({weight: torch.arange(12).view(4, 3)}) as moments:
        F.conv2d(values, weight, groups=4)
    rows = values.movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(moments.of(weight)[0], rows.mT @ rows)


def test_features_come_in_the_order_that_is_given():
    weight, values, places = nn.Parameter(torch.randn(5, 4)), torch.randn(7, 4), torch.tensor([[2, 0, 3, 1]])
    with SecondMoments({weight: places}) as moments:
        F.linear(values, weight)
    rows = values[:, places[0]]
    torch.testing.assert_close(moments.of(weight)[0], rows.mT @ rows)


def test_padding_does_not_count():
    weight, values, mask = nn.Parameter(torch.randn(5, 4)), torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    moments = SecondMoments({weight: once(4)})
    with moments.counting(Tokens(mask)):
        F.linear(values.masked_fill(mask[..., None] == 0, torch.nan), weight)
    rows = values[mask == 1]
    torch.testing.assert_close(moments.of(weight)[0], rows.mT @ rows)


def test_a_part_of_a_weight_is_another_weight():
    weight = nn.Parameter(torch.randn(4, 4))
    with SecondMoments({weight: once(4)}) as moments:
        for part in (weight[:2], weight[::2], weight.flatten()[:4].view(1, 4)):
            F.linear(torch.randn(7, 4), part)
    assert moments.of(weight) is None


def test_of_inputs_without_an_instance_nothing_is_known():
    """An expert to which nothing was sent, in one batch or in all."""
    weight, never, values = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5, 4)), torch.randn(7, 4)
    with SecondMoments({weight: once(4), never: once(4)}) as moments:
        for rows in (0, 7):
            F.linear(values[:rows], weight)
            F.linear(values[:0], never)
    found, instances = moments.of(weight)
    torch.testing.assert_close(found, values.T @ values)
    assert instances == 7
    assert moments.of(never) is None
