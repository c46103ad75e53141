from __future__ import annotations

import copy
import pickle
import warnings

import matplotlib
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_fscreen import FStatistic
from lightning_fscreen.functional import f_statistic
from tests.processes import run_ranks
from tests.test_functional import assert_equals_sklearn, labelled_data

matplotlib.use("Agg")

STATES = ("shift", "counts", "sums", "squares")


def gaussian(n=60, p=4, num_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % num_classes
    features = rng.normal(size=(n, p)) + rng.normal(size=(num_classes, p))[labels] + 10
    return torch.from_numpy(features), torch.from_numpy(labels)


def fed(features, labels, num_classes=3, batch=None):
    metric = FStatistic(features.shape[1], num_classes)
    for start in range(0, len(labels), batch or len(labels)):
        metric.update(features[start : start + (batch or len(labels))], labels[start : start + (batch or len(labels))])
    return metric


@settings(max_examples=200, deadline=None)
@given(labelled_data(), st.randoms(use_true_random=False))
def test_any_batches_order_and_merging_equal_f_classif(data, random):
    features, labels, num_classes = data
    order = list(range(len(labels)))
    random.shuffle(order)
    metrics = [FStatistic(features.shape[1], num_classes) for _ in range(random.randint(1, 4))]
    while order:
        batch = [order.pop() for _ in range(min(len(order), random.randint(1, 20)))]
        random.choice(metrics).update(torch.from_numpy(features[batch]), torch.from_numpy(labels[batch]))
    merged = metrics[0]
    for metric in metrics[1:]:
        merged.merge_state(metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first may have had no update of its own
        assert_equals_sklearn(merged.compute(), features, labels)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 50))
