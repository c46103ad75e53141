from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import f as f_distribution
from scipy.stats import rankdata

from lightning_fscreen.functional import f_critical
from lightning_fscreen.ranking.criteria import CRITERIA, ScoringContext, ScoringInputs
from tests.ranking.test_criteria import layers, same_order, score


def same_kept_order(one, other, layers):
    """Whether candidates that are left come in the same order."""
    kept = torch.cat([layer.kept.flatten() for layer in layers.values()])
    one, other = (torch.cat([score.flatten() for score in scores.values()])[kept] for scores in (one, other))
    return torch.equal(one.argsort(stable=True), other.argsort(stable=True))


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_screening_is_the_fused_formula_over_the_means_of_what_is_left(seed, screening_weight):
    given_layers = layers(seed)
    w = {n: layer.weight.numpy() for n, layer in given_layers.items()}
    k = {n: layer.kept.numpy() for n, layer in given_layers.items()}
    f = {n: np.broadcast_to(layer.f.numpy(), w[n].shape) for n, layer in given_layers.items()}
    mean_w = np.concatenate([abs(w[n])[k[n]] for n in w]).mean()
    mean_f = np.concatenate([f[n][k[n]] for n in w]).mean()
    scores = score("screening_sum", given_layers, screening_weight)
    for n in w:
        expected = screening_weight * f[n] / mean_f + (1 - screening_weight) * abs(w[n]) / mean_w
        np.testing.assert_allclose(scores[n], expected, rtol=1e-12, atol=1e-300)  # λ may be subnormal


FUSIONS = ["screening", "screening_product", "screening_rank", "screening_sum"]


@pytest.mark.parametrize("name", FUSIONS)
def test_zero_screening_weight_ranks_by_magnitude_and_asks_for_no_statistics(name):
    without = {n: ScoringInputs(layer.weight, layer.kept) for n, layer in layers().items()}
    assert same_kept_order(score(name, without, 0.0), {n: layer.weight.abs() for n, layer in without.items()}, without)
    assert not CRITERIA[name].needs_statistics(0.0)
    assert CRITERIA[name].needs_statistics(1e-9)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        *[("screening", [0.25, 0.75]), ("connected_magnitude", [0.0, 0.25, 0.75, 1.0])],
        *[("magnitude", []), ("screening_sum", [])],
    ],
)
def test_which_criteria_let_idle_connections_go_first(name, weights):
    assert [weight for weight in (0.0, 0.25, 0.75, 1.0) if CRITERIA[name].idle_first(weight)] == weights


@pytest.mark.parametrize("name", FUSIONS)
def test_full_screening_weight_ranks_by_f_alone(name):
    given_layers = layers()
    by_f = {n: layer.f.expand(layer.weight.shape) for n, layer in given_layers.items()}
    assert same_kept_order(score(name, given_layers, 1.0), by_f, given_layers)


def test_the_sum_does_not_depend_on_the_units_of_weights_or_f():
    given_layers = layers()
    scaled = {n: replace(layer, weight=layer.weight * 1e-3, f=layer.f * 1e5) for n, layer in given_layers.items()}
    one, other = score("screening_sum", given_layers), score("screening_sum", scaled)
    for n in given_layers:
        torch.testing.assert_close(one[n], other[n])


def test_what_is_pruned_already_does_not_move_the_scores_of_the_others():
    given_layers = layers()
    changed = {
        n: ScoringInputs(
            torch.where(layer.kept, layer.weight, 0.0),
            layer.kept,
            torch.where(layer.kept, layer.f.expand(layer.weight.shape), 1.0),
        )
        for n, layer in given_layers.items()
    }
    one, other = score("screening_sum", given_layers), score("screening_sum", changed)
    for n, layer in given_layers.items():
        torch.testing.assert_close(one[n][layer.kept], other[n][layer.kept])


def test_infinite_f_counts_as_the_largest_finite_one():
    weight, kept = torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool)
    infinite = {"a": ScoringInputs(weight, kept, torch.tensor([[1.0, math.inf, 3.0, 2.0]]))}
    replaced = {"a": ScoringInputs(weight, kept, torch.tensor([[1.0, 3.0, 3.0, 2.0]]))}
    assert torch.equal(score("screening_sum", infinite)["a"], score("screening_sum", replaced)["a"])


def test_infinite_f_everywhere_leaves_the_order_to_magnitude():
    given_layers = {
        n: ScoringInputs(layer.weight, layer.kept, torch.full_like(layer.weight, math.inf))
        for n, layer in layers().items()
    }
    scores = score("screening_sum", given_layers, 0.5)
    assert all(torch.isfinite(values).all() for values in scores.values())
    assert same_order(scores, {n: layer.weight.abs() for n, layer in given_layers.items()})


