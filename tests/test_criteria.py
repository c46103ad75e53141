from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fscreen.criteria import CRITERIA, Ranked, register_criterion, resolve_criterion


def layers(seed=0, dtype=torch.float64):
    """A linear layer with F per input, a convolution with F per weight; some candidates are pruned already."""
    rng = torch.Generator().manual_seed(seed)

    def ranked(shape, f_shape):
        kept = torch.rand(shape, generator=rng) > 0.3
        weight = torch.randn(shape, generator=rng).to(dtype)
        f = torch.rand(f_shape, generator=rng, dtype=torch.float64).exp() * 50
        return Ranked(weight * kept, kept, f)

    return {"fc": ranked((5, 4), (1, 4)), "conv": ranked((3, 2, 3, 3), (3, 2, 3, 3))}


def score(name, layers, screening_weight=0.25, seed=0):
    return CRITERIA[name].score(layers, screening_weight, torch.Generator().manual_seed(seed))


def same_order(one, other):
    one, other = (torch.cat([score.flatten() for score in scores.values()]) for scores in (one, other))
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
    scores = score("screening", given_layers, screening_weight)
    for n in w:
        expected = screening_weight * f[n] / mean_f + (1 - screening_weight) * abs(w[n]) / mean_w
        np.testing.assert_allclose(scores[n], expected, rtol=1e-12, atol=1e-300)  # λ may be subnormal


def test_zero_screening_weight_ranks_by_magnitude_and_asks_for_no_statistics():
    without = {n: Ranked(layer.weight, layer.kept) for n, layer in layers().items()}
    assert same_order(score("screening", without, 0.0), {n: layer.weight.abs() for n, layer in without.items()})
    assert not CRITERIA["screening"].needs_statistics(0.0)
    assert CRITERIA["screening"].needs_statistics(1e-9)


def test_full_screening_weight_ranks_by_f_alone():
    given_layers = layers()
    by_f = {n: layer.f.expand(layer.weight.shape) for n, layer in given_layers.items()}
    assert same_order(score("screening", given_layers, 1.0), by_f)


def test_scores_do_not_depend_on_the_units_of_weights_or_f():
    given_layers = layers()
    scaled = {n: Ranked(layer.weight * 1e-3, layer.kept, layer.f * 1e5) for n, layer in given_layers.items()}
    one, other = score("screening", given_layers), score("screening", scaled)
    for n in given_layers:
        torch.testing.assert_close(one[n], other[n])


def test_what_is_pruned_already_does_not_move_the_scores_of_the_others():
    given_layers = layers()
    changed = {
        n: Ranked(
            torch.where(layer.kept, layer.weight, 0.0),
            layer.kept,
            torch.where(layer.kept, layer.f.expand(layer.weight.shape), 1.0),
        )
        for n, layer in given_layers.items()
    }
    one, other = score("screening", given_layers), score("screening", changed)
    for n, layer in given_layers.items():
        torch.testing.assert_close(one[n][layer.kept], other[n][layer.kept])


def test_infinite_f_counts_as_the_largest_finite_one():
    weight, kept = torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool)
    infinite = {"a": Ranked(weight, kept, torch.tensor([[1.0, math.inf, 3.0, 2.0]]))}
    replaced = {"a": Ranked(weight, kept, torch.tensor([[1.0, 3.0, 3.0, 2.0]]))}
    assert torch.equal(score("screening", infinite)["a"], score("screening", replaced)["a"])


def test_infinite_f_everywhere_leaves_the_order_to_magnitude():
    given_layers = {
        n: Ranked(layer.weight, layer.kept, torch.full_like(layer.weight, math.inf)) for n, layer in layers().items()
    }
    scores = score("screening", given_layers, 0.5)
    assert all(torch.isfinite(values).all() for values in scores.values())
    assert same_order(scores, {n: layer.weight.abs() for n, layer in given_layers.items()})


def test_infinite_f_ranks_above_features_that_say_nothing():
    """Perfect separation beside constant features, as with no more instances than classes."""
    kept = torch.ones(1, 3, dtype=torch.bool)
    scores = score("screening", {"a": Ranked(torch.ones(1, 3), kept, torch.tensor([[0.0, math.inf, 0.0]]))}, 0.5)["a"]
    assert scores[0, 1] > scores[0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_f_is_ranked_whatever_the_dtype_of_the_weights(dtype):
    f = torch.tensor([[1e5, 3e5, 2e5, 1e6]], dtype=torch.float64)
    given_layers = {"a": Ranked(torch.ones(2, 4, dtype=dtype), torch.ones(2, 4, dtype=torch.bool), f)}
    assert score("screening", given_layers, 1.0)["a"][0].argsort().tolist() == [0, 2, 1, 3]


def test_weights_that_are_all_zero_give_finite_scores():
    zero = {n: Ranked(torch.zeros_like(layer.weight), layer.kept, layer.f * 0) for n, layer in layers().items()}
    for name in ("screening", "magnitude"):
        assert all((values == 0).all() for values in score(name, zero).values())


def test_screening_without_statistics_is_an_error_that_names_the_layer():
    given_layers = layers()
    given_layers["conv"] = Ranked(given_layers["conv"].weight, given_layers["conv"].kept)
    with pytest.raises(ValueError, match="'conv'"):
        score("screening", given_layers)


def test_magnitude_is_the_absolute_weight():
    given_layers = layers()
    for n, values in score("magnitude", given_layers, 0.7).items():
        assert torch.equal(values, given_layers[n].weight.abs())
    assert not CRITERIA["magnitude"].needs_statistics(1.0)


def test_random_follows_its_generator_and_leaves_the_global_one_alone():
    given_layers = layers()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = score("random", given_layers, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = score("random", given_layers, seed=5), score("random", given_layers, seed=6)
    for n, layer in given_layers.items():
        assert one[n].shape == layer.weight.shape
        assert torch.equal(one[n], again[n])
        assert not torch.equal(one[n], other[n])
        assert ((one[n] >= 0) & (one[n] < 1)).all()


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_scores_every_candidate_and_changes_no_argument(name):
    given_layers = layers()
    before = {n: (layer.weight.clone(), layer.kept.clone(), layer.f.clone()) for n, layer in given_layers.items()}
    scores = score(name, given_layers, 0.5)
    for n, layer in given_layers.items():
        assert scores[n].shape == layer.weight.shape
        after = (layer.weight, layer.kept, layer.f)
        assert all(torch.equal(tensor, old) for tensor, old in zip(after, before[n], strict=True))


def test_an_unknown_criterion_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="'taylr'.*magnitude.*random.*screening"):
        resolve_criterion("taylr")


def test_a_registered_criterion_is_found_by_its_name_and_a_taken_name_refused():
    def squared(layers, screening_weight, generator):
        return {n: layer.weight**2 for n, layer in layers.items()}

    try:
        assert register_criterion("squared", needs_statistics=lambda weight: weight > 0.5)(squared) is squared
        assert resolve_criterion("squared").score is squared
        assert resolve_criterion("squared").needs_statistics(0.6)
        with pytest.raises(ValueError, match="'squared'"):
            register_criterion("squared")(squared)
        with pytest.raises(ValueError, match="'magnitude'"):
            register_criterion("magnitude")(squared)
    finally:
        CRITERIA.pop("squared", None)
    assert resolve_criterion("magnitude").score is not squared