def test_float32_batches_with_a_mean_of_1e4_equal_f_classif_of_the_centred_values(seed, batch):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(200) % 5)
    features = torch.from_numpy((1e4 + rng.normal(size=(200, 3))).astype(np.float32))
    exact = features.double().numpy()
    metric = fed(features, torch.from_numpy(labels), 5, batch)
    assert_equals_sklearn(metric.compute(), exact - exact.mean(0), labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_batches_are_summed_in_float64(dtype):
    features, labels = gaussian(3000)
    metric = fed(features.to(dtype), labels, batch=100)
    assert_equals_sklearn(metric.compute(), features.to(dtype).double(), labels)


def test_soft_labels_are_class_weights():
    features, _ = gaussian()
    weights = torch.rand(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = fed(features, weights, batch=7)
    torch.testing.assert_close(metric.compute(), f_statistic(features, weights), rtol=1e-10, atol=0)


def test_a_single_feature_keeps_its_dimension_each_time_it_is_computed():
    features, labels = gaussian(p=1)
    metric = fed(features, labels)
    assert metric.compute().shape == (1,)
    assert metric.compute().shape == (1,)


def test_empty_batches_change_nothing():
    features, labels = gaussian()
    metric = FStatistic(4, 3)
    metric.update(features[:0], labels[:0])
    metric.update(features, labels)
    metric.update(features[:0], labels[:0])
    assert torch.equal(metric.compute(), fed(features, labels).compute())


def test_memory_does_not_grow_with_the_number_of_instances():
    def numbers(metric):
        return sum(tensor.numel() for tensor in metric.metric_state.values())

    features, labels = gaussian(10_000)
    small, large = fed(features[:10], labels[:10]), fed(features, labels, batch=100)
    assert numbers(small) == numbers(large) == (3 + 2) * 4 + 3
    assert len(pickle.dumps(large)) < len(pickle.dumps(small)) + 100


def test_update_leaves_its_arguments_and_holds_no_reference_to_them():
    features, labels = gaussian()
    before = features.clone(), labels.clone()
    metric = fed(features, labels)
    assert torch.equal(features, before[0])
    assert torch.equal(labels, before[1])
    expected = fed(*before).compute()
    features.zero_()
    assert torch.equal(metric.compute(), expected)


def test_merging_takes_a_metric_or_its_state():
    features, labels = gaussian()
    for state in (lambda m: m, lambda m: m.metric_state):
        metric = fed(features[:23], labels[:23])
        metric.merge_state(state(fed(features[23:], labels[23:])))
        assert_equals_sklearn(metric.compute(), features, labels)


def test_merging_after_compute_is_not_hidden_by_the_cached_result():
    features, labels = gaussian()
    metric = fed(features[:23], labels[:23])
    metric.compute()
    metric.merge_state(fed(features[23:], labels[23:]))
    assert_equals_sklearn(metric.compute(), features, labels)


def test_a_metric_filled_by_merging_alone_computes_without_a_warning():
    features, labels = gaussian()
    metric = FStatistic(4, 3)
    metric.merge_state(fed(features, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equals_sklearn(metric.compute(), features, labels)


@pytest.mark.parametrize("other", [FStatistic(1, 3), FStatistic(5, 3), FStatistic(4, 2)])
def test_merging_metrics_of_different_size_is_an_error(other):
    features, labels = gaussian()
    metric = fed(features, labels)
    before = {name: tensor.clone() for name, tensor in metric.metric_state.items()}
    with pytest.raises(ValueError, match="4|3"):
        metric.merge_state(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in metric.metric_state.items())


def test_merging_with_another_kind_of_metric_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="MeanMetric"):
        FStatistic(1, 2).merge_state(MeanMetric())


def test_reset_forgets_everything():
    features, labels = gaussian()
    metric = fed(features + 1000, labels)
    metric.compute()
    metric.reset()
    metric.update(features, labels)
    assert torch.equal(metric.compute(), fed(features, labels).compute())


def test_calling_the_metric_returns_the_batch_value_and_accumulates():
    features, labels = gaussian()
    metric = FStatistic(4, 3)
    assert_equals_sklearn(metric(features[:30], labels[:30]), features[:30], labels[:30])
    assert_equals_sklearn(metric(features[30:], labels[30:]), features[30:], labels[30:])
    assert_equals_sklearn(metric.compute(), features, labels)


def test_it_works_in_a_metric_collection():
    features, labels = gaussian()
    collection = MetricCollection({"f": FStatistic(4, 3)})
    collection.update(features, labels)
    assert_equals_sklearn(collection.compute()["f"], features, labels)


@pytest.mark.parametrize("copied", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, lambda m: m.clone()])
def test_a_copy_continues_where_the_original_was(copied):
    features, labels = gaussian()
    metric = copied(fed(features[:20], labels[:20]))
    metric.update(features[20:], labels[20:])
    assert_equals_sklearn(metric.compute(), features, labels)
    assert FStatistic(1, 2).num_features == copied(FStatistic(1, 2)).num_features


def test_state_dict_restores_the_sums_bit_for_bit():
    features, labels = gaussian()
    metric = fed(features[:20], labels[:20])
    metric.persistent(True)
    restored = FStatistic(4, 3)
    restored.persistent(True)
    restored.load_state_dict(copy.deepcopy(metric.state_dict()))
    for one in (metric, restored):
        one.update(features[20:], labels[20:])
    assert torch.equal(metric.compute(), restored.compute())


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float32),
    ],
)
def test_changing_the_dtype_of_the_module_that_holds_it_keeps_float64_sums(convert):
    features, labels = gaussian()
    holder = nn.Module()
    holder.linear, holder.metric = nn.Linear(2, 2), FStatistic(4, 3)
    holder.metric.update(features[:20], labels[:20])
    convert(holder)
    convert(holder.metric)
    holder.metric.set_dtype(torch.float16)
    holder.metric.update(features[20:], labels[20:])
    assert {getattr(holder.metric, name).dtype for name in STATES} == {torch.float64}
    assert_equals_sklearn(holder.metric.compute(), features, labels)
    holder.metric.reset()
    assert {getattr(holder.metric, name).dtype for name in STATES} == {torch.float64}


