from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fscreen.ranking.budgeted import SCOPES, rank_and_prune
from lightning_fscreen.ranking.schedule import SCHEDULES

# Few distinct values, so that ties are common; infinities at both ends.
SCORES = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, math.inf, -math.inf]), st.floats(-1e6, 1e6, allow_nan=False, width=32)
)


@st.composite
def networks(draw, max_layers=5, max_size=12):
    sizes = draw(st.lists(st.integers(1, max_size), min_size=1, max_size=max_layers))
    scores = [draw(st.lists(SCORES, min_size=size, max_size=size)) for size in sizes]
    return {f"layer{index}": torch.tensor(values) for index, values in enumerate(scores)}


def everything(scores):
    return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}


def pruned(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


def feasible(scores, amount, floor):
    total = sum(score.numel() for score in scores.values())
    return total - round(amount * total) >= sum(min(floor, score.numel()) for score in scores.values())


def brute_force_global(scores, kept, amount, floor):
    """Sort the candidates that their layer can spare, and drop from the front."""
    names = list(scores)
    left = {n: sorted((float(scores[n][i]), i) for i in range(len(kept[n])) if kept[n][i]) for n in names}
    spare = [
        (score, Fraction(2 * i + 1, 2 * len(kept[n])), names.index(n), i)  # equal scores in turns
        for n in names
        for score, i in left[n][: max(len(left[n]) - floor, 0)]
    ]
    total = sum(mask.numel() for mask in kept.values())
    drop = max(round(amount * total) - pruned(kept), 0)
    result = {n: mask.clone() for n, mask in kept.items()}
    for _, _, layer, i in sorted(spare)[:drop]:
        result[names[layer]][i] = False
    return result


@settings(max_examples=300, deadline=None)
@given(networks(), st.floats(0, 1), st.integers(0, 4), st.randoms(use_true_random=False))
def test_global_pruning_equals_sorting_all_candidates(scores, amount, floor, random):
    kept = {n: torch.tensor([random.random() < 0.8 for _ in score]) for n, score in scores.items()}
    try:
        result = rank_and_prune(scores, kept, amount, min_kept=floor)
    except ValueError:
        total = sum(mask.numel() for mask in kept.values())
        floors = sum(min(floor, int(mask.sum())) for mask in kept.values())
        assert floors > total - round(amount * total)
        return
    expected = brute_force_global(scores, kept, amount, floor)
    assert all(torch.equal(result[n], expected[n]) for n in scores)


@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=300, deadline=None)
@given(networks(), st.floats(0, 1), st.integers(0, 4))
def test_the_budget_is_met_exactly_and_every_layer_keeps_its_floor(scope, scores, amount, floor):
    if not feasible(scores, amount, floor):
        with pytest.raises(ValueError, match="lower amount or the floor"):
            rank_and_prune(scores, everything(scores), amount, scope=scope, min_kept=floor)
        return
    result = rank_and_prune(scores, everything(scores), amount, scope=scope, min_kept=floor)
    assert pruned(result) == round(amount * sum(score.numel() for score in scores.values()))
    for name, score in scores.items():
        assert result[name].sum() >= min(floor, score.numel())


@settings(max_examples=200, deadline=None)
@given(networks(), st.floats(0, 1))
def test_layer_scope_prunes_the_same_fraction_of_every_layer_lowest_first(scores, amount):
    result = rank_and_prune(scores, everything(scores), amount, scope="layer", min_kept=0)
    total = sum(score.numel() for score in scores.values())
    fraction = round(amount * total) / total
    for name, score in scores.items():
        drop = int((~result[name]).sum())
        assert abs(drop - fraction * score.numel()) < 1
        order = sorted(range(len(score)), key=lambda i: (float(score[i]), i))
        assert sorted(torch.nonzero(~result[name]).flatten().tolist()) == sorted(order[:drop])


def test_what_a_floor_keeps_in_a_small_layer_is_taken_from_the_others():
    scores = {"tiny": torch.arange(4.0), "wide": torch.arange(96.0), "wider": torch.arange(100.0)}
    result = rank_and_prune(scores, everything(scores), 0.9, scope="layer", min_kept=4)
    assert result["tiny"].all()
    assert [int(mask.sum()) for mask in result.values()] == [4, 8, 8]


@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=200, deadline=None)
@given(networks(max_layers=7), st.integers(0, 3), st.sampled_from(sorted(SCHEDULES)), st.integers(1, 12), st.data())
def test_a_whole_schedule_never_unprunes_and_stays_within_one_of_the_budget(scope, scores, floor, name, epochs, data):
    amount = data.draw(st.floats(0, 0.99))
    if not feasible(scores, amount, floor):
        return
    total = sum(score.numel() for score in scores.values())
    kept = everything(scores)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(1, epochs + 1):
        step = amount * SCHEDULES[name](epoch / epochs)
        fresh = {n: score + torch.rand(score.shape, generator=generator) for n, score in scores.items()}
        after = rank_and_prune(fresh, kept, step, scope=scope, min_kept=floor)
        assert not any((after[n] & ~kept[n]).any() for n in scores)
        assert abs(pruned(after) - round(step * total)) <= 1
        assert all(after[n].sum() >= min(floor, after[n].numel()) for n in scores)
        kept = after


