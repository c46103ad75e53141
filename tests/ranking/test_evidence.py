from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_fscreen.ranking.criteria import ScoringInputs
from lightning_fscreen.ranking.evidence import gather_evidence
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.connections import per_connection
from lightning_fscreen.statistics.probes import Probe


def layer_of(features, labels, weight, num_classes=2, module=None, learned=False):
    """What a criterion sees of a layer that reads these features."""
    module = module or nn.Linear(features.shape[1], len(weight))
    module.weight.data = weight
    collector = ActivationCollector([Probe("a", module)], num_classes)
    collector.attach()
    module(features)
    collector.remove()
    collector.update(labels)
    found = collector.statistics()["a"]
    assert not found.learned.any()
    spread_over = functools.partial(per_connection, module)
    return ScoringInputs(
        weight,
        torch.ones_like(weight, dtype=torch.bool),
        f=spread_over(found.f),
        degrees=found.degrees,
        spread=spread_over(found.spread),
        variance=spread_over(found.variance),
        mean_square=spread_over(found.mean_square),
        shared=spread_over(found.shared),
        learned=spread_over(torch.full_like(found.learned, learned)),
    )


def noise(n=3000, p=60, seed=0, used=(0, 1)):
    """Irrelevant features, and weights that are larger for those that the network has found a use for."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(n, p, generator=rng)
    labels = torch.randint(2, (n,), generator=rng)
    weight = 0.1 * torch.randn(20, p, generator=rng)
    weight[:, list(used)] *= 4
    return features, labels, weight


def strong(evidence):
    return evidence.significant.flatten().nonzero().flatten().tolist()


def test_each_test_speaks_where_the_others_are_silent():
    features, labels, weight = noise(used=(0, 1, 2, 3))  # 3: what the network has found out
    features[:, 0] += 0.5 * labels  # mean
    features[:, 1] *= 1 + 0.5 * labels  # spread
    signs = 2 * torch.randint(2, (3000,), generator=torch.Generator().manual_seed(1)) - 1
    features[:, 2] = (features[:, 2] + 5) * signs * (1 + 0.2 * labels)
    evidence = gather_evidence(layer_of(features, labels, weight), "a")
    assert strong(evidence) == [0, 1, 2, 3]
    assert (evidence.features, evidence.mean, evidence.spread, evidence.joint, evidence.silent) == (60, 1, 2, 1, 56)
    counts = {"features": 60, "mean": 1, "spread": 2, "shared": 0, "joint": 1, "shrunk": 56}
    assert evidence.to_dict() == {**counts, "learned": 0, "preferred": False, "trusted": None}
    assert str(evidence).startswith("of 60 features 1 are spoken for by class means, 2 more by spread, 0 more by what")


def test_what_moves_with_a_relevant_feature_and_is_the_same_in_all_classes_is_spoken_for():
    """Sensor 0 tells the class, and drifts; 1 and 2 tell the drift, 2 with more noise than that."""
    features, labels, weight = noise(used=(0,))
    rng = torch.Generator().manual_seed(1)
    drift = torch.randn(3000, generator=rng)
    features[:, 0] = labels + drift
    features[:, 1] = drift + 0.5 * torch.randn(3000, generator=rng)
    features[:, 2] = drift + 2 * torch.randn(3000, generator=rng)
    evidence = gather_evidence(layer_of(features, labels, weight), "a")
    assert strong(evidence) == [0, 1]
    assert (evidence.mean, evidence.shared, evidence.silent) == (1, 1, 58)


def test_irrelevant_features_are_seldom_spoken_for():
    silent = 0
    for seed in range(5):
        features, labels, weight = noise(p=400, seed=seed)
        features[:, 0] += labels
        silent += gather_evidence(layer_of(features, labels, weight), "a").silent
    assert silent > 0.99 * 5 * 399


def test_learned_features_are_trusted():
    features, labels, weight = noise()
    features[:, 0] += labels
    evidence = gather_evidence(layer_of(features, labels, weight, learned=True), "a")
    assert "learned" in evidence.trusted
    assert evidence.significant.all()
    assert evidence.mean == 1 and evidence.to_dict()["shrunk"] == 0
    assert str(evidence) == "ranked by magnitude alone, for the network has learned these features"


@pytest.mark.parametrize("learned", [True, False])
def test_features_that_are_always_zero_are_never_trusted(learned):
    """Constant ones are: what reads them may need them as a bias."""
    features, labels, weight = noise(used=())
    features[:, [3, 40]] = 0
    features[:, 5] = 1
    layer = layer_of(features, labels, weight, learned=learned)
    evidence = gather_evidence(layer, "a")
    assert sorted(set(range(60)) - set(strong(evidence))) == [3, 40]
    assert evidence.trusted and evidence.to_dict()["shrunk"] == 2
    assert str(evidence).endswith("; 2 that are always zero are shrunk")
    layer.kept[:, 3] = False
    assert gather_evidence(layer, "a").dead == 1


def test_where_no_feature_is_significant_among_so_many_all_are_trusted():
    assert gather_evidence(layer_of(*noise(used=())), "a").trusted == "no feature stands out"
    layer = layer_of(*noise(used=[7]))
    f = layer.f.clone()
    f[0, 7] = 12.0  # one that passes at the level (p = 0.0005), by chance, is not enough
    assert gather_evidence(replace(layer, f=f), "a").trusted == "no feature stands out"
    f[0, 7] = 30.0
    assert strong(gather_evidence(replace(layer, f=f), "a")) == [7]


def test_too_few_instances_for_any_test_leave_the_order_to_magnitude():
    features, _, weight = noise(n=2)
    evidence = gather_evidence(layer_of(features, torch.tensor([0, 1]), weight), "a")
    assert evidence.trusted == "too few instances for any test"


def test_when_few_silent_features_have_connections_left_those_that_hold_on_to_most_stay():
    """The network uses 2, 3 and 4 jointly, but less than 0 and 1; of noise a few connections are left by accident."""
    features, labels, weight = noise(used=())
    features[:, :2] += labels.view(-1, 1)
    weight[:, :2] *= 4
    layer = layer_of(features, labels, weight)
    kept = torch.zeros_like(layer.kept)
    kept[:, :5] = kept[:2, 5:10] = True
    assert strong(gather_evidence(replace(layer, kept=kept), "a")) == [0, 1, 2, 3, 4]
    kept[:, 2:] = False
    assert strong(gather_evidence(replace(layer, kept=kept), "a")) == [0, 1]


def test_what_the_network_has_held_on_to_is_no_sample_of_irrelevant_features():
    """Ten features that matter jointly, alike to a few percent but for two, when all noise is gone."""
    features, labels, weight = noise()
    features[:, 0] += 0.5 * labels
    weight = torch.zeros_like(weight)
    weight[:, 0], weight[:, 1:11] = 0.5, 1.0 + 0.01 * torch.arange(10)
    weight[:, [3, 4]] = 1.6
    evidence = gather_evidence(layer_of(features, labels, weight), "a")
    assert strong(evidence) == list(range(11)) and (evidence.mean, evidence.joint) == (1, 10)


def test_where_the_network_makes_as_much_of_silent_features_all_are_trusted():
    """Many features that matter jointly are no outliers among each other."""
    features, labels, weight = noise(used=range(60))
    features[:, 0] += labels
    weight[:, 0] *= 0.9
    evidence = gather_evidence(layer_of(features, labels, weight), "a")
    assert "nearly as much of features that no test speaks for" in evidence.trusted
    assert evidence.significant.all() and not evidence.preferred


def test_silent_features_that_the_network_preferred_stay_trusted():
    """Pruning leaves it less of them later; what it made of them when it could tells more than what is left."""
    features, labels, weight = noise(used=range(5, 60))
    features[:, :5] += labels.view(-1, 1)
    preferring = layer_of(features, labels, weight.clone())
    early = gather_evidence(preferring, "a")
    assert early.preferred and "has made more of features that no test speaks for" in early.trusted
    starved = layer_of(features, labels, weight * torch.where(torch.arange(60) < 5, 2.0, 0.25))
    assert gather_evidence(starved, "a").trusted is None
    late = gather_evidence(replace(starved, last=early.to_dict()), "a")
    assert late.preferred and late.trusted == early.trusted and late.significant.all()


@pytest.mark.parametrize(("level", "scatter", "trusted"), [(0.85, 0.01, True), (0.85, 0.2, False), (0.7, 0.01, False)])
def test_two_thirds_are_enough_only_where_the_network_tells_the_two_apart(level, scatter, trusted):
    features, labels, _ = noise()
    features[:, :30] += labels.view(-1, 1)
    columns = 1 + scatter * torch.randn(60, generator=torch.Generator().manual_seed(0))
    columns[30:] *= level  # of weights; of their squares 0.72 and 0.49
    layer = layer_of(features, labels, columns.expand(20, 60).clone())
    assert (gather_evidence(layer, "a").trusted is not None) is trusted


@pytest.mark.parametrize(
    ("effect", "others", "trusted"),
    [
        (0.06, 0.3, True),  # too little for most tests of one feature
        (0.06, 4.0, False),  # the others tell all
        (0.0, 0.3, False),
    ],
)
def test_many_that_tell_a_little_are_trusted_if_together_they_would_help(effect, others, trusted):
    features, labels, weight = noise(p=200, used=range(5))
    features += effect * labels[:, None]
    features[:, :2] += others * labels[:, None]
    layer = layer_of(features, labels, weight)
    evidence = gather_evidence(layer, "a")
    assert evidence.mean < 60
    assert ("apart all together" in (evidence.trusted or "")) == trusted
    by_connection = {name: getattr(layer, name).expand(weight.shape) for name in ("f", "spread")}
    assert gather_evidence(replace(layer, **by_connection), "a").trusted == evidence.trusted


def test_silent_features_that_are_gone_are_not_used():
    features, labels, weight = noise(used=[0])
    features[:, 0] += labels
    weight[:, 0] = 0
    layer = layer_of(features, labels, weight)
    kept = torch.zeros_like(layer.kept)
    assert gather_evidence(replace(layer, kept=kept), "a").trusted is None


def test_constant_features_are_never_spoken_for():
    features, labels, weight = noise(p=8, used=(0, 6))
    features[:, 0] += labels
    features[:, 5:] = 3.7
    evidence = gather_evidence(layer_of(features, labels, weight), "a")
    assert strong(evidence) == [0]
    assert evidence.silent == 7


def test_equal_weights_have_no_outliers():
    features, labels, weight = noise()
    features[:, 0] += labels
    weight = torch.ones_like(weight)
    weight[:, 0] = 2
    assert strong(gather_evidence(layer_of(features, labels, weight), "a")) == [0]


@pytest.mark.parametrize(
    "module", [nn.Conv2d(60, 4, 3), nn.Conv1d(60, 6, 1, groups=2), nn.ConvTranspose2d(60, 4, 2)], ids=lambda m: str(m)
)
def test_convolutions_are_tested_by_input_channel(module):
    features, labels, _ = noise()
    features[:, 0] += 0.5 * labels
    features[:, 31] *= 1 + 0.5 * labels
    weight = 0.1 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0))
    used = torch.zeros(60, dtype=torch.bool).index_fill(0, torch.tensor([0, 31]), True)
    weight *= 1 + 9 * per_connection(module, used)
    positions = [1] * len(module.kernel_size) if max(module.kernel_size) == 1 else [3] * len(module.kernel_size)
    images = features.view(*features.shape, *[1] * len(positions)).expand(*features.shape, *positions)
    evidence = gather_evidence(layer_of(images, labels, weight, module=module), "a")
    assert evidence.trusted is None
    by_weight = evidence.significant.expand(weight.shape)
    assert torch.equal(by_weight, per_connection(module, used).expand(weight.shape))


def test_f_of_every_connection_is_joined_with_what_is_known_of_the_inputs():
    features, labels, weight = noise(used=(1, 2))
    features[:, 1] *= 1 + 0.5 * labels
    layer = layer_of(features, labels, weight)
    f = layer.f.expand(weight.shape).clone()
    f[3, 2] = 1000.0
    evidence = gather_evidence(replace(layer, f=f), "a")
    spoken = torch.zeros(weight.shape, dtype=torch.bool)
    spoken[:, 1] = spoken[3, 2] = True
    assert torch.equal(evidence.significant, spoken)
    assert (evidence.mean, evidence.spread) == (1, 1)


def test_statistics_that_could_not_be_computed_say_nothing():
    features, labels, weight = noise(used=[0])
    features[:, 0] += labels
    layer = layer_of(features, labels, weight)
    evidence = gather_evidence(replace(layer, spread=torch.full_like(layer.spread, torch.nan)), "a")
    assert strong(evidence) == [0] and evidence.spread == 0
    assert strong(gather_evidence(replace(layer, spread=None, variance=None), "a")) == [0]


def test_features_beside_learned_ones_are_tested_alone():
    """As in a table with embeddings: what is learned is trusted, and takes no part in the tests of the others."""
    features, labels, weight = noise(p=80, used=range(8))
    features[:, :5] += labels.view(-1, 1)
    features[:, 65] = 0
    layer = layer_of(features, labels, weight)
    learned = torch.arange(80).view(1, -1) >= 60
    alone = gather_evidence(layer_of(features[:, :60], labels, weight[:, :60]), "a")
    evidence = gather_evidence(replace(layer, learned=learned), "a")
    assert strong(evidence) == sorted({*strong(alone), *range(60, 80)} - {65})
    assert evidence.to_dict() == {**alone.to_dict(), "learned": 20}
    assert str(evidence).endswith("are shrunk; 20 more are learned")
    features, labels, weight = noise(p=80, used=())
    features[:, 65:] += labels.view(-1, 1)
    features[:, 65] = 0
    trusted = gather_evidence(replace(layer_of(features, labels, weight), learned=learned), "a")
    assert trusted.trusted == "no feature stands out" and trusted.learned == 20 and trusted.shrunk == 1
