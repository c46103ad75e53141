"""The penalties on the scales of batch norms and on weights."""

import copy

import pytest
import torch
from lightning.pytorch import Callback

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.l1 import ScaleL1, WeightL1
from tests.conftest import Classifier, loader, mlp, trainer
from tests.test_channel_fit import residual_net


def scales(model):
    return torch.cat([m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)])


def plain(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_one_step_moves_the_scales_by_the_subgradient():
    def step(callbacks):
        torch.manual_seed(0)
        model = Classifier(residual_net(), plain)
        trainer(callbacks, max_epochs=1, limit_train_batches=1).fit(model, loader())
        return scales(model)

    torch.testing.assert_close(step([ScaleL1(0.01)]), step([]) - 0.1 * 0.01, atol=1e-6, rtol=0)


def one_step(model, callbacks=()):
    trainer(callbacks, max_epochs=1, limit_train_batches=1).fit(model, loader())
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def linear_weights(model):
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]


def test_one_step_is_that_of_the_loss_with_the_penalty():
    class Penalised(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.01 * sum(w.abs().sum() for w in linear_weights(self))

    net = mlp()
    expected = one_step(Penalised(copy.deepcopy(net), plain))
    found = one_step(Classifier(copy.deepcopy(net), plain), [WeightL1(0.01)])
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found["net.1.weight"], one_step(Classifier(net, plain))["net.1.weight"])


def test_excluded_layers_are_not_penalised():
    net = mlp()
    without = one_step(Classifier(copy.deepcopy(net), plain))
    found = one_step(Classifier(net, plain), [WeightL1(0.01, exclude="*.3")])
    changed = [name for name in without if not torch.equal(found[name], without[name])]
    assert changed == ["net.1.weight", "net.5.weight"]


def test_pruned_weights_stay_zero():
    pruning = ScreeningPruningCallback(
        granularity="weight", amount=0.9, criterion="random", schedule="constant", end_epoch=3, slim=False
    )
    model = Classifier(mlp(), plain)
    trainer([pruning, WeightL1(0.01)], max_epochs=3).fit(model, loader())
    for name, mask in pruning.masks.items():
        assert torch.equal(model.get_parameter(f"{name}.weight") != 0, mask)


@pytest.mark.parametrize(
    ("penalty", "make"),
    [(ScaleL1(0.01), residual_net), (WeightL1(0.01), mlp)],
)
def test_it_ends_where_fine_tuning_begins(penalty, make):
    class Watch(Callback):
        def __init__(self):
            self.added = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            before = [p.grad.clone() for p in pl_module.parameters()]
            penalty.on_before_optimizer_step(trainer, pl_module, optimizer)
            after = [p.grad for p in pl_module.parameters()]
            self.added.append(not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
            for gradient, value in zip(after, before, strict=True):
                gradient.copy_(value)

    watch = Watch()
    granularity = "channel" if isinstance(penalty, ScaleL1) else "weight"
    pruning = ScreeningPruningCallback(
        granularity=granularity, amount=0.5, criterion="magnitude", schedule="one_shot", end_epoch=2
    )
    trainer([pruning, penalty, watch], max_epochs=4).fit(Classifier(make()), loader())
    assert watch.added == [True] * 8 + [False] * 8


def test_nothing_to_penalise_and_negative_strength_are_errors():
    with pytest.raises(ValueError, match="no batch norm with a scale"):
        trainer([ScaleL1()]).fit(Classifier(mlp()), loader())
    with pytest.raises(ValueError, match="matches no layer"):
        trainer([WeightL1(exclude="nothing")]).fit(Classifier(mlp()), loader())
    for penalty in (ScaleL1, WeightL1):
        with pytest.raises(ValueError, match="strength.*-1"):
            penalty(-1)