def test_many_small_steps_per_layer_stay_within_one_of_the_budget():
    """Shares by largest remainder are not monotone in the budget: a layer's share may grow while the budget falls."""
    worst = 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(1, 40, (12,), generator=generator).tolist()
        scores = {f"layer{i}": torch.rand(size, generator=generator) for i, size in enumerate(sizes)}
        kept, total = everything(scores), sum(sizes)
        for budget in range(1, total - len(sizes) + 1):
            kept = rank_and_prune(scores, kept, budget / total, scope="layer")
            worst = max(worst, abs(pruned(kept) - budget))
    assert worst <= 1


@pytest.mark.parametrize("scope", SCOPES)
def test_a_lower_amount_changes_nothing(scope):
    scores = {"a": torch.rand(20), "b": torch.rand(30)}
    once = rank_and_prune(scores, everything(scores), 0.6, scope=scope)
    again = rank_and_prune({n: torch.rand(s.shape) for n, s in scores.items()}, once, 0.3, scope=scope)
    assert all(torch.equal(once[n], again[n]) for n in scores)


@pytest.mark.parametrize("scope", SCOPES)
def test_arguments_are_left_alone_and_results_are_new(scope):
    scores = {"a": torch.rand(20), "b": torch.rand(30)}
    kept = everything(scores)
    for amount in (0.0, 0.5):
        result = rank_and_prune(scores, kept, amount, scope=scope)
        for mask in result.values():
            mask.zero_()
        assert all(mask.all() for mask in kept.values())


@pytest.mark.parametrize("units", [None, {"z": torch.arange(6), "a": torch.arange(6, 10), "b": torch.arange(10, 13)}])
def test_where_scores_tell_nothing_all_layers_lose_alike(units):
    scores = {"z": torch.ones(6), "a": torch.ones(4), "b": torch.tensor([1.0, 2.0, 3.0])}
    result = rank_and_prune(scores, everything(scores), 0.5, units=units)
    assert result["z"].tolist() == [False] * 3 + [True] * 3
    assert result["a"].tolist() == [False] * 2 + [True] * 2
    assert result["b"].tolist() == [False, True, True]


@pytest.mark.parametrize("scope", SCOPES)
def test_shapes_and_dtypes_of_layers_may_differ(scope):
    scores = {"conv": torch.rand(4, 3, 3, 3, dtype=torch.float64), "fc": torch.rand(5, 7), "half": torch.rand(8).half()}
    result = rank_and_prune(scores, everything(scores), 0.5, scope=scope)
    assert {n: mask.shape for n, mask in result.items()} == {n: score.shape for n, score in scores.items()}
    assert pruned(result) == round(0.5 * (108 + 35 + 8))


def test_infinite_scores_go_last():
    scores = {"a": torch.tensor([math.inf, 1.0, math.inf]), "b": torch.tensor([5.0, math.inf, 7.0])}
    result = rank_and_prune(scores, everything(scores), 0.5, min_kept=0)
    assert result["a"].tolist() == [True, False, True]
    assert result["b"].tolist() == [False, True, False]


@pytest.mark.parametrize("scope", SCOPES)
def test_nan_scores_are_an_error_that_names_the_layer(scope):
    scores = {"good": torch.rand(5), "bad.fc": torch.tensor([1.0, math.nan])}
    with pytest.raises(ValueError, match="'bad.fc'.*NaN"):
        rank_and_prune(scores, everything(scores), 0.5, scope=scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_scores_of_candidates_that_are_pruned_already_do_not_matter(scope):
    """As `criteria.Criterion` promises to those who write one."""
    scores = {"a": torch.tensor([math.nan, 1.0, 2.0, 3.0]), "b": torch.tensor([1.0, 4.0, 5.0, -math.inf])}
    kept = {"a": torch.tensor([False, True, True, True]), "b": torch.tensor([True, True, True, False])}
    result = rank_and_prune(scores, kept, 0.5, scope=scope)
    assert result["a"].tolist() == [False, False, True, True]
    assert result["b"].tolist() == [False, True, True, False]


def test_impossible_floors_are_an_error_that_names_the_numbers():
    scores = {"a": torch.rand(10), "b": torch.rand(10)}
    with pytest.raises(ValueError, match=r"amount=0\.9 would keep 2 of 20.*at least 3 in each of 2 layers makes 6"):
        rank_and_prune(scores, everything(scores), 0.9, min_kept=3)


def test_an_unknown_scope_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="'group'.*global.*layer"):
        rank_and_prune({"a": torch.rand(2)}, {"a": torch.ones(2, dtype=torch.bool)}, 0.5, scope="group")
