from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule, LightningModule
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

from lightning_fscreen.statistics.labels import (
    check_proportions,
    class_labels,
    describe,
    find_labels,
    find_num_classes,
    infer_num_classes,
    warn_of_choice,
)

X, Y, OTHER = torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]), torch.arange(4)
Pair = namedtuple("Pair", "x y")
Indexed = namedtuple("Indexed", "index image label")
KEYS = ["label", "labels", "target", "targets", "y"]


@dataclass
class Record:
    image: torch.Tensor
    target: torch.Tensor


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, OTHER),
        (X, {"label": Y}),
        (X, {"index": OTHER, "targets": Y}),
        ({"image": X}, Y),
        [[X, OTHER], Y],
        Pair(X, Y),
        *[{"image": X, "index": OTHER, key: Y} for key in KEYS],
        UserDict(pixel_values=X, labels=Y),
        *[SimpleNamespace(x=X, **{key: Y}) for key in KEYS],
        Record(X, Y),
    ],
    ids=describe,
)
def test_labels_are_found_where_classifiers_carry_them(batch):
    assert find_labels(batch) is Y


def test_a_named_field_of_a_namedtuple_says_more_than_its_position():
    assert find_labels(Indexed(OTHER, X, Y)) is Y


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ((X, Y, Y.flip(0)), "item 3"),  # numbers, a category, the label
        ([X, Y, X, 1 - Y], "item 4"),
        ((X, Y), None),
        ((X, Y, OTHER), None),  # an index: there are two classes
        ((X, Y, Y.float()), None),  # weights
        ((X, Y, X.long()), None),
        ({"x": X, "label": Y, "y": Y.flip(0)}, None),
        (Indexed(OTHER, X, Y), None),
    ],
    ids=describe,
)
def test_labels_that_may_be_another_item_are_warned_of(batch, named, caplog):
    warn_of_choice(batch, find_labels(batch), 2)
    assert [named in record.getMessage() for record in caplog.records] == [True] * (named is not None)


@pytest.mark.parametrize(
    ("batch", "description"),
    [
        (X, "tensor (4, 3) float32"),
        ((X,), "tuple of 1 (tensor (4, 3) float32)"),
        ([], "list of 0 ()"),
        ((X, "cat"), "tuple of 2 (tensor (4, 3) float32, str)"),
        ((X, [Y, Y]), "tuple of 2 (tensor (4, 3) float32, list of 2 (tensor (4,) int64, tensor (4,) int64))"),
        ({"image": X, "class": Y}, "dict {'image': tensor (4, 3) float32, 'class': tensor (4,) int64}"),
        ({"image": X, "label": None}, "dict {'image': tensor (4, 3) float32, 'label': NoneType}"),
        (SimpleNamespace(x=X), "SimpleNamespace"),
        ("text", "str"),
        (None, "NoneType"),
        ({"a": {"b": {"c": X}}}, "dict {'a': dict {'b': dict}}"),
    ],
)
def test_an_error_describes_the_batch_and_how_to_say_where_its_labels_are(batch, description):
    with pytest.raises(ValueError, match='labels=.*criterion="magnitude"') as error:
        find_labels(batch)
    assert f"no labels found in the batch: {description}." in str(error.value)
    for key in KEYS:
        assert key in str(error.value)


def test_a_description_of_a_huge_batch_is_short():
    assert len(describe([{f"key{i}": [X] * 100 for i in range(100)}] * 100)) < 3000


class WithAttribute(nn.Module):
    num_classes = 7


class WithHyperparameter(LightningModule):
    def __init__(self, num_classes=6):
        super().__init__()
        self.save_hyperparameters()


class WithMetric(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 100)
        self.metrics = MetricCollection([MulticlassAccuracy(num_classes=5)])


