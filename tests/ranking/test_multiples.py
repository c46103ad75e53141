"""Units in groups, by hand and against what every subset of groups leaves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fscreen.ranking.budgeted import check_floors, rank_and_prune
from lightning_fscreen.ranking.multiples import Blocks, check_rounding, in_multiples


def blocks(step, others=0, **numbers):
    """All units of a layer in one block, unless given."""
    found = {name: torch.full((size,), number) for number, (name, size) in enumerate(numbers.items())}
    return Blocks(found, torch.full((len(numbers),), step), torch.full((len(numbers),), others), step)


def whole(**sizes):
    return {name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()}


def test_groups_by_hand():
    """The largest multiple below 10 is 8: the two worst are a group; of 3 none is below, and they stay."""
    scores = {"a": torch.tensor([5.0, 9, 8, 7, 6, 4, 0, 3, 2, 1]), "b": torch.ones(3)}
    units = {"a": torch.arange(10), "b": torch.arange(10, 13)}
    found = in_multiples(scores, whole(a=10, b=3), units, blocks(4, a=10, b=3))
    groups = [found["a"][list(members)] for members in ((1, 2, 3, 4), (0, 5, 7, 8), (9, 6))]
    assert all(len(group.unique()) == 1 for group in groups) and len(torch.stack([g[0] for g in groups]).unique()) == 3
    assert found["b"].tolist() == [-1] * 3
    assert in_multiples(scores, whole(a=10, b=3), units, None) is units
    beside = Blocks({name: torch.zeros_like(own) for name, own in units.items()}, *torch.tensor([[4], [1]]), 4)
    found = in_multiples({"a": scores["a"]}, whole(a=10), {"a": units["a"]}, beside)["a"]  # one of the others stays
    assert found[[1, 2, 3]].tolist() == [-1] * 3 and [int((found == each).sum()) for each in found[[4, 9]]] == [4, 3]


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 3), st.integers(0, 9), st.floats(0, 1), st.randoms())
@settings(max_examples=60)
def test_whatever_is_pruned_leaves_multiples_in_nested_rounds(size, step, others, stays, amount, rng):
    """Units of two candidates in coupled layers, some of which stay; those beside the kept ones count."""
    others, stays = others % step, min(stays, size)
    labels = torch.arange(size)
    labels[torch.randperm(size, generator=torch.Generator().manual_seed(rng.randrange(99)))[:stays]] = -1
    units, kept = {"a": labels, "b": labels}, whole(a=size, b=size)
    own = Blocks({name: torch.zeros(size, dtype=torch.int64) for name in "ab"}, *torch.tensor([[step], [others]]), step)
    for share in (amount / 2, amount):
        scores = {name: torch.tensor([rng.random() for _ in range(size)]) for name in "ab"}
        before = kept
        try:
            kept = rank_and_prune(scores, kept, share, units=units, blocks=own)
        except ValueError as error:
            assert "in multiples of round_to" in str(error)
            return
        assert torch.equal(kept["a"], kept["b"]) and not bool((kept["a"] & ~before["a"]).any())
        left = int(kept["a"][labels >= 0].sum())
        assert left == size - stays or ((left + others) % step == 0 and left + stays > 0)
        assert abs(left - (size - stays - share * size)) <= step + others


def test_what_one_layer_misses_others_make_up_for():
    """40 % of 32 are 13 each, of which the nearest multiple is 16."""
    sizes = {name: 32 for name in "abcdef"}
    units = dict(zip(sizes, torch.arange(6 * 32).split(32), strict=True))
    scores = {name: torch.rand(32, generator=torch.Generator().manual_seed(0)) for name in sizes}
    masks = rank_and_prune(scores, whole(**sizes), 0.4, scope="layer", units=units, blocks=blocks(8, **sizes))
    left = [int(mask.sum()) for mask in masks.values()]
    assert set(left) == {16, 24} and abs(sum(left) - 0.6 * 6 * 32) <= 4


def test_floors_count_multiples():
    units = {"a": torch.arange(16), "b": torch.arange(16, 20)}
    check_floors({"a": 16, "b": 4}, 0.5, 1, units, blocks(8, a=16, b=4))  # 12 are as near to 10 as multiples come
    with pytest.raises(
        ValueError, match=r"1 in each of 2 layers \(in multiples of round_to=8, or whole\) makes 12; lower amount"
    ):
        check_floors({"a": 16, "b": 4}, 0.7, 1, units, blocks(8, a=16, b=4))


def test_nothing_to_round_is_refused():
    units = {"a": torch.arange(16), "b": torch.arange(16, 20)}
    check_rounding(units, blocks(8, a=16, b=4))
    check_rounding(units, None)
    with pytest.raises(ValueError, match=r"round_to=16 leaves nothing to prune.*the largest has 16.*lower round_to"):
        check_rounding(units, blocks(16, a=16, b=4))
