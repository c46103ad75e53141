"""Channels that are switched off but stay: as few as possible, and with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_fscreen import slim
from tests.slimming import difference, outputs
from tests.slimming.masked import find_gates, masked_copy, randomize

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
KEEP = torch.tensor([True, False, True, True, False, True, False, True])


class Inverted(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, projection (Howard et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.first = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.depthwise, self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.squeeze, self.excite, self.project = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.depthwise(self.first(self.expand(x)).sigmoid())).sigmoid()
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        out: Tensor = self.project(y)
        return out


@pytest.mark.parametrize("bias", ["zero", "fold"])
def test_constants_behind_an_excitation_stay_but_nothing_in_front_of_them(bias: str) -> None:
    """A batch norm with scale zero needs no channel of its own in front of it: neither expansion nor depthwise one."""
    torch.manual_seed(0)
    network = Inverted().double()
    randomize(network)
    keep = {"first": KEEP, "second": KEEP}
    masked = masked_copy(network, keep, bias)
    plan = slim(network, keep, X, bias)  # type: ignore[arg-type]
    assert network.expand.out_channels == network.depthwise.out_channels == network.first.num_features == 5
    assert difference(outputs(masked, X), outputs(network, X)) < 1e-9
    masked.train(), network.train()
    assert difference([masked(X).detach()], [network(X).detach()]) < 1e-9
    assert set(plan.kept_for) == {"second"}  # sigmoid makes a constant even of zero
    assert plan.kept_for["second"].startswith("3 of 3 pruned channels stay: 3 because 'project' reads it multiplied by")


def test_a_constant_that_a_grouped_convolution_reads_is_not_promised_to_go() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1, groups=2)
    ).double()
    assert find_gates(network, X)[0].excluded == ("'3' would still read a constant of it that nothing else can carry")
