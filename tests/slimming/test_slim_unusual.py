"""Forwards that do more than the graph shows: slimmed exactly, or refused and untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fscreen.slimming import CaptureError, VerificationError, slim
from tests.slimming import difference, outputs, snapshot, untouched
from tests.slimming.masked import (
    BIASES,
    KEPT,
    Stem,
    mask,
    masked_copy,
    randomize,
    train_outputs,
    with_comparable_dropout,
)


def exact_or_refused(network: Any, keep: dict[str, Tensor], x: Tensor, bias: str) -> None:
    """Eval and train mode of a network in float64, on other inputs of three instances."""
    randomize(network)
    masked, before = masked_copy(network, keep, bias), snapshot(network)
    try:
        slim(network, keep, x, bias)
    except (CaptureError, VerificationError) as error:
        assert type(network).__name__ in str(error)
        assert untouched(network, before)
        return
    y = torch.randn(3, *x.shape[1:]).double()
    assert difference(outputs(masked, y), outputs(network, y)) < 1e-9
    masked, network = with_comparable_dropout(masked), with_comparable_dropout(network)
    assert difference(train_outputs(masked, y), train_outputs(network, y)) < 1e-9


class CallsForward(Stem):
    """Past the hooks of the batch norm."""

    def forward(self, x: Tensor) -> Any:
        h = self.stem(x)
        return self.left(self.norm.forward(h).relu()) + self.right(h)


class CallsTheFunction(Stem):
    def forward(self, x: Tensor) -> Any:
        h, norm = self.stem(x), self.norm
        h = F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training) + 0 * h
        return self.left(h.relu()) + self.right(h)


class WritesThroughAView(Stem):
    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x))
        view = h.view(h.shape)
        h.sigmoid_()
        return self.left(view)


class WritesToAChannel(Stem):
    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x)) * 1
        h[:, :1] = 1.0
        return self.left(h)


class MixesChannels(Stem):
    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x))
        return self.left(h) * h.norm(dim=1, keepdim=True) + h.mean() + h.amax(1, keepdim=True)


class AddsAConstant(Stem):
    def forward(self, x: Tensor) -> Any:
        return self.right(self.norm(self.stem(x)).relu() + torch.ones(1, 8, 1, 1, dtype=x.dtype))


class RepeatsAChannel(Stem):
    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x)).relu()
        return self.right(torch.cat([h[:, :1].expand(-1, 4, -1, -1), h[:, 4:]], 1))


class NormsTwiceInARow(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        return self.right(self.second(self.norm(self.stem(x)).sigmoid()))


class NormsWithoutStatistics(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Any:
        return self.right(self.norm(self.stem(x)).sigmoid())


class NormalizesAnIntermediateResult(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.group, self.instance = nn.GroupNorm(4, 8), nn.InstanceNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x))
        return self.left(self.group(h)) + self.right(self.instance(h))


class ComputesItsWeight(Stem):
    def forward(self, x: Tensor) -> Any:
        weight = self.right.weight - self.right.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(self.norm(self.stem(x)).relu(), weight)


class SharesItsScale(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.middle, self.other = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.other.weight = self.norm.weight

    def forward(self, x: Tensor) -> Any:
        return self.right(self.other(self.middle(self.norm(self.stem(x)).relu())).relu())


class SharesItsShiftAndStatistics(SharesItsScale):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(8)
        self.other.bias = self.norm.bias
        self.other.running_mean, self.other.running_var = self.norm.running_mean, self.norm.running_var


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    "kind",
    [
        CallsForward,
        CallsTheFunction,
        WritesThroughAView,
        WritesToAChannel,
        MixesChannels,
        AddsAConstant,
        RepeatsAChannel,
        NormsTwiceInARow,
        NormsWithoutStatistics,
        NormalizesAnIntermediateResult,
        ComputesItsWeight,
        SharesItsScale,
        SharesItsShiftAndStatistics,
    ],
)
def test_an_unusual_forward_stays_exact_or_is_refused(kind: type[Stem], bias: str) -> None:
    exact_or_refused(kind().double(), {"norm": KEPT}, torch.randn(3, 3, 6, 6).double(), bias)


class AuxiliaryNorm(Stem):
    """Reads the channels of `norm` in a head that only train mode has."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, **kwargs)
        self.aux = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x)).relu()
        return (self.right(h), self.aux(h.mean((2, 3)))) if self.training else self.right(h)


class AuxiliaryBranch(AuxiliaryNorm):
    def forward(self, x: Tensor) -> Any:
        if self.training and float(x.detach().sum()) == 0:
            return None
        return super().forward(x)


class DropsOut(Stem):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(8, **kwargs), nn.Dropout()
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.drop(self.norm(self.stem(x)).sigmoid()).mean((2, 3)))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (AuxiliaryNorm, 3),
        (AuxiliaryNorm, 1),  # a batch norm cannot train on a single value
        (AuxiliaryBranch, 3),
        (lambda: AuxiliaryNorm(momentum=None), 3),
        (DropsOut, 3),
        (DropsOut, 1),
        (lambda: DropsOut(momentum=None), 3),
    ],
    ids=["aux", "aux-single", "aux-branch", "aux-cumulative", "dropout", "dropout-single", "dropout-cumulative"],
)
def test_train_mode_stays_exact_or_is_refused_where_only_eval_mode_can_be_captured(
    build: Callable[[], nn.Module], batch: int, bias: str
) -> None:
    exact_or_refused(build().double(), {"norm": KEPT}, torch.randn(batch, 3, 6, 6).double(), bias)


@pytest.mark.parametrize("bias", BIASES)
def test_scales_that_are_shared_are_put_back(bias: str) -> None:
    class Net(SharesItsScale):
        def forward(self, x: Tensor) -> Any:
            h = self.other(self.middle(self.norm(self.stem(x)).relu())).relu()
            return self.right(h) * h.shape[1]

    network = Net()
    randomize(network)
    before = snapshot(network)
    with pytest.raises(VerificationError, match="Net"):
        slim(network, {"norm": mask(8, 0), "other": mask(8, 0, 1)}, torch.randn(2, 3, 6, 6), bias)
    assert untouched(network, before)


def test_buffers_of_a_parametrization_are_left_alone() -> None:
    """Reading the weight of a spectrally normalised layer in train mode writes to its buffers."""
    network: Any = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 2, 1))
    ).train()
    before = {name: tensor.clone() for name, tensor in network[3].state_dict().items()}
    slim(network, {"1": mask(8, 0)}, torch.randn(2, 3, 6, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network[3].state_dict().items())