def test_plot_returns_the_figure_and_the_axis_with_a_bar_per_feature():
    import matplotlib.pyplot as plt

    metric = fed(*gaussian())
    figure, axis = metric.plot()
    assert axis.figure is figure
    heights = [bar.get_height() for bar in axis.patches]
    np.testing.assert_allclose(heights, metric.compute())
    own_figure, own_axis = plt.subplots()
    assert metric.plot(torch.tensor([1.0, 2.0]), own_axis) == (own_figure, own_axis)
    assert [bar.get_height() for bar in own_axis.patches] == [1.0, 2.0]
    plt.close(figure)
    plt.close(own_figure)


@pytest.mark.parametrize(
    ("arguments", "said"), [((0, 2), "num_features.*got 0"), ((-1, 2), "got -1"), ((3, 1), "num_classes.*got 1")]
)
def test_impossible_sizes_are_errors(arguments, said):
    with pytest.raises(ValueError, match=said):
        FStatistic(*arguments)


@pytest.mark.parametrize(
    ("features", "labels", "said"),
    [
        (torch.zeros(3, 5), torch.tensor([0, 1, 1]), r"\(N, 4\), got \(3, 5\)"),
        (torch.zeros(4), torch.tensor([0, 1, 1, 0]), r"got \(4,\)"),
        (torch.zeros(3, 4), torch.tensor([0, 1]), "3 and 2"),
        (torch.zeros(3, 4), torch.tensor([0, 1, 3]), "0 … 2, found 3"),
        (torch.zeros(3, 4), torch.tensor([0.0, 1.0, 1.0]), r"\(N, 3\), got shape \(3,\)"),
    ],
)
def test_a_bad_batch_is_an_error_and_adds_nothing(features, labels, said):
    good = gaussian()
    metric = fed(*good)
    with pytest.raises(ValueError, match=said):
        metric.update(features, labels)
    assert torch.equal(metric.compute(), fed(*good).compute())


@pytest.mark.parametrize(("labels", "said"), [([1, 1, 1], r"found \[1\]"), ([], "no instances")])
def test_fewer_than_two_classes_are_an_error(labels, said):
    metric = FStatistic(1, 3)
    metric.update(torch.rand(len(labels), 1), torch.tensor(labels, dtype=torch.long))
    with pytest.raises(ValueError, match=said):
        metric.compute()


# ---- several processes


def _shards(features, labels, world_size):
    """Uneven batches by rank, far from equal in number; the last of three ranks gets nothing."""
    rows = torch.arange(len(labels))
    cut = 41
    parts = [rows[:cut], rows[cut:], rows[:0]][:world_size]
    return [
        [(features[part], labels[part]) for part in rows.split(size)]
        for rows, size in zip(parts, (7, 30, 1), strict=False)
    ]


def _worker(folder):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, pair = dist.get_rank(), dist.new_group([0, 1])
    features, labels = gaussian(100)
    features += 1e3
    for world_size, group in ((3, None), (2, pair)):
        if rank < world_size:
            metric = FStatistic(4, 3, process_group=group)
            for batch in _shards(features, labels, world_size)[rank]:
                metric.update(*batch)
            first = metric.compute()
            before_more = {name: getattr(metric, name).shape for name in STATES}
            metric.update(features[:9], labels[:9])  # the states are each process's own again after compute
            result = {"first": first, "shapes": before_more, "second": metric.compute()}
            torch.save(result, f"{folder}/{world_size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def process_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(3, _worker, folder)
    return lambda world_size, rank: torch.load(folder / f"{world_size}-{rank}.pt")


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_with_uneven_or_no_data_compute_the_single_process_statistic(process_results, world_size):
    features, labels = gaussian(100)
    features += 1e3
    centre = features.mean(0)  # f_classif cancels with a mean of 1000
    again = [torch.cat([part, *[part[:9]] * world_size]) for part in (features, labels)]
    results = [process_results(world_size, rank) for rank in range(world_size)]
    for result in results:
        assert_equals_sklearn(result["first"], features - centre, labels)
        assert_equals_sklearn(result["second"], again[0] - centre, again[1])
        assert result["shapes"] == {"shift": (4,), "counts": (3,), "sums": (3, 4), "squares": (4,)}
        assert torch.equal(result["first"], results[0]["first"])  # every process has the same answer, bit for bit
