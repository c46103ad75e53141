from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_fscreen.ranking.criteria import (
    CRITERIA,
    ScoringContext,
    ScoringInputs,
    register_criterion,
    resolve_criterion,
)


def layers(seed=0, dtype=torch.float64):
    """A linear layer with F per input, a convolution with F per weight; some candidates are pruned already."""
    rng = torch.Generator().manual_seed(seed)

    def ranked(shape, f_shape):
        kept = torch.rand(shape, generator=rng) > 0.3
        weight = torch.randn(shape, generator=rng).to(dtype)
        f = torch.rand(f_shape, generator=rng, dtype=torch.float64).exp() * 50
        mean_square = torch.rand(f_shape, generator=rng, dtype=torch.float64)
        gradient = torch.rand(shape, generator=rng)
        return ScoringInputs(
            weight * kept, kept, f, (9.0, 990.0), mean_square, gradient, gradient * weight.abs(), error=weight**2
        )

    return {"fc": ranked((5, 4), (1, 4)), "conv": ranked((3, 2, 3, 3), (3, 2, 3, 3))}


def score(name, layers, screening_weight=0.25, seed=0):
    return CRITERIA[name].score(ScoringContext(layers, screening_weight, torch.Generator().manual_seed(seed)))


def same_order(one, other):
    one, other = (torch.cat([score.flatten() for score in scores.values()]) for scores in (one, other))
    return torch.equal(one.argsort(stable=True), other.argsort(stable=True))


def test_weights_that_are_all_zero_give_finite_scores():
    zero = {n: replace(layer, weight=torch.zeros_like(layer.weight), f=layer.f * 0) for n, layer in layers().items()}
    for name in ("screening", "screening_product", "screening_sum", "magnitude"):
        assert all((values == 0).all() for values in score(name, zero).values())


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


def test_gradient_and_taylor_are_what_the_steps_said():
    given_layers = layers()
    for n, layer in given_layers.items():
        assert torch.equal(score("gradient", given_layers)[n], layer.gradient)
        assert torch.equal(score("taylor", given_layers)[n], layer.taylor)
    assert CRITERIA["gradient"].needs_gradients
    assert not CRITERIA["gradient"].needs_statistics(1.0)


def test_activation_is_magnitude_times_the_root_mean_square_of_the_input():
    for n, values in score("activation", given_layers := layers()).items():
        layer = given_layers[n]
        torch.testing.assert_close(values, layer.weight.abs() * layer.mean_square.sqrt().expand(layer.weight.shape))
    assert CRITERIA["activation"].needs_statistics(0.0)


@pytest.mark.parametrize("name", ["gradient", "taylor", "activation", "screening", "screening_rank"])
def test_a_criterion_without_what_it_needs_is_an_error_that_names_the_layer(name):
    bare = {n: ScoringInputs(layer.weight, layer.kept) for n, layer in layers().items()}
    with pytest.raises(ValueError, match="'fc'.*none were gathered"):
        score(name, bare, 0.5)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_scores_every_candidate_and_changes_no_argument(name):
    given_layers = layers()
    before = {n: (layer.weight.clone(), layer.kept.clone(), layer.f.clone()) for n, layer in given_layers.items()}
    scores = score(name, given_layers, 0.5)
    for n, layer in given_layers.items():
        assert scores[n].shape == layer.weight.shape
        after = (layer.weight, layer.kept, layer.f)
        assert all(torch.equal(tensor, old) for tensor, old in zip(after, before[n], strict=True))


def test_where_errors_are_not_known_shares_of_magnitudes_stand_for_them():
    weight, error = torch.tensor([3.0, -4.0, 0.0]), torch.tensor([0.5, torch.nan, 0.1])
    found = score("reconstruction", {"layer": ScoringInputs(weight, weight != 0, error=error)}, 0.0)["layer"]
    torch.testing.assert_close(found, torch.tensor([0.5, 16 / 25, 0.1]))


def test_an_unknown_criterion_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="'taylr'.*magnitude.*random.*screening"):
        resolve_criterion("taylr")


def test_a_registered_criterion_is_found_by_its_name_and_a_taken_name_refused():
    def squared(context):
        return {n: layer.weight**2 for n, layer in context.layers.items()}

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


def test_a_criterion_may_take_the_parts_of_the_context_as_three_arguments(monkeypatch):
    def scaled(layers, screening_weight, generator):
        noise = torch.rand(1, generator=generator)
        return {n: layer.weight * screening_weight + noise for n, layer in layers.items()}

    monkeypatch.delitem(CRITERIA, "scaled", raising=False)
    assert register_criterion("scaled")(scaled) is scaled
    given_layers = layers()
    expected = scaled(given_layers, 0.5, torch.Generator().manual_seed(3))
    for n, values in score("scaled", given_layers, 0.5, seed=3).items():
        assert torch.equal(values, expected[n])


def test_a_criterion_may_have_arguments_with_defaults(monkeypatch):
    def power(context, exponent=2, *others, **more):
        return {name: layer.weight**exponent for name, layer in context.layers.items()}

    monkeypatch.delitem(CRITERIA, "power", raising=False)
    register_criterion("power")(power)
    given_layers = layers()
    for name, values in score("power", given_layers).items():
        assert torch.equal(values, given_layers[name].weight ** 2)


def test_a_criterion_can_be_named_with_the_module_that_registers_it(tmp_path, monkeypatch):
    (tmp_path / "my_criteria.py").write_text(
        "from lightning_fscreen import register_criterion\n"
        "@register_criterion('mine')\n"
        "def mine(layers, screening_weight, generator):\n"
        "    return {name: layer.weight**2 for name, layer in layers.items()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        criterion = resolve_criterion("my_criteria:mine")
        assert resolve_criterion("my_criteria:mine") is criterion is resolve_criterion("mine")
    finally:
        CRITERIA.pop("mine", None)
    with pytest.raises(ValueError, match="no_such_module.*register"):
        resolve_criterion("no_such_module:mine")