def test_infinite_f_ranks_above_features_that_say_nothing():
    """Perfect separation beside constant features, as with no more instances than classes."""
    kept = torch.ones(1, 3, dtype=torch.bool)
    layer = ScoringInputs(torch.ones(1, 3), kept, torch.tensor([[0.0, math.inf, 0.0]]))
    scores = score("screening_sum", {"a": layer}, 0.5)["a"]
    assert scores[0, 1] > scores[0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_f_is_ranked_whatever_the_dtype_of_the_weights(dtype):
    f = torch.tensor([[1e5, 3e5, 2e5, 1e6]], dtype=torch.float64)
    given_layers = {"a": ScoringInputs(torch.ones(2, 4, dtype=dtype), torch.ones(2, 4, dtype=torch.bool), f)}
    assert score("screening_sum", given_layers, 1.0)["a"][0].argsort().tolist() == [0, 2, 1, 3]


def test_screening_without_statistics_is_an_error_that_names_the_layer():
    given_layers = layers()
    given_layers["conv"] = ScoringInputs(given_layers["conv"].weight, given_layers["conv"].kept)
    with pytest.raises(ValueError, match="'conv'"):
        score("screening_sum", given_layers)


def test_screening_lets_magnitude_decide_among_relevant_features_and_keeps_silent_ones_in_order_of_their_weights():
    kept = torch.ones(1, 5, dtype=torch.bool)
    weight = torch.tensor([[0.1, 2.0, 3.0, 1.0, 0.5]])
    f = torch.tensor([[9000.0, 5000.0, 1000.0, 1.4, 0.9]])
    layer = ScoringInputs(weight, kept, f, (9.0, 50_000.0))
    assert score("screening", {"a": layer}, 0.5)["a"][0].argsort().tolist() == [4, 3, 0, 1, 2]
    trusted = replace(layer, learned=torch.tensor(True))
    assert score("screening", {"a": trusted}, 0.5)["a"][0].argsort().tolist() == [0, 4, 3, 1, 2]
    dead = replace(trusted, mean_square=torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]]))
    assert score("screening", {"a": dead}, 0.5)["a"][0].argsort().tolist() == [2, 0, 4, 3, 1]


def test_silent_features_rank_like_the_others_when_pruning_begins():
    given_layers = layers()
    for n, scores in CRITERIA["screening"].score(ScoringContext(given_layers, 0.25, progress=0.0)).items():
        assert torch.equal(scores, given_layers[n].weight.abs())


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1, exclude_min=True, exclude_max=True), st.floats(0, 1))
def test_screening_is_its_formula(seed, screening_weight, progress):
    given_layers = layers(seed)
    for n, scores in (
        CRITERIA["screening"].score(ScoringContext(given_layers, screening_weight, progress=progress)).items()
    ):
        layer = given_layers[n]
        ratio = np.broadcast_to(layer.f.numpy() / f_distribution.isf(1e-3, *layer.degrees), scores.shape)
        shrunken = np.where(ratio > 1, 1, 10 ** (-3 * progress))
        expected = layer.weight.abs().numpy() ** (1 - screening_weight) * shrunken**screening_weight
        expected **= 1 / max(screening_weight, 1 - screening_weight)
        clear = abs(ratio - 1) > 0.02  # of the critical value, which is approximated
        np.testing.assert_allclose(scores.numpy()[clear], expected[clear], rtol=1e-9, atol=1e-300)


def test_product_is_the_geometric_mean_with_f():
    given_layers = layers()
    for n, values in score("screening_product", given_layers, 1 / 3).items():
        layer = given_layers[n]
        f = layer.f.expand(layer.weight.shape)
        torch.testing.assert_close(values, layer.weight.abs() ** (2 / 3) * f ** (1 / 3))


def test_rank_sums_the_ranks_among_what_is_left():
    given_layers = layers()
    scores = score("screening_rank", given_layers, 0.3)
    kept = np.concatenate([layer.kept.numpy().ravel() for layer in given_layers.values()])
    w = np.concatenate([abs(layer.weight.numpy()).ravel() for layer in given_layers.values()])[kept]
    f = np.concatenate([layer.f.expand(layer.weight.shape).numpy().ravel() for layer in given_layers.values()])[kept]
    expected = 0.3 * (rankdata(f, "min") - 1) + 0.7 * (rankdata(w, "min") - 1)
    found = np.concatenate([values.numpy().ravel() for values in scores.values()])[kept]
    np.testing.assert_allclose(found, expected / len(w))


@pytest.mark.parametrize("name", FUSIONS)
def test_infinite_f_is_never_nan(name):
    given_layers = {n: replace(layer, f=torch.full_like(layer.f, math.inf)) for n, layer in layers().items()}
    for screening_weight in (0.0, 0.3):
        for values in score(name, given_layers, screening_weight).values():
            assert torch.isfinite(values).all()


@pytest.mark.parametrize("level", [0.05, 1e-3])
@pytest.mark.parametrize("between", [1, 3, 9, 99])
@pytest.mark.parametrize("within", [20, 60, 1000, 50_000, math.inf])
def test_the_critical_value_is_that_of_the_f_distribution(level, between, within):
    exact = f_distribution.isf(level, between, within if math.isfinite(within) else 1e9)
    assert f_critical(level, between, within) == pytest.approx(exact, rel=0.05)


def test_too_few_instances_make_nothing_significant():
    assert f_critical(1e-3, 9, 1) == math.inf
    kept = torch.ones(1, 3, dtype=torch.bool)
    scores = score(
        "screening", {"a": ScoringInputs(torch.ones(1, 3), kept, torch.tensor([[3.0, 1.0, 2.0]]), (9.0, 1.0))}, 0.5
    )
    assert torch.isfinite(scores["a"]).all()
