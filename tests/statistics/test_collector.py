from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from sklearn import feature_selection
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, relu

from lightning_fscreen.candidates.weights import find_weights
from lightning_fscreen.functional import f_statistic
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.moments import merge_sums
from lightning_fscreen.statistics.probes import Probe
from tests.test_functional import assert_equals_sklearn

C = 3


class Network(nn.Module):
    """A small CNN + MLP in which a layer runs twice, another only in some steps, and one reads sequences."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.bn = nn.BatchNorm2d(4)
        self.tokens = nn.Linear(4, 5)
        self.twice = nn.Linear(5, 5)
        self.sometimes = nn.Linear(5, 5)
        self.head = nn.Linear(5, C)

    def forward(self, x, extra=False):
        x = self.bn(self.grouped(relu(self.conv(x))))
        x = self.tokens(x.flatten(2).transpose(1, 2)).mean(1)  # (N, positions, channels)
        x = self.twice(relu(self.twice(x)))
        if extra:
            x = x + self.sometimes(input=relu(x))
        return self.head(x)

    def recorded(self, x, extra=False):
        """What every layer reads, reduced over positions, by writing the forward pass out again."""
        first = relu(conv2d(x, self.conv.weight, self.conv.bias))
        grouped = conv2d(first, self.grouped.weight, self.grouped.bias, groups=2)
        y = self.bn(grouped)
        sequence = y.flatten(2).transpose(1, 2)
        z = self.tokens(sequence).mean(1)
        hidden = relu(self.twice(z))
        out = self.twice(hidden)
        record = {
            "conv": x.mean((2, 3)),
            "grouped": first.mean((2, 3)),
            "bn": y.mean((2, 3)),
            "tokens": sequence.mean(1),
            "twice": (z + hidden) / 2,
        }
        if extra:
            record["sometimes"] = relu(out)
            out = out + self.sometimes(relu(out))
        return {name: value.detach() for name, value in (record | {"head": out}).items()}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Network().to(dtype)


def batches(sizes=(9, 14, 12, 1, 15, 10), seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    for step, size in enumerate(sizes):
        labels = torch.randint(C, (size,), generator=rng)
        yield (
            torch.randn(size, 2, 6, 6, generator=rng, dtype=dtype) + 5 + labels.view(-1, 1, 1, 1),
            labels,
            step % 2 == 1,
        )


def probes(model):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.BatchNorm2d)}
    return [Probe(n, m, "output" if isinstance(m, nn.BatchNorm2d) else "input") for n, m in layers.items()]


def collecting(model, exact=False, layers=None):
    chosen = [probe for probe in probes(model) if layers is None or probe.name in layers]
    return ActivationCollector(chosen, C, [layer.name for layer in find_weights(model)[0]] if exact else ())


def feed(collector, model, data, optimizer=None):
    """Training steps as the callback does them; the reference values of every step."""
    records = []
    for x, labels, extra in data:
        if optimizer is None:
            records.append((model.recorded(x, extra), labels, weights(model)))
            state = copy.deepcopy(model.bn.state_dict())
            collector.attach()
            out = model(x, extra)
            collector.remove()
            model.bn.load_state_dict(state)
        else:
            records.append((model.recorded(x, extra), labels, weights(model)))
            collector.attach()
            out = model(x, extra)
            collector.remove()
            optimizer.zero_grad()
            cross_entropy(out, labels).backward()
            optimizer.step()
        collector.update(labels)
    return records


def weights(model):
    return {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def reference(records, name):
    """All values that a layer read, and the labels of the steps in which it ran."""
    ran = [(record[name], labels) for record, labels, _ in records if name in record]
    return torch.cat([value for value, _ in ran]), torch.cat([labels for _, labels in ran])


@pytest.fixture
def attached():
    collectors = []

    def attach(collector):
        collector.attach()
        collectors.append(collector)
        return collector

    yield attach
    for collector in collectors:
        collector.remove()


def test_statistics_equal_f_classif_of_the_recorded_activations(attached):
    model = network()
    collector = attached(collecting(model))
    records = feed(collector, model, batches())
    statistics = collector.statistics()
    assert list(statistics) == [probe.name for probe in probes(model)]
    for name, found in statistics.items():
        values, labels = reference(records, name)
        assert_equals_sklearn(found.f, values, labels)
        torch.testing.assert_close(found.mean, values.mean(0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.mean_square, values.square().mean(0), rtol=1e-9, atol=1e-12)


def test_statistics_while_the_weights_are_trained_equal_f_classif_of_what_was_read(attached):
    model = network()
    collector = attached(collecting(model))
    records = feed(collector, model, batches(), torch.optim.SGD(model.parameters(), 0.05))
    for name, found in collector.statistics().items():
        assert_equals_sklearn(found.f, *reference(records, name))


def test_float32_and_half_precision_activations_far_from_zero(attached):
    model = nn.Linear(3, 2)
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        collector = attached(ActivationCollector([Probe("fc", model)], C))
        x = (torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) + 50).to(dtype)
        labels = torch.arange(300) % C
        for part in torch.arange(300).split(70):
            collector.attach()
            model(x[part])
            collector.remove()
            collector.update(labels[part])
        assert_equals_sklearn(collector.statistics()["fc"].f, x.double() - x.double().mean(0), labels, rtol=1e-5)


def test_exact_connections_equal_f_classif_of_the_contributions_while_the_weights_move(attached):
    model = network()
    collector = attached(collecting(model, exact=True))
    records = feed(collector, model, batches((20, 20, 20)), torch.optim.SGD(model.parameters(), 0.2))
    statistics = collector.statistics()
    assert not torch.equal(records[0][2]["head"], records[2][2]["head"])
    for name in ("conv", "grouped", "tokens", "twice", "sometimes", "head"):
        weight = model.get_submodule(name).weight
        assert statistics[name].f.shape == weight.shape
        ran = [record for record in records if name in record[0]]
        labels = torch.cat([labels for _, labels, _ in ran])
        for position in np.ndindex(*weight.shape):
            column = position[1] + (2 * (position[0] // 2) if name == "grouped" else 0)
            values = torch.cat([w[name][position] * record[name][:, column] for record, _, w in ran])
            assert_equals_sklearn(statistics[name].f[position].view(1), values.unsqueeze(1), labels)


def test_soft_labels_are_class_weights(attached):
    model = network()
    collector = attached(collecting(model, layers=["head"]))
    rng, values, weights = torch.Generator().manual_seed(0), [], []
    for x, labels, _ in batches((10, 20, 5)):
        weights.append(torch.rand(len(labels), C, generator=rng, dtype=torch.float64).softmax(1))
        values += feed(collector, model, [(x, weights[-1], False)])
    values = torch.cat([record["head"] for record, _, _ in values])
    found = collector.statistics()["head"].f
    torch.testing.assert_close(found, f_statistic(values, torch.cat(weights)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("exact", [False, True])
def test_sums_of_several_processes_merge_to_the_single_process_statistic(attached, exact):
    """Also where a layer ran in one process only."""
    model, data = network(), list(batches())
    sums, statistics = {}, {}
    for name, steps in {"whole": range(6), "first": [0, 2, 4], "second": [1, 3, 5]}.items():
        collector = attached(collecting(model, exact))
        feed(collector, model, [data[step] for step in steps])
        collector.remove()
        sums[name] = []
        if name == "first":  # where `sometimes` never ran
            first = collector
        else:
            statistics[name] = collector.statistics(lambda own, name=name: sums[name].append(own) or own)
    others = iter(sums["second"])
    merged = first.statistics(lambda own: merge_sums(own, next(others)))
    assert next(others, None) is None
    for name, expected in statistics["whole"].items():
        torch.testing.assert_close(merged[name].f, expected.f, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(merged[name].mean, expected.mean)
        torch.testing.assert_close(merged[name].mean_square, expected.mean_square)


@pytest.mark.parametrize("exact", [False, True])
def test_a_state_taken_in_the_middle_of_an_epoch_continues(attached, exact):
    """To the last digits: on some processors a product depends on where in memory its factors are."""
    data = list(batches())
    straight_model, resumed_model = network(), network()
    straight = attached(collecting(straight_model, exact))
    feed(straight, straight_model, data, torch.optim.SGD(straight_model.parameters(), 0.1))

    first = attached(collecting(resumed_model, exact))
    optimizer = torch.optim.SGD(resumed_model.parameters(), 0.1)
    feed(first, resumed_model, data[:2], optimizer)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    first.remove()
    file.seek(0)
    second = attached(collecting(resumed_model, exact))
    second.load_state_dict(torch.load(file, weights_only=True))
    feed(second, resumed_model, data[2:], optimizer)
    for name, found in second.statistics().items():
        expected = straight.statistics()[name]
        for field in ("f", "spread", "mean", "mean_square", "variance", "shared"):
            torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-10, atol=1e-12)
        assert found.learned.equal(expected.learned)


def test_states_of_earlier_versions_have_one_answer_for_all_features_of_a_layer(attached):
    model = network()
    collector = attached(collecting(model))
    feed(collector, model, batches())
    state = collector.state_dict()
    answers = [bool(learned.all()) for learned in state["learned"]]
    again = collecting(network())
    again.load_state_dict({**state, "learned": answers})
    assert [found.learned.tolist() for found in again.statistics().values()] == [
        found.learned.tolist() for found in collector.statistics().values()
    ]
    assert set(answers) == {True, False}


def test_a_state_of_an_earlier_version_starts_the_epoch_afresh(attached, caplog):
    model = network()
    collector = attached(collecting(model))
    collector.load_state_dict({"num_classes": C, "sums": {}})
    assert "earlier version" in caplog.text
    feed(collector, model, batches())
    assert collector.statistics()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("resumed", [False, True])
def test_nan_and_inf_activations_are_an_error_that_names_the_first_layer_and_batch(attached, bad, step, resumed):
    model = network()
    model.tokens.weight.requires_grad_(False)
    collector = attached(collecting(model))
    data = list(batches())
    handle = None
    for index, item in enumerate(data):
        if index == step:
            handle = model.tokens.register_forward_hook(lambda m, a, out: out.index_fill(1, torch.tensor([2]), bad))
        elif handle is not None:
            handle.remove()
        if resumed and index == 1:
            state = copy.deepcopy(collector.state_dict())
            collector.remove()
            collector = attached(collecting(model))
            collector.load_state_dict(state)
        feed(collector, model, [item])
    with pytest.raises(
        ValueError, match=rf"NaN or inf in the activations at the input of layer 'twice'.*batch {step} "
    ):
        collector.statistics()


def test_nan_at_an_output_names_the_side(attached):
    model = nn.Sequential(nn.BatchNorm1d(2))
    collector = attached(ActivationCollector([Probe("0", model[0], "output")], C))
    collector.attach()
    model(torch.tensor([[1.0, torch.nan], [2.0, 0.0]]))
    collector.update(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="at the output of layer '0'"):
        collector.statistics()


def test_a_layer_that_never_ran_has_no_statistics_and_does_not_touch_the_others(attached):
    data = [(x, labels, False) for x, labels, _ in batches()]
    model, again = network(), network()
    together, without = attached(collecting(model)), attached(collecting(again, layers=["twice", "head"]))
    feed(together, model, data)
    feed(without, again, data)
    found, expected = together.statistics(), without.statistics()
    assert set(found) == {probe.name for probe in probes(model)} - {"sometimes"}
    torch.testing.assert_close(found["head"].f, expected["head"].f)
    torch.testing.assert_close(found["head"].mean, expected["head"].mean)


def test_layers_that_run_on_windows_have_no_statistics_and_the_others_have_theirs(attached):
    """Nobody knows which of the rows belong to which instance."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1), nn.Linear(3, 3)).double()
    collector = attached(ActivationCollector([Probe("0", model[0]), Probe("3", model[3])], 3))
    x, labels = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 3
    for rows in torch.arange(30).split(10):
        collector.attach()
        model(x[rows])
        collector.remove()
        collector.update(labels[rows])
    found = collector.statistics()
    assert found.keys() == {"0"}
    expected, _ = feature_selection.f_classif(x.numpy(), labels.numpy())
    torch.testing.assert_close(found["0"].f, torch.from_numpy(expected))
    assert collector.unmatched == {"3": "ran on 20 instances, but the batch has 10 labels"}
    again = ActivationCollector([Probe("0", model[0]), Probe("3", model[3])], 3)
    again.load_state_dict(collector.state_dict())
    assert again.unmatched == collector.unmatched


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.tensor([0, 1, 3, 0]), "0 … 2, found 3"),
        (torch.tensor([0.0, 1.0, 1.0, 0.0]), r"float32.*\(N, 3\)"),
        (torch.tensor([0, 1, 2]), "'0' ran on 4 instances, but the batch has 3 labels"),
    ],
)
def test_labels_that_do_not_fit_are_an_error_and_nothing_is_added(attached, labels, said):
    model = nn.Sequential(nn.Linear(3, 2)).double()
    collector = attached(ActivationCollector([Probe("0", model[0])], C))

    def step(x, labels):
        collector.attach()
        model(x)
        collector.remove()
        collector.update(labels)

    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step(x[:10], torch.arange(10) % C)
    with pytest.raises(ValueError, match=said):
        step(x[:4], labels)
    step(x[10:], torch.arange(10, 20) % C)
    assert_equals_sklearn(collector.statistics()["0"].f, x, torch.arange(20) % C)


