"""A loss that is scaled changes neither penalties nor rankings, whatever optimizer unscales the gradients."""

import copy

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.fit.scaling import gradient_scale
from lightning_fscreen.l1 import ScaleL1, WeightL1
from tests.conftest import Classifier, ConvNet, loader, trainer


def adam(fused):
    return lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=fused)


def sgd(fused):
    return lambda parameters: torch.optim.SGD(parameters, lr=0.01, fused=fused)


def fit(net, callbacks, make_optimizer, **options):
    """With half precision and the loss scaled, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    model = Classifier(copy.deepcopy(net), make_optimizer)
    run = trainer(callbacks, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **options)
    run.fit(model, loader())
    return model


@pytest.mark.parametrize("penalty", [ScaleL1(0.05), WeightL1(0.05)])
@pytest.mark.parametrize("fused", [False, True])
def test_the_penalty_is_that_of_the_loss(penalty, fused):
    def step(callbacks):
        return dict(fit(net, callbacks, sgd(fused), max_epochs=1, limit_train_batches=1).named_parameters())

    net = ConvNet()
    with torch.no_grad():  # signs of both kinds
        net.norm.weight[::2] *= -1
    before, plain, penalised = dict(net.named_parameters()), step([]), step([penalty])
    moved = 0
    for name, parameter in plain.items():
        difference = (parameter - penalised[name]).detach()
        if bool(difference.any()):
            moved += 1
            expected = 0.01 * 0.05 * before[name.removeprefix("net.")].detach().sign()
            torch.testing.assert_close(difference, expected, atol=1e-6, rtol=0)
    assert moved == (1 if isinstance(penalty, ScaleL1) else 4)


@pytest.mark.parametrize("criterion", ["gradient", "taylor"])
def test_gradients_are_ranked_by_their_own_size(criterion):
    class Remembers(ScreeningPruningCallback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            self.seen = self._collection.gradients().get("net.left") or self.seen

    net, seen = ConvNet(), []
    for fused in (False, True):
        callback = Remembers("weight", criterion=criterion, amount=0.5, end_epoch=1)
        fit(net, [callback], adam(fused), max_epochs=2, limit_train_batches=1)
        seen.append(callback)
    for part in ("gradient", "taylor"):
        values = [getattr(callback.seen, part) for callback in seen]
        torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-8)
    for name, mask in seen[0].masks.items():
        assert bool((mask == seen[1].masks[name]).float().mean() > 0.99), name


def test_what_is_not_scaled_has_no_factor():
    class Asks(ScreeningPruningCallback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            self.scale = gradient_scale(trainer, optimizer)

    for make, options, expected in ((adam(True), {}, None), (adam(False), {"plugins": []}, None)):
        callback = Asks("weight", amount=0.5, end_epoch=1)
        trainer([callback], max_epochs=2, limit_train_batches=1, **options).fit(Classifier(ConvNet(), make), loader())
        assert callback.scale is expected
    callback = Asks("weight", amount=0.5, end_epoch=1)
    fit(ConvNet(), [callback], adam(True), max_epochs=2, limit_train_batches=1)
    assert callback.scale == 2.0**14
