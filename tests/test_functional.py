from __future__ import annotations

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_selection import f_classif
from torch.nn.functional import one_hot

from lightning_fscreen.functional import (
    ClassSums,
    f_statistic,
    f_statistic_compute,
    f_statistic_merge,
    f_statistic_update,
    move_shift,
)

EPS = np.finfo(np.float64).eps


def sklearn_f(features, labels):
    """f_classif in float64, without its warnings about constant features."""
    features = np.asarray(torch.as_tensor(features).double())
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return f_classif(features, np.asarray(labels))[0]


def assert_equals_sklearn(actual, features, labels, rtol=1e-9):
    """|F − F_sklearn| ≤ rtol · F, plus what f_classif itself cannot know.

    It subtracts sums of squares that carry a rounding error of up to n ε Σx² each: seen through F, this is an error of
    that size in the numerator (the floor for tiny F) and in the denominator. Without any variance within the classes,
    where f_classif divides by zero, F is 0 or +inf as documented.
    """
    x, y, actual = np.asarray(torch.as_tensor(features).double()), np.asarray(labels), np.asarray(actual)
    expected = sklearn_f(x, y)
    assert actual.dtype == np.float64
    assert actual.shape == expected.shape
    classes = np.unique(y)
    flat = np.all([np.ptp(x[y == c], axis=0) == 0 for c in classes], axis=0)
    np.testing.assert_array_equal(actual[flat], np.where(np.ptp(x, axis=0) == 0, 0.0, np.inf)[flat])
    x, actual, expected = x[:, ~flat], actual[~flat], expected[~flat]
    within = sum(((x[y == c] - x[y == c].mean(0)) ** 2).sum(0) for c in classes)
    rounding = len(x) * EPS * (x**2).sum(0)
    floor = rounding / within * ((len(x) - len(classes)) / (len(classes) - 1) + expected)
    assert np.isfinite(floor).all()
    np.testing.assert_array_less(np.abs(actual - expected), rtol * expected + floor + 1e-300)


@st.composite
def labelled_data(draw, max_n=60):
    """Gaussian features with class effects of any size; unbalanced classes, some of which may be absent."""
    num_classes = draw(st.integers(2, 7))
    n = draw(st.integers(num_classes + 3, max_n))
    p = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    balance = draw(st.sampled_from([0.2, 1.0, 100.0]))
    labels = rng.choice(num_classes, size=n, p=rng.dirichlet(np.full(num_classes, balance)))
    first, second = rng.choice(num_classes, size=2, replace=False)
    labels[rng.permutation(n)[:4]] = [first, first, second, second]  # two classes with variance at least
    mean, effect = draw(st.sampled_from([0.0, 1.0, -30.0])), draw(st.sampled_from([0.0, 0.1, 3.0]))
    scale = draw(st.sampled_from([1e-6, 1.0, 1e5]))
    features = scale * (mean + effect * rng.normal(size=(num_classes, p))[labels] + rng.normal(size=(n, p)))
    return features, labels, num_classes


def weighted_f(features, weights):
    """The formula of Eq. 3 with fractional memberships, as float64 loops over classes and instances."""
    n, p = features.shape
    present = [c for c in range(weights.shape[1]) if weights[:, c].sum() > 0]
    total = sum(float(weights[k, c]) for k in range(n) for c in present)
    result = []
    for j in range(p):
        mean = sum(weights[k, c] * features[k, j] for k in range(n) for c in present) / total
        between = within = 0.0
        for c in present:
            n_c = weights[:, c].sum()
            mean_c = sum(weights[k, c] * features[k, j] for k in range(n)) / n_c
            between += n_c * (mean_c - mean) ** 2
            within += sum(weights[k, c] * (features[k, j] - mean_c) ** 2 for k in range(n))
        result.append((between / (len(present) - 1)) / (within / (total - len(present))))
    return np.array(result)


@settings(max_examples=300, deadline=None)
@given(labelled_data())
def test_equals_f_classif_in_float64(data):
    features, labels, num_classes = data
    f = f_statistic(torch.from_numpy(features), torch.from_numpy(labels), num_classes)
    assert_equals_sklearn(f, features, labels)


@settings(max_examples=200, deadline=None)
@given(labelled_data(), st.randoms(use_true_random=False))
def test_merged_sums_of_any_split_in_any_order_equal_f_classif(data, random):
    features, labels, num_classes = data
    order = list(range(len(labels)))
    random.shuffle(order)
    cuts = sorted(random.choices(range(len(order) + 1), k=random.randint(0, 5)))
    parts = [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    sums = [f_statistic_update(torch.from_numpy(features[p]), torch.from_numpy(labels[p]), num_classes) for p in parts]
    while len(sums) > 1:  # as a tree, in any association
        first = sums.pop(random.randrange(len(sums)))
        second = sums.pop(random.randrange(len(sums)))
        sums.append(f_statistic_merge(first, second))
    assert_equals_sklearn(f_statistic_compute(sums[0]), features, labels)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(12, 400), st.integers(2, 10), st.sampled_from([1e4, -1e4]))
