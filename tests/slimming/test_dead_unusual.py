"""Forwards that do more than the graph shows: units are removed exactly, or it is refused and nothing changed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_fscreen.slimming import CaptureError, VerificationError, remove_dead_units
from tests.slimming import difference, outputs, snapshot, untouched, zero_columns, zero_rows
from tests.slimming.masked import sharing


class Chain(nn.Module):
    """3 → 8 → 6 → 2; hidden units are dead in both hidden layers."""

    def __init__(self, left: int = 6) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.extra = nn.Linear(8, 8, bias=False)
        zero_columns(self.fc2, *range(left, 8))
        zero_rows(self.fc2, 2)

    def hidden(self, x: Tensor) -> Tensor:
        return self.fc1(x).sigmoid()

    def rest(self, h: Tensor) -> Tensor:
        return self.fc3(self.fc2(h).sigmoid())


class ReshapesByNumber(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.hidden(x).reshape(-1, 2).reshape(-1, 8))


class ChecksItsSize(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        if h.shape[1] != 8:
            raise ValueError("expected 8 units")
        return self.rest(h)


class AssertsItsSize(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        assert h.shape[1] == 8
        return self.rest(h)


class ReadsOutFeatures(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.hidden(x)) / self.fc1.out_features


class ViewsByOutFeatures(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.hidden(x).view(-1, self.fc1.out_features))


class TurnsToNaN(Chain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.rest(self.hidden(x))
        return y if self.fc1.out_features == 8 else y * float("nan")


class TellsItsSize(Chain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rest(self.hidden(x)), torch.full((len(x),), self.fc1.out_features)


class Squeezes(Chain):
    def __init__(self) -> None:
        super().__init__(left=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.hidden(x)[..., None].squeeze())


class ReusesAWeight(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.extra(self.rest(self.hidden(x)).repeat(1, 4)), self.fc1.weight.t())


class UsesAWeightWithoutItsBias(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.linear(self.fc2(self.hidden(x)).sigmoid(), self.fc3.weight[:, :6].repeat(3, 1)))


class CallsAFunction(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.linear(self.hidden(x), self.fc2.weight).sigmoid())


class WritesThroughAView(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        view = h.view(len(x), -1)
        h.relu_()
        return self.rest(view)


class WritesThroughDropout(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        F.relu(F.dropout(h, 0.5, self.training), inplace=True)
        return self.rest(h)


class ReturnsAWeight(Chain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rest(self.hidden(x)), self.fc1.weight.flatten()


class SumsUnits(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.rest(h) + h.sum(1, keepdim=True) + h.std(1, keepdim=True)


class IndexesUnits(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.rest(h) + h[:, 7:] + h.select(1, 6)[:, None] + h[:, torch.tensor([6])]


class CountsUnits(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.hidden(x)) * self.hidden(x).shape[-1]


class AddsPositions(Chain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.rest(h + torch.arange(h.shape[1]))


@pytest.mark.parametrize(
    "kind",
    [
        ReshapesByNumber,
        ChecksItsSize,
        AssertsItsSize,
        ReadsOutFeatures,
        ViewsByOutFeatures,
        TurnsToNaN,
        TellsItsSize,
        Squeezes,
        ReusesAWeight,
        UsesAWeightWithoutItsBias,
        CallsAFunction,
        WritesThroughAView,
        WritesThroughDropout,
        ReturnsAWeight,
        SumsUnits,
        IndexesUnits,
        CountsUnits,
        AddsPositions,
    ],
)
def test_a_forward_that_depends_on_sizes_stays_exact_or_is_refused(kind: type[Chain]) -> None:
    torch.manual_seed(0)
    network = kind().double()
    masked, before = copy.deepcopy(network), snapshot(network)
    modes = [module.training for module in network.modules()]
    x = torch.randn(5, 3).double()
    try:
        remove_dead_units(network, (torch.randn(2, 3).double(),))
    except VerificationError as error:
        assert kind.__name__ in str(error)
        assert untouched(network, before)
        assert network.fc1.out_features == 8 and network.fc2.in_features == 8
    assert [module.training for module in network.modules()] == modes
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


class SharesABias(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.fc4 = nn.Linear(6, 6)
        self.fc2.bias = self.fc4.bias
        zero_rows(self.fc1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc4(self.fc2(self.hidden(x)).sigmoid()))


class HasATiedLayerThatIsNotCalled(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 6)
        self.unused.weight = self.fc2.weight
        zero_rows(self.fc1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.hidden(x))


@pytest.mark.parametrize("kind", [SharesABias, HasATiedLayerThatIsNotCalled])
def test_constants_meet_shared_parameters(kind: type[Chain]) -> None:
    torch.manual_seed(0)
    network = kind().double()
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 3).double(),))
    x = torch.randn(5, 3).double()
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9
    assert network.fc1.out_features < 8  # units 6 and 7 at the least: nobody reads them
    assert sharing(network) == sharing(masked)


def test_a_network_that_cannot_be_captured_is_left_untouched() -> None:
    class Branches(Chain):
        def forward(self, x: Tensor) -> Tensor:
            h = self.hidden(x)
            return self.rest(h if h.sum() > 0 else -h)

    network = Branches()
    before = snapshot(network)
    with pytest.raises(CaptureError, match=r"Branches cannot be captured.*control flow"):
        remove_dead_units(network, (torch.randn(2, 3),))
    assert untouched(network, before) and network.training


def test_inputs_that_do_not_fit_are_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    zero_rows(network[0], 0)
    before = snapshot(network)
    with pytest.raises(CaptureError):
        remove_dead_units(network, (torch.randn(2, 5),))
    assert untouched(network, before)


def test_noise_in_eval_mode_stays_as_it_was() -> None:
    class Noisy(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.hidden(x + torch.randn_like(x)))

    network, x = Noisy().eval(), torch.randn(2, 3)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        before = network(x)
        assert remove_dead_units(network, (x,)).removed
        torch.manual_seed(1)
        torch.testing.assert_close(network(x), before)
