"""The penalty on the scales of batch norms."""

import pytest
import torch
from lightning.pytorch import Callback

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.l1 import ScaleL1
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


def test_it_ends_where_fine_tuning_begins():
    class Watch(Callback):
        def __init__(self):
            self.added = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            norm = next(m for m in pl_module.modules() if isinstance(m, torch.nn.BatchNorm2d))
            before = norm.weight.grad.clone()
            penalty.on_before_optimizer_step(trainer, pl_module, optimizer)
            self.added.append(not torch.equal(before, norm.weight.grad))
            norm.weight.grad.copy_(before)

    penalty, watch = ScaleL1(0.01), Watch()
    pruning = ScreeningPruningCallback(amount=0.5, criterion="magnitude", schedule="one_shot", end_epoch=2)
    trainer([pruning, watch], max_epochs=4).fit(Classifier(residual_net()), loader())
    assert watch.added == [True] * 8 + [False] * 8


def test_nothing_to_penalise_and_negative_strength_are_errors():
    with pytest.raises(ValueError, match="no batch norm with a scale"):
        trainer([ScaleL1()]).fit(Classifier(mlp()), loader())
    with pytest.raises(ValueError, match="strength.*-1"):
        ScaleL1(-1)
