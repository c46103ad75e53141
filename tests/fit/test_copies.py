"""Moving averages and teachers in a fit: pruned with the network, small with it, resumed; a fixed teacher stays."""

import copy
import logging

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_fscreen import ScreeningPruningCallback, load_from_checkpoint
from lightning_fscreen.slimming.plan import plan_of
from tests.conftest import Classifier, digits, loader, mlp, trainer
from tests.slimming import difference, outputs


def norms():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


class Ema(nn.Module):
    """As timm's ModelEmaV3, in a few lines."""

    def __init__(self, net, decay=0.9):
        super().__init__()
        self.module, self.decay = copy.deepcopy(net), decay

    @torch.no_grad()
    def update(self, net):
        for mine, theirs in zip(self.module.state_dict().values(), net.state_dict().values(), strict=True):
            mine.copy_(self.decay * mine + (1 - self.decay) * theirs if mine.is_floating_point() else theirs)


class Averaging(Classifier):
    """Has an average of its network, by one of the common means, and a teacher that never changes."""

    def __init__(self, kind="averaged", net=norms, mask=None):
        super().__init__(net().double())
        self.kind, self.mask = kind, mask
        self.teacher = copy.deepcopy(self.net)
        if kind == "averaged":
            self.ema = AveragedModel(self.net, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
        elif kind == "timm":
            self.ema = Ema(self.net)
        elif kind == "by hand":
            self.ema = copy.deepcopy(self.net).requires_grad_(False)

    @property
    def average(self):
        return self.ema if self.kind == "by hand" else self.ema.module

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].double(), batch[1]), batch_idx)

    def on_train_batch_end(self, *args):
        if self.kind == "averaged":
            self.ema.update_parameters(self.net)
        elif self.kind == "timm":
            self.ema.update(self.net)
        elif self.kind == "by hand":
            for mine, theirs in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)


class Masked(Callback):
    """The oracle: prunes what another fit has pruned, in network and averages, and holds it at zero."""

    def __init__(self, masks, epoch):
        self.masks, self.epoch = masks, epoch

    def nets(self, trainer, module):
        outer = [c._average_model.module.net for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)]
        return [module.net, *outer, *([module.average] if module.kind != "none" else [])]

    @torch.no_grad()
    def zero(self, nets):
        for net in nets:
            for name, mask in self.masks.items():
                gate = net.get_submodule(name.removeprefix("net."))
                gate.weight[~mask] = gate.bias[~mask] = 0

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.epoch:
            self.zero(self.nets(trainer, module))

    def on_train_batch_end(self, trainer, module, *args):  # after the step, before averages are taken
        if trainer.current_epoch >= self.epoch:
            self.zero([module.net])


def pruning(**options):
    return ScreeningPruningCallback(
        **{"amount": 0.5, "schedule": "one_shot", "end_epoch": 1, "granularity": "channel", **options}
    )


def fitted(model, callbacks, **options):
    torch.manual_seed(1)
    fit = trainer(callbacks, max_epochs=3, **options)
    fit.fit(model, loader(count=128))
    return fit


@pytest.mark.parametrize("kind", ["averaged", "timm", "by hand"])
def test_an_average_in_the_module_goes_on_as_that_of_the_masked_network(kind, caplog):
    torch.manual_seed(0)
    model = Averaging(kind)
    masked = copy.deepcopy(model)
    callback = pruning()
    with caplog.at_level(logging.INFO):
        fitted(model, [callback])
    name = "ema" if kind == "by hand" else "ema.module"
    assert f"'{name}', a copy of 'net', follows it" in caplog.text
    assert "'teacher', a copy of 'net', has not changed" in caplog.text
    assert set(callback.masks) == {"net.1", "net.4"} and f"{name}.1" in callback.report().not_pruned
    fitted(masked, [Masked(callback.masks, 1)])
    x = digits(8)[0].double()
    assert model.average[0].out_channels == model.net[0].out_channels < 8 == model.teacher[0].out_channels
    assert plan_of(model.average) == plan_of(model.net)
    assert difference(outputs(masked.average, x), outputs(model.average, x)) < 1e-9
    assert difference(outputs(masked.net, x), outputs(model.net, x)) < 1e-9
    assert difference(outputs(masked.teacher, x), outputs(model.teacher, x)) == 0
