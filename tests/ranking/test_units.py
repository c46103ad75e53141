"""Ranking of units against a search over all of them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fscreen.ranking.budgeted import rank_and_prune
from lightning_fscreen.ranking.units import Units


@st.composite
def layers(draw):
    """Scores, masks and units of two or three small layers; units are pruned as one already."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=3))
    labels = [draw(st.lists(st.integers(-1, 5), min_size=size, max_size=size)) for size in sizes]
    pruned = draw(st.sets(st.integers(0, 5), max_size=2))
    scores = [draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)) for size in sizes]
    names = [f"layer{index}" for index in range(len(sizes))]
    kept = {n: torch.tensor([label not in pruned for label in own]) for n, own in zip(names, labels, strict=True)}
    return (
        {name: torch.tensor(own, dtype=torch.float32) for name, own in zip(names, scores, strict=True)},
        kept,
        {name: torch.tensor(own) for name, own in zip(names, labels, strict=True)},
    )


@given(layers(), st.integers(0, 2), st.integers(0, 12))
def test_units_share_their_fate_and_the_drop_is_as_near_as_first_fit_comes(case, min_kept, count):
    scores, kept, units = case
    ranked = Units(scores, kept, units, min_kept)
    masks = ranked.drop(count)
    flat = torch.cat(list(units.values()))
    before, after = torch.cat(list(kept.values())), torch.cat(list(masks.values()))
    assert not bool((after & ~before).any())
    assert torch.equal(after[flat < 0], before[flat < 0])
    for unit in flat[flat >= 0].unique():
        members = (flat == unit) & before
        assert not bool(members.any()) or len(after[members].unique()) == 1
    for name, mask in masks.items():
        assert int(mask.sum()) >= min(min_kept, int(kept[name].sum()))
    dropped = int((before & ~after).sum())
    sizes = torch.bincount(flat[(flat >= 0) & before], minlength=1)
    if dropped > count:  # only by less than what would have been missing otherwise
        assert dropped - count < int(sizes.max())
    if int(sizes.max()) <= 1:
        assert dropped == min(count, ranked.left - ranked.protected)


def test_lowest_mean_scores_go_first_and_too_large_units_are_passed_over():
    scores = {"a": torch.tensor([1.0, 1.0, 5.0]), "b": torch.tensor([1.0, 2.0, 3.0])}
    units = {"a": torch.tensor([0, 1, 2]), "b": torch.tensor([0, 3, 4])}
    kept = {name: torch.ones(3, dtype=torch.bool) for name in scores}
    masks = Units(scores, kept, units, 1).drop(1)
    assert masks["a"].tolist() == [True, False, True] and masks["b"].all()
    masks = Units(scores, kept, units, 1).drop(2)
    assert masks["a"].tolist() == [False, True, True] and masks["b"].tolist() == [False, True, True]
    masks = Units(scores, kept, units, 1).drop(3)
    assert masks["a"].tolist() == [False, False, True] and masks["b"].tolist() == [False, True, True]


@given(layers(), st.sampled_from(["global", "layer"]), st.sampled_from([0.0, 0.2, 0.5, 0.9]))
def test_without_coupling_units_change_nothing(case, scope, amount):
    scores, kept, _ = case
    start = itertools.accumulate([0, *(len(mask) for mask in kept.values())])
    alone = {name: torch.arange(len(mask)) + first for (name, mask), first in zip(kept.items(), start, strict=False)}
    try:
        expected = rank_and_prune(scores, kept, amount, scope=scope)
    except ValueError as error:
        with pytest.raises(ValueError, match="would keep"):
            rank_and_prune(scores, kept, amount, scope=scope, units=alone)
        assert "would keep" in str(error)
        return
    masks = rank_and_prune(scores, kept, amount, scope=scope, units=alone)
    assert all(torch.equal(masks[name], expected[name]) for name in kept)
