"""Gradient sums against gradients computed by hand, and in a Trainer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.members import Members
from lightning_fscreen.ranking.criteria import CRITERIA, Criterion
from lightning_fscreen.statistics.gradients import GradientSums
from tests.conftest import Classifier, digits, loader, mlp, trainer
from tests.test_channel_fit import residual_net


def test_means_over_the_steps():
    weight, bias = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([3.0, 0.5]))
    optimizer = torch.optim.SGD([weight, bias], lr=0.1)
    sums = GradientSums({"a": Members(weight), "b": Members(weight, (bias,))})
    for first, second in (([1.0, -1.0], [2.0, 2.0]), ([3.0, 2.0], [-1.0, 0.0])):
        weight.grad, bias.grad = torch.tensor(first), torch.tensor(second)
        sums.add(optimizer)
    found = sums.statistics()
    assert found["a"].gradient.tolist() == [2.0, 1.5]
    assert found["a"].taylor.tolist() == [2.0, 3.0]
    assert found["b"].taylor.tolist() == [(7 + 0) / 2, (3 + 4) / 2]


def test_overflow_counts_as_zero_and_half_precision_is_summed_in_float32():
    weight = nn.Parameter(torch.tensor([300.0, 1.0], dtype=torch.float16))
    weight.grad = torch.tensor([300.0, float("inf")], dtype=torch.float16)
    sums = GradientSums({"a": Members(weight)})
    sums.add(torch.optim.SGD([weight], lr=0.1))
    assert sums.statistics()["a"].taylor.tolist() == [90_000.0, 0.0]


def test_only_the_optimizer_that_steps_counts_and_layers_without_gradient_are_left_out():
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    one.grad, other.grad = torch.ones(2), torch.ones(2)
    sums = GradientSums({"one": Members(one), "other": Members(other)})
    sums.add(torch.optim.SGD([one], lr=0.1))
    assert list(sums.statistics()) == ["one"]
    with pytest.raises(ValueError, match=r"none of the layers \['other'\] had a gradient"):
        GradientSums({"other": Members(other)}).statistics()


def test_the_state_goes_on_where_it_was():
    weight = nn.Parameter(torch.randn(3))
    weight.grad = torch.randn(3)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    sums, again = GradientSums({"a": Members(weight)}), GradientSums({"a": Members(weight)})
    sums.add(optimizer)
    again.load_state_dict(sums.state_dict())
    sums.add(optimizer)
    again.add(optimizer)
    assert torch.equal(sums.statistics()["a"].taylor, again.statistics()["a"].taylor)


@pytest.mark.parametrize("criterion", ["gradient", "taylor"])
def test_pruning_at_initialisation_is_decided_by_the_gradients_of_the_first_batch(criterion):
    """SNIP, computed by hand: |w·∂L/∂w| of one batch at the initial weights."""
    model = Classifier(mlp())
    loss = F.cross_entropy(model.net(digits()[0][:64]), digits()[1][:64])
    weights = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    gradients = torch.autograd.grad(loss, list(weights.values()))
    scores = {
        name.removesuffix(".weight"): (g if criterion == "gradient" else g * p).abs()
        for (name, p), g in zip(weights.items(), gradients, strict=True)
    }
    total = sum(score.numel() for score in scores.values())
    cut = torch.cat([score.flatten() for score in scores.values()]).sort().values[round(0.8 * total)]

    callback = ScreeningPruningCallback(
        granularity="weight", amount=0.8, criterion=criterion, end_epoch=0, slim=False, schedule="one_shot"
    )
    trainer([callback], max_epochs=2).fit(model, loader())
    assert callback.report().total - callback.report().kept == round(0.8 * total)
    assert [entry["applied"] for entry in callback.history] == [pytest.approx(0.8, abs=1e-3)] * 2
    for name, kept in callback.masks.items():
        assert torch.equal(kept, scores[name] >= cut)
        assert bool((model.get_submodule(name).weight[~kept] == 0).all())


@pytest.mark.parametrize("criterion", ["screening", "taylor", "magnitude", "random"])
def test_channels_pruned_at_initialisation_are_gone_from_the_second_epoch_on(criterion):
    model = Classifier(residual_net())
    before = sum(p.numel() for p in model.parameters())
    callback = ScreeningPruningCallback(amount=0.5, criterion=criterion, end_epoch=0)
    trainer([callback], max_epochs=2).fit(model, loader())
    assert callback.plan is not None
    assert sum(p.numel() for p in model.parameters()) < before
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=0.02)


def test_gradients_are_those_of_accumulated_and_of_several_steps(monkeypatch):
    """One epoch, weights that do not move: the mean over two steps of two batches each."""
    model = Classifier(mlp(), lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    images, labels = digits()
    steps = []
    for rows in (slice(0, 128), slice(128, 256)):
        loss = F.cross_entropy(model.net(images[rows]), labels[rows])  # the mean over two equal batches
        steps.append(torch.autograd.grad(loss, model.net[1].weight)[0].abs())
    found = {}

    def spy(context):
        found.update(context.layers)
        return {name: layer.weight.abs() for name, layer in context.layers.items()}

    monkeypatch.setitem(CRITERIA, "spy", Criterion(spy, lambda screening_weight: False, needs_gradients=True))
    callback = ScreeningPruningCallback(
        granularity="weight", amount=0.5, criterion="spy", end_epoch=1, schedule="one_shot"
    )
    trainer([callback], max_epochs=1, accumulate_grad_batches=2).fit(model, loader())
    torch.testing.assert_close(found["net.1"].gradient, (steps[0] + steps[1]) / 2)