def test_a_batch_without_instances_adds_nothing(attached):
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x, labels = (
        torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.arange(20) % C,
    )
    collector = attached(ActivationCollector([Probe("0", model[0])], C))
    for part in (slice(0, 0), slice(0, 12), slice(12, 12), slice(12, 20)):
        collector.attach()
        model(x[part])
        collector.remove()
        collector.update(labels[part])
    assert_equals_sklearn(collector.statistics()["0"].f, x, labels)


def test_removed_hooks_gather_nothing_and_change_nothing():
    model, plain = network(), network()
    collector = collecting(model, exact=True)
    collector.attach()
    collector.attach()
    collector.remove()
    before = copy.deepcopy(collector.state_dict())
    rng_state = torch.get_rng_state()
    for x, labels, extra in batches():
        out, expected = model(x, extra), plain(x, extra)
        assert torch.equal(out, expected)
        cross_entropy(out, labels).backward()
        cross_entropy(expected, labels).backward()
        collector.update(labels)
    assert torch.equal(torch.get_rng_state(), rng_state)
    torch.testing.assert_close(collector.state_dict(), before, rtol=0, atol=0)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_attached_hooks_leave_outputs_gradients_and_random_numbers_as_they_are(attached):
    model, plain = network(), network()
    collector = attached(collecting(model, exact=True))
    rng_state = torch.get_rng_state()
    collector.attach()
    for x, labels, extra in batches():
        out, expected = model(x, extra), plain(x, extra)
        assert torch.equal(out, expected)
        cross_entropy(out, labels).backward()
        cross_entropy(expected, labels).backward()
        collector.update(labels)
    assert torch.equal(torch.get_rng_state(), rng_state)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert not any(part.requires_grad for part in collector.state_dict()["moments"].values())


