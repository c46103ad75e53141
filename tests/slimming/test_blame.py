"""Gates that forward does more with than its graph shows stay, and only they."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_fscreen import find_gates, slim
from lightning_fscreen.slimming import VerificationError
from lightning_fscreen.slimming.blame import culprits


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_those_to_blame_are_found_in_few_trials(guilty: list[bool]) -> None:
    groups, trials = [[f"{n}.a", f"{n}.b"] for n in range(len(guilty))], []
    blamed = {name for names, own in zip(groups, guilty, strict=True) if own for name in names}

    def works(some):
        trials.append(some)
        return blamed.isdisjoint(name for names in some for name in names)

    if blamed:
        assert set(culprits(groups, works)) == blamed
        assert len(trials) <= 2 * sum(guilty) * math.ceil(math.log2(max(len(groups), 2)))


class Scaled(nn.Module):
    """Layers, behind some of which forward divides by the square root of their width."""

    def __init__(self, scaled: tuple[int, ...], layers: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 if place == 0 else 8, 8) for place in range(layers))
        self.last, self.scaled = nn.Linear(8, 3), scaled

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(x).tanh()
            x = x / math.sqrt(x.shape[-1]) if place in self.scaled else x
        out: Tensor = self.last(x)
        return out


def build(scaled: tuple[int, ...]) -> tuple[Scaled, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    network = Scaled(scaled).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    keep = {gate.name: torch.rand(8) < 0.5 for gate in find_gates(network, x) if gate.excluded is None}
    for mask in keep.values():
        mask[0], mask[1] = True, False
    return network, keep, x


def masked(network: nn.Module, keep: dict[str, Tensor]) -> nn.Module:
    network = copy.deepcopy(network)
    with torch.no_grad():
        for name, mask in keep.items():
            layer = network.get_submodule(name)
            layer.weight[~mask] = layer.bias[~mask] = 0  # type: ignore[index, operator]
    return network


@pytest.mark.parametrize("scaled", [(0,), (4,), (1, 3)])
def test_the_others_are_removed(scaled: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    network, keep, x = build(scaled)
    reference, average = masked(network, keep), AveragedModel(network)
    with caplog.at_level(logging.WARNING):
        plan = slim(network, keep, x, follow=average)
    stay = [f"layers.{place}" for place in scaled]
    assert plan.removed == {name: int((~mask).sum()) for name, mask in keep.items() if name not in stay}
    assert set(plan.kept_for) == set(stay) and str(stay) in caplog.text
    assert all("the captured graph does not show" in reason for reason in plan.kept_for.values())
    for training in (True, False):
        for each in (network, average):
            torch.testing.assert_close(each.train(training)(x), reference(x), rtol=1e-9, atol=1e-9)


def test_where_all_of_them_are_to_blame_the_error_says_so_and_nothing_is_changed() -> None:
    network, keep, x = build((0, 1, 2, 3, 4))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(VerificationError, match="would change its outputs"):
        slim(network, keep, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_it_is_given_up_after_some_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fscreen.slimming.apply._TRIALS", 1)
    network, keep, x = build((0,))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(VerificationError, match="would change its outputs"):
        slim(network, keep, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
