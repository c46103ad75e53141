"""Widths after pruning in multiples, on the modules' shapes, and the masked network as the oracle of their outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_fscreen.candidates.costs import Currency
from lightning_fscreen.candidates.units import Units
from lightning_fscreen.costs.size import measure_size
from lightning_fscreen.ranking.per_cost import prune_to_cost
from lightning_fscreen.slimming.gates import capture_training
from lightning_fscreen.slimming.slim import heads_in, switch_off
from tests.candidates.test_costs import count
from tests.slimming import difference, outputs
from tests.slimming.attentions import Attention
from tests.slimming.masked import CASES, Case, cases, dags


def widths(network: nn.Module) -> dict[tuple[str, int], int]:
    """Of all linear and convolution layers."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | _ConvNd)}
    return {(name, dim): layer.weight.shape[dim] for name, layer in layers.items() for dim in (0, 1)}


def prune(
    units: Units, network: nn.Module, x: Tensor, amount: float, budget: Currency, seed: int = 0
) -> tuple[dict[str, Tensor], float]:
    """Masks of two rounds, the second of which goes on from the first; and their cost."""
    before = measure_size(network, ((x,), {}), len(x))
    costs, numbers = units.costs(before, budget), units.units()
    assert costs is not None and numbers is not None
    dense = getattr(before, budget)
    generator = torch.Generator().manual_seed(seed)
    kept = {name: torch.ones(own.shape, dtype=torch.bool) for name, own in numbers.items()}
    for share in (amount / 2, amount):
        scores = {name: torch.rand(own.shape, generator=generator) for name, own in numbers.items()}
        found = prune_to_cost(
            scores, kept, costs, (1 - share) * dense, dense, units=numbers, blocks=units.blocks(), min_kept=1
        )
        assert not any(bool((mask & ~kept[name]).any()) for name, mask in found.items())
        kept = found
    return kept, costs.of(kept)


def check_widths(network: nn.Module, dense: nn.Module, round_to: int, listed: dict[str, str]) -> None:
    """All are multiples, or as they were, or listed with the reason."""
    before = widths(dense)
    for (name, dim), width in widths(network).items():
        if width % round_to and width != before[name, dim]:
            assert "cannot be pruned" in listed[name] or "joined" in listed[name]


@settings(max_examples=max(CASES // 8, 1), deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(st.one_of(cases(), dags()), st.sampled_from([2, 3, 4]), st.floats(0.1, 0.6), st.sampled_from(["params", "macs"]))
def test_random_networks(case: Case, round_to: int, amount: float, budget: Currency) -> None:
    network, x = case.network, case.example
    units = Units(network, None, None, bias=case.bias, round_to=round_to)  # type: ignore[arg-type]
    try:
        units.learn(network, (x,), {})
        masks, cost = prune(units, network, x, amount, budget)
    except ValueError as error:  # nothing to prune, or not so much
        assume("nothing to prune" not in str(error) and "cannot go" not in str(error))
        raise
    dense, listed = copy.deepcopy(network), units.not_rounded(masks)
    masked = copy.deepcopy(network)
    heads = heads_in(masked, capture_training(masked, (x,), {}), masks)
    switch_off(masked, masks, case.bias, heads)  # type: ignore[arg-type]
    plan = units.slim(network, (x,), {}, masks)
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9
    if not plan.sizes:  # else sizes are written into forward, which only verification finds out
        check_widths(network, dense, round_to, listed)
        assert cost == pytest.approx(count(network, x)[budget])


class Tiny(nn.Module):
    """Squeeze-and-excitation of 4, convolutions in two groups, heads of 6 channels, an input beside the features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.squeeze, self.excite = nn.Conv2d(32, 4, 1), nn.Conv2d(4, 32, 1)
        self.grouped, self.wide = nn.Conv2d(32, 48, 3, groups=2), nn.Conv2d(48, 30, 1)
        self.attend = Attention(48, 8, 6, 8, "matmul", "attributes", True, True, "scale", causal=False)
        self.joined, self.head = nn.Linear(30 + 5, 40), nn.Linear(40, 10)
        self.embed = nn.Linear(30, 48)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x)).relu()
        h = h * self.excite(self.squeeze(h.mean((2, 3), keepdim=True)).relu()).sigmoid()
        h = self.wide(self.grouped(h).relu()).relu().flatten(2).transpose(1, 2)
        tokens = self.attend(self.embed(h)).mean((1, 2), keepdim=True).flatten(1)
        both = torch.cat([h.mean(1), x[:, 0, 0, :5]], 1)
        out: Tensor = self.head(self.joined(both).relu()) + tokens
        return out


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_every_kind_of_width(budget: Currency) -> None:
    torch.manual_seed(0)
    network, x = Tiny(), torch.randn(3, 1, 8, 8)
    units = Units(network, None, None, round_to=8)
    units.learn(network, (x,), {})
    blocks = units.blocks()
    assert blocks is not None
    steps = {name: int(blocks.steps[own[0]]) for name, own in blocks.numbers.items()}
    assert (steps["joined"], steps["grouped"], steps["attend"]) == (8, 4, 4)  # both groups, heads of 6 channels
    dense, before = copy.deepcopy(network), count(network, x)[budget]
    masks, cost = prune(units, network, x, 0.5, budget)
    listed = units.not_rounded(masks)
    units.slim(network, (x,), {}, masks)
    assert cost == count(network, x)[budget] == pytest.approx(before / 2, abs=0.02 * before)
    check_widths(network, dense, 8, listed)
    found = widths(network)
    assert found["squeeze", 0] == 4 and found["joined", 1] == found["wide", 0] + 5 < 35
    assert listed["squeeze"] == listed["excite"] == "a width of 4 is less than round_to=8"
    assert listed["joined"] == f"5 of the {found['joined', 1]} that are left of a width cannot be pruned"
    assert set(listed) == {"squeeze", "excite", "joined"}


def test_a_stream_that_only_batch_norms_read_keeps_channels_that_nobody_reads() -> None:
    """Every batch norm selects 4 of 8; what both have selected may be 5 to 7."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norms = nn.Conv2d(1, 16, 3), nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])
            self.convs = nn.ModuleList([nn.Conv2d(16, 3, 1), nn.Conv2d(16, 3, 1)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            first, second = (conv(norm(x)) for conv, norm in zip(self.convs, self.norms, strict=True))
            out: Tensor = first + second
            return out

    network, x = Stream(), torch.randn(2, 1, 6, 6)
    units = Units(network, None, None, round_to=4)
    units.learn(network, (x,), {})
    chosen = torch.arange(16)
    masks = {"norms.0": chosen < 4, "norms.1": (chosen > 0) & (chosen < 5)}
    masked = copy.deepcopy(network)
    switch_off(masked, masks, "zero")
    plan = units.slim(network, (x,), {}, masks)
    assert network.stem.weight.shape[0] == 8 and plan.removed["stem"] == 8
    assert [conv.weight.shape[1] for conv in network.convs] == [4, 4]  # type: ignore[union-attr,index]
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9