def test_float32_with_a_mean_of_1e4_equals_f_classif_of_the_centred_values(seed, n, num_classes, mean):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % num_classes
    effects = rng.normal(size=(num_classes, 3))[labels] * [0.0, 0.1, 1.0]
    features = torch.from_numpy((mean + effects + rng.normal(size=(n, 3))).astype(np.float32))
    exact = features.double().numpy()
    # The contract asks for 1e-4; float64 offsets from a float32 value are exact, so nothing is lost at all.
    assert_equals_sklearn(f_statistic(features, torch.from_numpy(labels)), exact - exact.mean(0), labels)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_small_integers_equal_exact_arithmetic_with_the_documented_limits(data):
    n, p = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 3))
    labels = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n).filter(lambda y: len(set(y)) > 1))
    rows = st.lists(st.integers(-3, 3), min_size=p, max_size=p)
    features = data.draw(st.lists(rows, min_size=n, max_size=n))
    actual = f_statistic(torch.tensor(features), torch.tensor(labels), 4)
    classes = sorted(set(labels))
    for j in range(p):
        column = [Fraction(row[j]) for row in features]
        members = {c: [x for x, y in zip(column, labels, strict=True) if y == c] for c in classes}
        mean, means = sum(column) / n, {c: sum(m) / len(m) for c, m in members.items()}
        between = sum(len(m) * (means[c] - mean) ** 2 for c, m in members.items())
        within = sum((x - means[c]) ** 2 for c, m in members.items() for x in m)
        if len(set(column)) == 1:
            assert actual[j] == 0
        elif within == 0:  # constant within every class, or one instance per class
            assert actual[j] == torch.inf
        else:
            exact = between / (len(classes) - 1) / (within / (n - len(classes)))
            assert float(actual[j]) == pytest.approx(float(exact), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e4 / 3, 1e30, 1e-30])
def test_a_constant_feature_has_f_zero(value):
    labels = torch.arange(1000) % 3
    assert f_statistic(torch.full((1000, 1), value, dtype=torch.float64), labels).tolist() == [0.0]
    batches = [f_statistic_update(torch.full((7, 1), value), torch.arange(7) % 3, 3) for _ in range(3)]
    merged = f_statistic_merge(f_statistic_merge(batches[0], batches[1]), batches[2])
    assert f_statistic_compute(merged).tolist() == [0.0]


@pytest.mark.parametrize("n", [6, 300, 300_000])
def test_a_feature_constant_within_classes_has_infinite_f(n):
    labels = torch.arange(n) % 3
    values = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    assert f_statistic(values[labels].unsqueeze(1), labels).tolist() == [torch.inf]


def test_one_instance_per_class_has_infinite_f_unless_constant():
    features = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    assert f_statistic(features, torch.tensor([0, 1, 2])).tolist() == [torch.inf, 0.0]


def test_tiny_but_real_variance_within_classes_is_not_called_constant():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    features = labels[:, None] + 1e-5 * rng.normal(size=(200, 1))
    f = f_statistic(torch.from_numpy(features), torch.from_numpy(labels))
    assert torch.isfinite(f).all()
    np.testing.assert_allclose(f, sklearn_f(features, labels), rtol=1e-4)  # f_classif cancels here


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 3])
def test_nan_and_inf_features_give_nan_in_their_column_only(bad, row):
    features = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3
    clean = f_statistic(features, labels)
    features[row, 1] = bad
    f = f_statistic(features, labels)
    assert torch.isnan(f[1])
    assert torch.equal(f[[0, 2]], clean[[0, 2]])


def test_nan_features_give_nan_even_with_one_instance_per_class():
    f = f_statistic(torch.tensor([[torch.nan, 1.0], [1.0, 2.0]]), torch.tensor([0, 1]))
    assert torch.isnan(f[0])
    assert f[1] == torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int16, torch.uint8])
def test_every_input_dtype_is_computed_in_float64(dtype):
    features = (torch.randn(300, 4, generator=torch.Generator().manual_seed(0)) * 20 + 120).to(dtype)
    labels = torch.arange(300) % 4
    f = f_statistic(features, labels)
    assert f.dtype == torch.float64
    assert_equals_sklearn(f, features.double(), labels)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_every_integer_dtype_of_labels_is_understood(dtype):
    features = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 2
    assert torch.equal(f_statistic(features, labels.to(dtype)), f_statistic(features, labels))


@settings(max_examples=50, deadline=None)
@given(labelled_data())
def test_one_hot_weights_equal_hard_labels(data):
    features, labels, num_classes = data
    weights = one_hot(torch.from_numpy(labels), num_classes)
    hard = f_statistic(torch.from_numpy(features), torch.from_numpy(labels), num_classes)
    for dtype in (torch.float64, torch.float32, torch.float16):
        torch.testing.assert_close(
            f_statistic(torch.from_numpy(features), weights.to(dtype), num_classes), hard, rtol=1e-9, atol=1e-12
        )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(8, 30), st.integers(2, 4), st.booleans())
