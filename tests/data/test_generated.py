from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from sklearn.feature_selection import f_classif

from lightning_fscreen.data import (
    FlippedDigitsDataModule,
    PairsDataModule,
    ShellsDataModule,
    SpectraDataModule,
    SumsDataModule,
    XorDataModule,
)


def everything(data, test=False):
    data.setup("test" if test else "fit")
    batches = list(data.test_dataloader() if test else data.train_dataloader())
    return torch.cat([x for x, _ in batches]).flatten(1), torch.cat([y for _, y in batches])


MODULES = [
    (XorDataModule, {"relevant_columns": 3}, 3, 8000, 4000, 2),
    (PairsDataModule, {"pairs": 4, "alone": 0}, 8, 8000, 4000, 2),
    (ShellsDataModule, {"relevant_columns": 5, "num_shells": 4}, 5, 4000, 4000, 4),
    (SumsDataModule, {"relevant_columns": 600, "num_classes": 3}, 600, 1000, 4000, 3),
    (FlippedDigitsDataModule, {}, 64, 1497, 300, 10),
]


@pytest.mark.parametrize(("module", "arguments", "relevant", "train", "test", "num_classes"), MODULES)
def test_relevant_columns_come_first_and_no_mean_tells_the_classes_apart(
    module, arguments, relevant, train, test, num_classes
):
    data = module(noise_columns=30, **arguments)
    features, labels = everything(data)
    assert features.shape == (train, relevant + 30) and len(labels) == train
    assert data.num_classes == num_classes and labels.unique().tolist() == list(range(num_classes))
    assert everything(module(noise_columns=30, **arguments), test=True)[0].shape == (test, relevant + 30)
    varying = features.std(0) > 0
    _, p_values = f_classif(features[:, varying], labels)
    assert (p_values < 1e-3).mean() < 0.1


@pytest.mark.parametrize("module", [*(row[0] for row in MODULES), SpectraDataModule])
def test_the_split_seed_decides_and_no_global_generator_is_touched(module):
    state = torch.get_rng_state()
    data = [module(noise_columns=3, split_seed=seed) for seed in (1, 1, 2)]
    for part in data:
        part.setup("fit")
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (part._train[:100][0] for part in data)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_parity_decides_xor_and_no_smaller_set_of_signs_does():
    features, labels = everything(XorDataModule(relevant_columns=3, noise_columns=0))
    signs = features > 0
    assert torch.equal(signs.sum(1) % 2, labels)
    for pair in ([0, 1], [0, 2], [1, 2]):
        parity = signs[:, pair].sum(1) % 2
        assert float((parity == labels).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_pairs_count_by_their_product_and_the_others_alone():
    features, labels = everything(PairsDataModule(pairs=1, alone=1, noise_columns=2))
    score = features[:, 0] * features[:, 1] + features[:, 2]
    assert torch.equal((score > 0).long(), labels)
    _, p_values = f_classif(features, labels)
    assert p_values[2] < 1e-9 and (p_values[[0, 1, 3, 4]] > 1e-3).all()


def test_shells_are_ordered_by_distance_and_equally_frequent():
    features, labels = everything(ShellsDataModule(relevant_columns=4, num_shells=4, noise_columns=0))
    radius = features.norm(dim=1)
    bounds = [(radius[labels == shell].min(), radius[labels == shell].max()) for shell in range(4)]
    assert all(below[1] <= above[0] for below, above in pairwise(bounds))
    assert torch.bincount(labels).double().div(len(labels)).sub(0.25).abs().max() < 0.03


def test_the_largest_sum_decides_and_classes_are_equally_frequent():
    features, labels = everything(SumsDataModule(relevant_columns=6, num_classes=3, train_size=8000))
    light, heavy = (NormalDist().inv_cdf(0.5 + (number + 0.5) / 4) for number in range(2))
    sums = torch.stack([light * features[:, part] + heavy * features[:, part + 3] for part in range(3)], dim=1)
    assert torch.equal(sums.argmax(1), labels)
    assert torch.bincount(labels).double().div(len(labels)).sub(1 / 3).abs().max() < 0.03


def test_most_channels_of_spectra_are_the_same_in_all_classes_but_move_with_the_others():
    data = SpectraDataModule(noise_columns=10)
    features, labels = everything(data)
    assert features.shape == (1000, 410) and data.num_classes == 5
    _, p_values = f_classif(features[:, :400], labels)
    telling = torch.from_numpy(p_values < 1e-6)
    assert 0.1 < telling.double().mean() < 0.5
    silent = torch.from_numpy(p_values > 1e-3)
    correlation = torch.corrcoef(features[:, :400].T)[silent][:, telling].square().amax(1)
    assert (correlation > 0.5).double().mean() > 0.8
    # Bands are where they were in the training.
    means = [
        torch.stack([x[y == label][:, :400].mean(0) for label in range(5)])
        for x, y in ((features, labels), everything(data, test=True))
    ]
    offsets = torch.stack([(own - own.mean(0))[:, telling].flatten() for own in means])
    assert torch.corrcoef(offsets)[0, 1] > 0.8


def test_digits_are_flipped_as_a_whole():
    features, _ = everything(FlippedDigitsDataModule(noise_columns=0))
    assert ((features >= 0).all(1) | (features <= 0).all(1)).all()
    assert 0.4 < float((features.sum(1) > 0).double().mean()) < 0.6


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (XorDataModule, {"relevant_columns": 1}, "relevant_columns must be at least 2, got 1"),
        (XorDataModule, {"train_size": 0}, "train_size must be at least 1, got 0"),
        (PairsDataModule, {"pairs": 0}, "pairs must be at least 1, got 0"),
        (ShellsDataModule, {"num_shells": 1}, "num_shells must be at least 2, got 1"),
        (SumsDataModule, {"num_classes": 1}, "num_classes must be at least 2, got 1"),
        (SumsDataModule, {"num_classes": 3}, "a multiple of num_classes, got 200 for 3 classes"),
        (ShellsDataModule, {"noise_columns": -1}, "noise_columns must not be negative, got -1"),
    ],
)
def test_arguments_out_of_range_are_errors_that_name_them(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)
