"""Masks that meet a cost, against costs computed by hand and small searches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_fscreen.ranking.budgeted import SCOPES, Scope
from lightning_fscreen.ranking.per_cost import check_target, prune_to_cost, shares

WIDTHS = {"a": 12, "b": 8, "c": 10}


class Chain:
    """Three layers in a row behind an input of 3: a · 3 + b · a + c · b values, and what is not pruned."""

    def __init__(self, rest: float = 20.0) -> None:
        self.rest, self.asked = rest, 0

    def of(self, kept: dict[str, Tensor]) -> float:
        self.asked += 1
        a, b, c = (int(kept[name].sum()) for name in "abc")
        return self.rest + 3 * a + a * b + b * c

    def priced(self, kept: dict[str, Tensor]) -> tuple[float, dict[str, Tensor], Tensor]:
        a, b, c = (int(kept[name].sum()) for name in "abc")
        each = {"a": 3 + b, "b": a + c, "c": b}
        prices = {name: torch.full((width,), float(each[name])) for name, width in WIDTHS.items()}
        return self.of(kept), prices, torch.empty(0)

    def streams(self, units: dict[str, Tensor]) -> Tensor:
        return torch.empty(2, 0, dtype=torch.int64)


def world(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(width, generator=generator) for name, width in WIDTHS.items()}
    kept = {name: torch.ones(width, dtype=torch.bool) for name, width in WIDTHS.items()}
    return scores, kept, dict(zip(WIDTHS, torch.arange(30).split(list(WIDTHS.values())), strict=True))


KINDS = {"a": "x", "b": "x", "c": "y"}
DENSE = Chain().of(world()[1])


@given(st.integers(0, 99), st.floats(0, 0.85), st.sampled_from(SCOPES))
def test_the_cost_is_met_with_the_best_of_every_layer(seed: int, amount: float, scope: Scope) -> None:
    scores, kept, units = world(seed)
    target = (1 - amount) * DENSE
    masks = prune_to_cost(scores, kept, Chain(), target, DENSE, units=units, scope=scope, kinds=KINDS)
    assert abs(Chain().of(masks) - target) <= (12 + 10) / 2  # half of the most that a unit costs
    for name, mask in masks.items():
        assert bool(mask[scores[name].argmax()])


def test_what_is_worth_least_for_its_price_goes_first() -> None:
    """In a layer the lowest; between layers of equal scores the one whose units cost more, until it is narrower."""
    _, kept, units = world()
    scores = {name: torch.ones(width) for name, width in WIDTHS.items()}
    masks = prune_to_cost(scores, kept, Chain(), 0.6 * DENSE, DENSE, units=units)
    left = {name: int(mask.sum()) for name, mask in masks.items()}
    # Equal scores: Σ (width / what is left)⁴ is to be as small as possible for the cost, which a search over all finds.
    options = [
        {"a": a, "b": b, "c": c}
        for a, b, c in itertools.product(range(1, 13), range(1, 9), range(1, 11))
        if 20 + 3 * a + a * b + b * c <= 20 + 3 * left["a"] + left["a"] * left["b"] + left["b"] * left["c"]
    ]

    def lost(widths: dict[str, int]) -> float:
        return sum((width / widths[name]) ** 4 for name, width in WIDTHS.items())

    assert lost(left) <= 1.1 * min(map(lost, options))


def test_nothing_comes_back_and_a_met_cost_changes_nothing() -> None:
    scores, kept, units = world()
    kept["a"][scores["a"].argmax()] = False
    before = Chain().of(kept)
    masks = prune_to_cost(scores, kept, Chain(), 0.7 * DENSE, DENSE, units=units)
    assert all(not bool((mask & ~kept[name]).any()) for name, mask in masks.items())
    again = prune_to_cost(scores, masks, Chain(), before, DENSE, units=units)
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())


def test_coupled_units_go_together_and_negative_ones_stay() -> None:
    scores, kept, units = world()
    units["b"], units["c"] = torch.arange(12, 20), torch.cat([torch.arange(12, 20), torch.tensor([-1, -1])])
    masks = prune_to_cost(scores, kept, Chain(), 0.4 * DENSE, DENSE, units=units)
    assert torch.equal(masks["b"], masks["c"][:8]) and bool(masks["c"][8:].all()) and not bool(masks["b"].all())


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_floors_hold(scope: str) -> None:
    scores, kept, units = world()
    options = {"units": units, "min_kept": 5, "scope": scope}
    masks = prune_to_cost(scores, kept, Chain(), 0.5 * DENSE, DENSE, **options)  # type: ignore[arg-type]
    for name, mask in masks.items():
        assert bool(mask[scores[name].argsort()[-5:]].all())
    least = 20 + 15 + 25 + 25
    with pytest.raises(
        ValueError, match=rf"amount=0.8 .* 5 in each of 3 layers .* lower amount to {1 - least / DENSE:.4g}"
    ):
        prune_to_cost(scores, kept, Chain(), 0.2 * DENSE, DENSE, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"amount=0.8 .* lower amount to"):
        check_target(kept, Chain(), 0.2 * DENSE, DENSE, units, 5)
    check_target(kept, Chain(), 0.4 * DENSE, DENSE, units, 5)


def test_the_same_fraction_of_every_layer() -> None:
    scores, kept, units = world()
    masks = prune_to_cost(scores, kept, Chain(), 0.4 * DENSE, DENSE, units=units, scope="layer")
    fractions = [1 - float(mask.float().mean()) for mask in masks.values()]
    assert max(fractions) - min(fractions) <= 1 / 8 + 1e-6  # a unit of the smallest layer


def test_nan_scores_are_refused() -> None:
    scores, kept, units = world()
    scores["b"][3] = float("nan")
    with pytest.raises(ValueError, match="'b' contain NaN"):
        prune_to_cost(scores, kept, Chain(), 0.5 * DENSE, DENSE, units=units)


def test_few_costs_are_asked_for() -> None:
    scores, kept, units = world()
    costs = Chain()
    prune_to_cost(scores, kept, costs, 0.5 * DENSE, DENSE, units=units)
    assert costs.asked < 40


def test_shares_by_hand() -> None:
    kept = torch.tensor([True, True, False, True, True])
    scores = torch.tensor([2.0, 1.0, 9.0, 3.0, torch.inf])
    whole = (4 + 1 + 9) * 5 / 4  # with the mean in the place of the one that is gone
    expected = [4 / 13 * (whole / 13) ** 4, 1 / 14 * (whole / 14) ** 4, 0.0, (whole / 9) ** 4, torch.inf]
    assert shares(scores, kept).tolist() == pytest.approx(expected)
    assert shares(torch.tensor([-1.0, 0.0, 1.0]), torch.ones(3, dtype=torch.bool)).tolist() == pytest.approx(
        [0, 0.2, 1.25**4]
    )
    assert not bool(shares(torch.zeros(3), torch.ones(3, dtype=torch.bool)).any())


def test_large_units_that_fit_no_more_are_swapped_for_smaller_ones() -> None:
    """The lowest-ranked units are too few or too many; the second of them alone is just enough."""

    class Sum:
        def __init__(self) -> None:
            self.sizes = {"a": torch.tensor([7.0, 80.0]), "b": torch.tensor([10.0, 80.0])}

        def of(self, kept: dict[str, Tensor]) -> float:
            return float(sum(self.sizes[name][mask].sum() for name, mask in kept.items()))

        def priced(self, kept: dict[str, Tensor]) -> tuple[float, dict[str, Tensor], Tensor]:
            return self.of(kept), self.sizes, torch.empty(0)

        def streams(self, units: dict[str, Tensor]) -> Tensor:
            return torch.empty(2, 0, dtype=torch.int64)

    kept = {name: torch.ones(2, dtype=torch.bool) for name in "ab"}
    scores = {"a": torch.tensor([1.0, 9.0]), "b": torch.tensor([2.0, 9.0])}
    units = {"a": torch.tensor([0, 1]), "b": torch.tensor([2, 3])}
    masks = prune_to_cost(scores, kept, Sum(), 167.0, 177.0, units=units)  # type: ignore[arg-type]
    assert masks["a"].all() and masks["b"].tolist() == [False, True]


class Stream:
    """Eight channels of a stream that cost 100 each as long as one of two layers reads them, and a layer beside it."""

    def of(self, kept: dict[str, Tensor]) -> float:
        read = kept["first"] | kept["second"]
        return float(sum(mask.sum() for mask in kept.values()) + 100 * read.sum() + 59 * kept["beside"].sum())

    def priced(self, kept: dict[str, Tensor]) -> tuple[float, dict[str, Tensor], Tensor]:
        both = kept["first"] & kept["second"]
        prices = {"first": 1 + 100.0 * ~both, "second": 1 + 100.0 * ~both, "beside": torch.full((8,), 60.0)}
        return self.of(kept), prices, torch.where(both, 100.0, 0.0)

    def streams(self, units: dict[str, Tensor]) -> Tensor:
        return torch.cat([torch.stack([torch.arange(8), units[name]]) for name in ("first", "second")], dim=1)


@pytest.mark.parametrize("worst", [2, 5])
@pytest.mark.parametrize("stays", [False, True])
def test_a_channel_of_a_stream_goes_with_all_that_read_it(worst: int, stays: bool) -> None:
    """Neither of its readers is worth least by itself; but together with the channel they cost most."""
    scores = {"first": torch.full((8,), 2.0), "second": torch.full((8,), 2.0), "beside": torch.ones(8)}
    scores["first"][worst] = scores["second"][worst] = 1.0
    scores["first"][0] = scores["second"][7] = 0.1  # alone
    kept = {name: torch.ones(8, dtype=torch.bool) for name in scores}
    units = dict(zip(scores, torch.arange(24).split(8), strict=True))
    units["second"][worst] = -1 if stays else units["second"][worst]
    dense = Stream().of(kept)
    masks = prune_to_cost(scores, kept, Stream(), dense - 104, dense, units=units)  # type: ignore[arg-type]
    gone = {name: set((~mask).nonzero().flatten().tolist()) for name, mask in masks.items()}
    assert gone["first"] & gone["second"] == ({0} if stays else {worst})  # the next best, if not the worst
    assert 0 in gone["first"] and 7 in gone["second"] and not gone["beside"]