def test_soft_labels_equal_loops_over_the_weighted_formula(seed, n, num_classes, absent):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(num_classes), size=n)
    if absent:
        weights = np.concatenate([weights, np.zeros((n, 1))], axis=1)
    features = rng.normal(size=(n, 2)) + 3
    f = f_statistic(torch.from_numpy(features), torch.from_numpy(weights))
    np.testing.assert_allclose(f, weighted_f(features, weights), rtol=1e-9, atol=1e-12)


def test_an_integer_weight_counts_as_that_many_instances():
    features = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9) % 3
    times = torch.tensor([1, 2, 3, 0, 1, 2, 1, 1, 3])
    weighted = f_statistic(features, one_hot(labels).double() * times.unsqueeze(1))
    repeated = f_statistic(features.repeat_interleave(times, 0), labels.repeat_interleave(times))
    torch.testing.assert_close(weighted, repeated, rtol=1e-10, atol=0)


def test_f_does_not_depend_on_the_order_scale_or_origin_of_a_feature():
    rng = torch.Generator().manual_seed(0)
    features, labels = torch.randn(50, 3, generator=rng, dtype=torch.float64), torch.arange(50) % 4
    f = f_statistic(features, labels)
    order = torch.randperm(50, generator=rng)
    torch.testing.assert_close(f_statistic(features[order], labels[order]), f, rtol=1e-10, atol=0)
    torch.testing.assert_close(f_statistic(features * -7 + 100, labels), f, rtol=1e-9, atol=0)


def test_classes_that_never_occur_change_nothing():
    features, labels = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2 * 3
    assert torch.equal(f_statistic(features, labels, 10), f_statistic(features, labels // 3, 2))


def test_moving_the_origin_leaves_the_statistic():
    features = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(20) % 3
    sums = f_statistic_update(features, labels, 3)
    moved = move_shift(sums, torch.tensor([5.0, -3.0], dtype=torch.float64))
    direct = f_statistic_update(features, labels, 3, shift=moved.shift)
    for one, other in zip(moved, direct, strict=True):
        torch.testing.assert_close(one, other)


def test_features_that_saw_different_instances_are_merged_feature_by_feature():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 2)) + 100, np.arange(40) % 3
    seen = [np.arange(40) < 40, np.arange(40) >= 15]  # the second feature missed the first instances
    halves = []
    for half in (slice(0, 15), slice(15, 40)):
        columns = []
        for j in range(2):
            rows = np.flatnonzero(seen[j])[np.isin(np.flatnonzero(seen[j]), np.arange(40)[half])]
            columns.append(
                f_statistic_update(torch.from_numpy(features[rows, j : j + 1]), torch.tensor(labels[rows]), 3)
            )
        halves.append(
            ClassSums(
                torch.cat([c.shift for c in columns]),
                torch.stack([c.counts for c in columns], 1),
                torch.cat([c.sums for c in columns], 1),
                torch.cat([c.squares for c in columns]),
            )
        )
    f = f_statistic_compute(f_statistic_merge(*halves))
    for j in range(2):
        assert_equals_sklearn(f[j : j + 1], features[seen[j], j : j + 1], labels[seen[j]])


@pytest.mark.parametrize(
    ("features", "labels", "num_classes", "said"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), 2, r"\(N, p\), got \(3,\)"),
        (torch.zeros(3, 2, 2), torch.zeros(3, dtype=torch.long), 2, r"got \(3, 2, 2\)"),
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.long), 2, "3 and 4"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 7]), 3, r"0 … 2, found 7.*num_classes="),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), 3, r"0 … 2, found -1"),
        (torch.zeros(3, 2), torch.tensor([0.0, 1.0, 1.0]), 2, r"float32.*\(N, 2\), got shape \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3, 4), 2, r"\(N, 2\), got shape \(3, 4\)"),
        (torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.5, 1.5]]), 2, "not negative"),
        (torch.zeros(3, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, 1.0]]), 2, "finite"),
        (torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.long), 2, r"int64.*\(N,\), got \(3, 2\)"),
        (torch.zeros(3, 2), torch.tensor([2, 2, 2]), None, r"at least two, found \[2\]"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), None, "no instances"),
    ],
)
def test_bad_input_is_an_error_that_names_the_value(features, labels, num_classes, said):
    with pytest.raises(ValueError, match=said):
        f_statistic(features, labels, num_classes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ignored_instances_do_not_count(dtype):
    features, labels = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=dtype), torch.arange(60) % 4
    labels[::5] = -100
    counted = labels != -100
    expected = f_statistic(features[counted], labels[counted])
    torch.testing.assert_close(f_statistic(features, labels), expected)
    features[~counted] = torch.nan  # whatever they are
    torch.testing.assert_close(f_statistic(features, labels), expected)