def test_copies_and_transforms_of_the_network_are_not_observed(attached):
    """A teacher that is copied while the hooks are open has them, too; a Jacobian is no batch."""
    model = network()
    collector = attached(collecting(model))
    collector.attach()
    copied = copy.deepcopy(model)
    x, labels, _ = next(batches())
    model(x)
    copied(x + 1)
    torch.func.vmap(torch.func.jacrev(model.conv))(x)
    collector.update(labels)
    alone = attached(collecting(model))
    alone.attach()
    model(x)
    alone.update(labels)
    torch.testing.assert_close(collector.state_dict(), alone.state_dict(), rtol=0, atol=0)


def test_removing_takes_every_hook_away():
    model = network()
    collector = collecting(model)

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before = hooks()
    collector.attach()
    assert hooks() != before
    collector.remove()
    assert hooks() == before


@pytest.mark.parametrize("exact", [False, True])
def test_reset_and_discard_forget(attached, exact):
    model = network()
    collector = attached(collecting(model, exact=exact))
    feed(collector, model, batches(seed=1))
    collector.reset()
    collector.attach()
    model(next(batches(seed=2))[0])
    collector.remove()
    collector.discard()  # a step whose update never came
    records = feed(collector, model, batches(seed=3))
    statistics = collector.statistics()
    values, labels = reference(records, "head")
    torch.testing.assert_close(statistics["head"].mean, values.mean(0))
    f = f_statistic(values, labels)
    torch.testing.assert_close(statistics["head"].f, f.expand(C, 5) if exact else f, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("side", ["input", "output"])
def test_what_later_layers_do_in_place_does_not_reach_the_statistics(attached, side):
    """Activations are those the layer saw, also before a ReLU(inplace=True)."""
    torch.manual_seed(0)
    bn, fc, x = nn.BatchNorm1d(3).double().eval(), nn.Linear(3, 3), torch.randn(30, 3, dtype=torch.float64)
    bn.running_mean.fill_(0.5)
    labels = torch.arange(30) % C
    probe = Probe("probed", bn if side == "output" else fc.double(), side)
    collector = attached(ActivationCollector([probe], C))
    collector.attach()
    with torch.no_grad():
        seen = bn(x) if side == "output" else x.clone()
        expected = seen.clone()
        if side == "input":
            fc(seen)
        relu(seen, inplace=True)
    collector.remove()
    collector.update(labels)
    assert_equals_sklearn(collector.statistics()["probed"].f, expected, labels)


def test_memory_does_not_grow_with_the_number_of_instances(attached):
    model = network()
    collector = attached(collecting(model))
    sizes = []
    for _ in range(3):
        feed(collector, model, batches())
        sizes.append(sum(part.numel() for part in collector.state_dict()["moments"].values()))
        assert collector._buffer._rows.nbytes <= 8 * 2**20 and not collector._buffer.ran
    assert sizes[0] == sizes[-1] == (3 * C + 3) * sum(probe.num_features for probe in probes(model))


def test_instances_without_labels_alone_are_an_error_that_says_so(attached):
    model = network()
    collector = attached(collecting(model, layers=["head"]))
    for x, labels, extra in batches():
        model(x, extra)
        collector.update(torch.full_like(labels, -100))
    with pytest.raises(ValueError, match=r"'head'.* ran on an instance with a label.*all of them are -100"):
        collector.statistics()
