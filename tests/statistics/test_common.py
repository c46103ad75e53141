import numpy as np
import pytest
import torch
from torch import nn

from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.common import CrossSums, Marks, Sample
from lightning_fscreen.statistics.moments import ClassMoments, merge_sums
from lightning_fscreen.statistics.probes import Probe

P, N = 12, 200


def data(seed=0, n=N):
    """Features 0 and 1 tell the class; 2, 3 and 4 move with them, less and less; the others are noise."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    features = torch.randn(n, P, generator=rng)
    features[:, 2] += 2 * features[:, 0]
    features[:, 3] += features[:, 1]
    features[:, 4] += 0.5 * features[:, 1] + 7
    features[:, :2] += 2 * labels.unsqueeze(1)
    return features, labels


def collected(*batches):
    """A collector that has seen these batches of features and labels at the input of a layer."""
    layer = nn.Linear(batches[0][0].shape[1], 2)
    collector = ActivationCollector([Probe("a", layer)], 3)
    for features, labels in batches:
        collector.attach()
        layer(features)
        collector.remove()
        collector.update(labels)
    return collector


def shared(*batches):
    return collected(*batches).statistics()["a"].shared


def centred(features, labels):
    features, labels = features.double().numpy(), labels.numpy()
    return features - np.stack([features[labels == label].mean(0) for label in labels])


def expected(features, labels):
    """By numpy: of silent features, the largest squared correlation within classes with 0 or 1."""
    correlation = np.corrcoef(centred(features, labels).T) ** 2
    return np.where(np.arange(P) < 2, 0, correlation[:, :2].max(1))


def test_it_is_the_largest_squared_correlation_within_classes():
    features, labels = data()
    found = shared((features[:70], labels[:70]), (features[70:], labels[70:]))
    np.testing.assert_allclose(found, expected(features, labels), rtol=1e-5)
    assert found[2] > 0.7 > found[3] > 0.4 > found[4] > found[5:].max()


def test_instances_may_have_class_weights_or_no_label():
    features, labels = data()
    weighted = shared((features, nn.functional.one_hot(labels, 3).float()))
    np.testing.assert_allclose(weighted, expected(features, labels), rtol=1e-5)
    labels[::4] = -100
    known = labels >= 0
    np.testing.assert_allclose(shared((features, labels)), expected(features[known], labels[known]), rtol=1e-5)


def test_processes_together_have_the_answer_of_one():
    features, labels = data()
    first, second = (collected((features[half], labels[half])) for half in (slice(60), slice(60, None)))
    second._flush()
    products = []

    def of_the_second(sums):
        if isinstance(sums, CrossSums):
            products.append(sums)
        return merge_sums(first._sums.moments, sums) if isinstance(sums, ClassMoments) else sums

    def of_both(sums):
        found = {CrossSums: products, ClassMoments: [second._sums.moments], Marks: [Marks(torch.zeros(P))]}
        return merge_sums(sums, found[type(sums)][0])

    first._flush()
    second.statistics(of_the_second)
    found = first.statistics(of_both)["a"].shared
    np.testing.assert_allclose(found, expected(features, labels), rtol=1e-5)


def test_a_few_outliers_in_common_are_no_common_cause():
    features, labels = data()
    features[:3, 5] = features[:3, 0] = 50
    assert shared((features, labels))[5] == 0


def test_learned_features_are_not_looked_at():
    features, labels = data()
    layer, before = nn.Linear(P, 2), nn.Linear(P, P)
    collector = ActivationCollector([Probe("a", layer)], 3)
    collector.attach()
    layer(before(features))
    collector.remove()
    collector.update(labels)
    assert not collector.statistics()["a"].shared.any() and not collector.state_dict()["sample"]["rows"]


def test_features_that_any_process_has_learned_are_learned():
    collector = collected(data())

    def merge(sums):
        return merge_sums(sums, Marks(torch.ones(P))) if isinstance(sums, Marks) else sums

    found = collector.statistics(merge)["a"]
    assert found.learned.all() and not found.shared.any()


def test_of_very_many_features_too_few_instances_are_kept():
    sample = Sample(torch.arange(2_000_000))
    sample.add(torch.zeros(1, 2_000_000), [torch.zeros(1, dtype=torch.long)])
    assert not sample.state_dict()["rows"]
    small = Sample(torch.arange(10_000))
    for _ in range(3):
        small.add(torch.zeros(50, 10_000), [torch.zeros(50, dtype=torch.long)])
    assert sum(map(len, small.state_dict()["rows"])) == 2**20 // 10_000


@pytest.mark.parametrize("taken", [1, 2])
def test_a_state_taken_in_the_middle_goes_on(taken):
    features, labels = data(n=300)
    batches = list(zip(features.split(100), labels.split(100), strict=True))
    half = collected(*batches[:taken])
    state = half.state_dict()
    again = ActivationCollector([Probe("a", nn.Linear(P, 2))], 3)
    again.load_state_dict(state)
    for collector in (half, again):
        layer = collector._probes[0].module
        for rest, given in batches[taken:]:
            collector.attach()
            layer(rest)
            collector.remove()
            collector.update(given)
    assert torch.equal(again.statistics()["a"].shared, half.statistics()["a"].shared)
    assert torch.equal(half.statistics()["a"].shared, shared(*batches))
