"""Means over positions against those of the whole tensor in float64."""

import pytest
import torch
from torch import nn

from lightning_fscreen.statistics.features import Activation, PositionMeans


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(4, 2), (5, 4), lambda x: x),
        (nn.Linear(4, 2), (4,), lambda x: x[None]),
        (nn.Linear(4, 2), (5, 3, 4), lambda x: x.mean(1)),
        (nn.Linear(4, 2), (5, 3, 2, 4), lambda x: x.mean((1, 2))),
        (nn.Conv1d(4, 2, 1), (5, 4, 7), lambda x: x.mean(2)),
        (nn.Conv2d(4, 2, 1), (5, 4, 7, 3), lambda x: x.mean((2, 3))),
        (nn.Conv2d(4, 2, 1), (4, 7, 3), lambda x: x.mean((1, 2))[None]),
        (nn.Conv3d(4, 2, 1), (5, 4, 2, 3, 2), lambda x: x.mean((2, 3, 4))),
        (nn.ConvTranspose2d(4, 2, 1), (5, 4, 7, 3), lambda x: x.mean((2, 3))),
        (nn.BatchNorm1d(4), (5, 4), lambda x: x),
        (nn.BatchNorm1d(4), (5, 4, 6), lambda x: x.mean(2)),
        (nn.BatchNorm2d(4), (5, 4, 6, 2), lambda x: x.mean((2, 3))),
    ],
)
def test_positions_are_averaged_to_one_value_per_instance_and_channel(module, shape, expected):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    reduced = PositionMeans()(x, module)
    assert not reduced.requires_grad
    torch.testing.assert_close(reduced, expected(x.detach()))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("in_place", [None, torch.relu_])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 6, 300, 301), (500, 40, 30), (700, 3, 1), (600, 5), (0, 3, 4, 4)])
def test_activations_are_averaged_whatever_their_size_and_stay_as_they_are(shape, dtype, in_place, square):
    x = 300 * torch.randn(shape).to(dtype)  # squares of such values overflow float16
    before = x.clone()
    reduced = PositionMeans()(x, nn.BatchNorm2d(shape[1]), Activation(torch.relu, in_place), square)
    expected = x.double().relu().square() if square else x.double().relu()
    tolerance = {"rtol": 1e-12, "atol": 0.0} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 0.0}
    torch.testing.assert_close(reduced.double(), expected.flatten(2).mean(2) if x.ndim > 2 else expected, **tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_over_positions_of_half_precision_are_taken_in_float32(dtype):
    x = torch.full((2, 3, 100, 100), 300.0, dtype=dtype)
    x[:, :, 0, 0] = 301.0 if dtype == torch.float16 else 302.0
    reduced = PositionMeans()(x, nn.Conv2d(3, 1, 1))
    torch.testing.assert_close(reduced.double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)


def test_memory_is_used_again_for_other_sizes_layouts_and_dtypes():
    means = PositionMeans()
    relu = Activation(torch.relu, torch.relu_)
    inputs = [
        torch.randn(40, 64, 30, 30).bfloat16(),
        torch.randn(7, 3, 5, 5).half(),
        torch.randn(40, 64, 30, 30).bfloat16().to(memory_format=torch.channels_last),
        torch.randn(6, 4, 3, 30).bfloat16().transpose(2, 3),
        torch.randn(1, 4, 3, 3).bfloat16().expand(9, 4, 3, 3),
        torch.randn(5, 8, 9).double(),
    ]
    found = [means(x, nn.BatchNorm2d(x.shape[1]), relu) for x in inputs]
    for x, mean in zip(inputs, found, strict=True):
        expected = x.double().relu().flatten(2).mean(2)
        torch.testing.assert_close(mean.double(), expected, rtol=2e-6, atol=1e-7)


def test_a_default_device_of_the_user_does_not_matter():
    x = torch.randn(3, 4, 5, 5).bfloat16()
    with torch.device("meta"):
        found = PositionMeans()(x, nn.BatchNorm2d(4), Activation(torch.relu, torch.relu_))
    torch.testing.assert_close(found.double(), x.double().relu().mean((2, 3)), rtol=2e-6, atol=1e-7)