class Data(LightningDataModule):
    @property
    def num_classes(self):
        return 4


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([WithAttribute()], 7),
        ([WithHyperparameter()], 6),
        ([WithMetric()], 5),
        ([Data()], 4),
        ([nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 9))], 9),
        ([Data(), WithAttribute()], 4),  # the first source wins
        ([None, WithAttribute()], 7),
        ([nn.Linear(3, 9), WithAttribute()], 7),  # a declared number before the width of a layer
        ([SimpleNamespace(num_classes=None), nn.Linear(3, 9)], 9),
        ([nn.Sequential(nn.Linear(3, 1), BinaryAccuracy())], None),  # one logit does not say how many classes
        ([nn.Conv2d(3, 4, 1)], None),
        ([None], None),
        ([], None),
    ],
)
def test_the_number_of_classes_is_found_in_its_sources_in_their_order(sources, expected):
    assert infer_num_classes(*sources) == expected


def test_hyperparameters_in_a_namespace_are_no_obstacle():
    model = nn.Linear(3, 9)
    model.hparams = SimpleNamespace(lr=0.1)
    assert infer_num_classes(model) == 9


def test_class_weights_know_the_number_of_classes_best():
    assert infer_num_classes(WithAttribute(), labels=torch.rand(4, 3)) == 3
    assert infer_num_classes(WithAttribute(), labels=Y) == 7
    assert infer_num_classes(WithAttribute(), labels=torch.rand(4)) == 7


def test_columns_and_one_hot_rows_are_classes_too():
    assert class_labels(Y) is Y
    assert class_labels(Y.unsqueeze(1)).tolist() == Y.tolist()
    one_hot = nn.functional.one_hot(Y)
    for rows in (one_hot, one_hot.bool(), one_hot.int()):
        assert class_labels(rows).tolist() == one_hot.float().tolist()
        check_proportions(class_labels(rows))
    soft = torch.rand(4, 2)
    assert class_labels(soft) is soft
    for two in (Y.bool(), Y.bool().unsqueeze(1)):
        assert class_labels(two).tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
        assert infer_num_classes(labels=class_labels(two)) == 2


@pytest.mark.parametrize(
    ("labels", "reading"),
    [
        (torch.zeros(2, 8, 8).long(), r"tensor \(2, 8, 8\) int64.*segmentation"),
        (torch.zeros(2, 3, 8, 8), "segmentation.*or images"),
        (torch.rand(2), r"regression, or one logit.*flatten\(\)\.long\(\) and num_classes=2"),
        (torch.rand(2, 1), "regression, or one logit"),
        (torch.tensor(1), "one value for the whole batch"),
        ([0, 1], r"no tensor but list of 2 \(int, int\)"),
        (None, "no tensor but NoneType"),
    ],
)
def test_labels_that_are_no_classes_are_refused_with_what_works(labels, reading):
    with pytest.raises(ValueError, match=rf'{reading}.*labels=.*criterion="magnitude" or "taylor"'):
        class_labels(labels)


def test_an_unknown_number_of_classes_says_where_it_was_looked_for():
    with pytest.raises(ValueError, match=r"Sequential has no .*num_classes=2 for one logit.*criterion="):
        find_num_classes(None, nn.Sequential(nn.Linear(3, 1)), labels=Y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_proportions_are_proportions_in_any_precision(dtype):
    check_proportions(torch.rand(64, 1000).softmax(1).to(dtype))
    check_proportions(Y)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]), "row 1 sums to 2"),
        (torch.tensor([[1, 0, 0], [1, 1, 1]]), "row 1 sums to 3"),
        (torch.tensor([[0.0, 0.0], [0.0, 1.0]]), "row 0 is all zero"),
        (torch.tensor([[0.1, 0.2, 0.9, 0.95]]), "row 0 sums to 2.15"),
    ],
    ids=["multi-hot", "integer multi-hot", "nothing", "boxes"],
)
def test_what_may_not_be_proportions_is_refused_with_its_readings(labels, found):
    with pytest.raises(ValueError, match=rf"{found}.*boxes.*criterion=\"magnitude\""):
        check_proportions(class_labels(labels))
