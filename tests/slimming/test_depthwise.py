"""Depthwise convolutions: those of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fscreen.slimming import double
from lightning_fscreen.slimming.depthwise import depthwise_conv

CALLS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"stride": (2,), "padding": 1}),
    (2, {"stride": (1, 3), "padding": (2, 0), "dilation": (1, 2)}),
    (3, {"padding": 1, "dilation": 2, "stride": 2}),
]


@pytest.mark.parametrize(("dims", "given"), CALLS)
@pytest.mark.parametrize("bias", [torch.randn(4).double(), None])
def test_it_is_torchs(dims: int, given: dict[str, Any], bias: Tensor | None) -> None:
    input, weight = torch.randn(2, 4, *[9, 8, 7][:dims]).double(), torch.randn(4, 1, *[3, 2, 3][:dims]).double()
    torchs = [F.conv1d, F.conv2d, F.conv3d][dims - 1](input, weight, bias, groups=4, **given)
    torch.testing.assert_close(depthwise_conv(input, weight, bias, groups=4, **given), torchs)


@pytest.mark.parametrize(
    ("layer", "is_used"),
    [
        (nn.Conv2d(4, 4, 3, groups=4, padding=1), True),
        (nn.Conv2d(4, 4, 3, groups=4, padding="same", bias=False), False),
        (nn.Conv2d(4, 8, 3, groups=4), False),
        (nn.Conv2d(4, 4, 3, groups=2), False),
    ],
)
def test_it_is_used_in_float64(layer: nn.Module, is_used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spied(*args: Any) -> Tensor:
        calls.append(args)
        return depthwise_conv(*args)

    monkeypatch.setattr(double, "depthwise_conv", spied)
    x = torch.randn(2, 4, 5, 5).double()
    with torch.no_grad(), double.InDouble(layer, {}):
        out = layer(x)
    assert bool(calls) == is_used
    torch.testing.assert_close(out, layer.double()(x))
