from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_selection import f_classif

from lightning_fscreen.functional import f_critical, f_statistic
from lightning_fscreen.statistics.moments import accumulate_moments_, empty_moments, merge_sums, spread_statistic

C = 4


def moments_of(features, labels, shift=None, num_classes=C, dtype=torch.float64):
    moments = empty_moments(num_classes, features.shape[1], features.device)
    moments = moments._replace(shift=features[0].double() if shift is None else shift)
    accumulate_moments_(moments, (features - moments.shift).to(dtype), labels)
    return moments


def sample(seed, n=300, p=6):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(C), torch.randint(C, (n - C,), generator=rng)])
    features = torch.randn(n, p, generator=rng, dtype=torch.float64) * (
        1 + labels.view(-1, 1) * torch.linspace(0, 1, p)
    )
    return features * 3 + torch.linspace(-100, 100, p), labels


@settings(deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 290), max_size=3, unique=True), st.floats(-50, 50))
def test_spread_is_the_f_statistic_of_squared_deviations_however_the_instances_are_split(seed, cuts, offset):
    features, labels = sample(seed)
    parts = torch.arange(300).tensor_split(sorted(cuts))
    merged = moments_of(features[parts[0]], labels[parts[0]])
    for part in parts[1:]:
        merged = merge_sums(merged, moments_of(features[part], labels[part], features[part[0]] + offset))
    expected, _ = f_classif(((features - features.mean(0)) ** 2).numpy(), labels.numpy())
    np.testing.assert_allclose(spread_statistic(merged), expected, rtol=1e-5)
    torch.testing.assert_close(merged.class_sums, moments_of(features, labels, merged.shift).class_sums)


def test_sums_over_nothing_change_nothing():
    features, labels = sample(0)
    some = moments_of(features, labels)
    for one, other in ((some, empty_moments(C, 6, features.device)), (empty_moments(C, 6, features.device), some)):
        torch.testing.assert_close(merge_sums(one, other), some)


def test_class_weights_count_as_often_as_they_say():
    features, labels = sample(1)
    one_hot = torch.nn.functional.one_hot(labels, C).double()
    torch.testing.assert_close(moments_of(features, one_hot), moments_of(features, labels))
    twice = moments_of(torch.cat([features, features]), torch.cat([labels, labels]), features[0])
    torch.testing.assert_close(moments_of(features, 2 * one_hot), twice)


def test_constants_and_features_of_two_values_have_no_spread_to_speak_of():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % C
    sign = (torch.rand(400, generator=rng) > 0.5).double() * 2 - 1
    sign[:200] = -sign[200:]  # mean 0, so that every squared deviation is the same
    features = torch.stack([torch.full((400,), 1 / 3), sign, 0.7 * sign], dim=1).double()
    assert (spread_statistic(moments_of(features, labels)) == 0).all()
    assert (spread_statistic(moments_of(features.float(), labels, dtype=torch.float32)) < 1e-3).all()


@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_fourth_powers_out_of_range_say_nothing(scale):
    features, labels = sample(2)
    features = (features - features.mean(0)) * scale
    spread = spread_statistic(moments_of(features, labels, torch.zeros(6).double(), dtype=torch.float32))
    assert torch.isnan(spread).all()
    expected = f_statistic((features - features.mean(0)) ** 2, labels)
    torch.testing.assert_close(spread_statistic(moments_of(features, labels)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tail", ["normal", "laplace", "lognormal", "sparse", "rare"])
def test_irrelevant_features_seldom_exceed_the_critical_value_whatever_their_distribution(tail):
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(2000, 4000, generator=rng)
    rare = torch.rand(2000, 4000, generator=rng) < 0.02
    features = {
        "normal": normal,
        "laplace": normal.sign() * torch.rand(2000, 4000, generator=rng).log(),
        "lognormal": normal.exp(),
        "sparse": normal.abs() * rare,
        "rare": rare.float(),
    }[tail]
    labels = torch.randint(10, (2000,), generator=rng)
    spread = spread_statistic(moments_of(features.double(), labels, num_classes=10))
    assert float((spread > f_critical(1e-3, 9, 1990)).double().mean()) < 0.004  # 0.001, and its error
