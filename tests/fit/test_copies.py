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
from lightning_fscreen.slimming.carried import plan_of
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

    @property
    def nets(self):
        return [self.net] if self.kind == "none" else [self.net, self.average]

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].double(), batch[1]), batch_idx)

    def validation_step(self, batch, batch_idx):
        self(batch[0].double())

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
        averages = [call._average_model.module for call in trainer.callbacks if isinstance(call, EMAWeightAveraging)]
        return [net for owner in (module, *averages) for net in owner.nets]

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


@pytest.mark.parametrize(("first", "kind"), [(True, "averaged"), (False, "by hand")])
def test_lightnings_average_is_pruned_saved_and_resumed_with_the_network(first, kind, tmp_path):
    """Its checkpoints hold the averages in place of the weights, validation swaps both, the fit ends with averages."""

    def fit(model, ckpt_path=None):
        ours, ema = pruning(), EMAWeightAveraging(decay=0.9)
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        callbacks = [*([ours, ema] if first else [ema, ours]), saving]
        torch.manual_seed(1)
        fit = trainer(callbacks, max_epochs=3, enable_checkpointing=True)
        fit.fit(model, loader(count=128), loader(count=64), ckpt_path=ckpt_path)
        return ours, ema

    torch.manual_seed(0)
    model = Averaging(kind)
    masked, fresh = copy.deepcopy(model), copy.deepcopy(model)
    ours, ema = fit(model)
    fitted(masked, [Masked(ours.masks, 1), EMAWeightAveraging(decay=0.9)])
    x = digits(8)[0].double()
    assert model.net[0].out_channels == ema._average_model.module.net[0].out_channels < 8
    for large, small in zip(masked.nets, model.nets, strict=True):
        assert difference(outputs(large, x), outputs(small, x)) < 1e-9
    last = load_from_checkpoint(Averaging, tmp_path / "epoch=2.ckpt", kind=kind)
    assert difference(outputs(last.net, x), outputs(model.net, x)) == 0
    for epoch in (0, 1):  # before and after slimming
        again = copy.deepcopy(fresh)
        fit(again, tmp_path / f"epoch={epoch}.ckpt")
        for other, own in zip(again.nets, model.nets, strict=True):
            assert difference(outputs(other, x), outputs(own, x)) == 0


@pytest.mark.parametrize("kind", ["averaged", "none"])
def test_units_that_weights_leave_behind_go_from_the_average_at_the_end(kind):
    torch.manual_seed(0)
    model = Averaging(kind, net=lambda: mlp(hidden=8))
    masked = copy.deepcopy(model)
    options = {"granularity": "weight", "amount": 0.9, "criterion": "magnitude", "include": "net.*"}
    callback = pruning(**options)
    for net, ours in ((model, callback), (masked, pruning(**options, slim=False))):
        fitted(net, [ours, *([EMAWeightAveraging(decay=0.9)] if kind == "none" else [])])
    x = digits(8)[0].double()
    assert callback.plan and callback.report().removed.keys() <= {"net.1", "net.3"}
    for large, small in [(masked.net, model.net), *([(masked.average, model.average)] if kind == "averaged" else [])]:
        assert small[1].out_features == model.net[1].out_features < 8
        assert not bool(large[1].weight[~callback.masks["net.1"]].any())
        assert difference(outputs(large, x), outputs(small, x)) < 1e-12


class Held(Callback):
    """An average by hand of the whole module, made when the training starts; nothing says what it is."""

    def on_train_start(self, trainer, module):
        self.average = copy.deepcopy(module)

    def on_train_batch_end(self, trainer, module, *args):
        for mine, theirs in zip(self.average.parameters(), module.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.1)


def test_copies_that_callbacks_make_follow_and_begin_again_with_rewound_weights():
    model, held = Averaging("averaged"), Held()
    callback = pruning(rewind_weights=True)
    rewound = {}

    class Look(Callback):
        def on_train_epoch_start(self, trainer, module):
            if callback.plan is not None and not rewound:
                for name, net in (
                    ("held", held.average.net),
                    ("module", module.average),
                    ("nested", held.average.average),
                ):
                    rewound[name] = difference(outputs(module.net, digits(8)[0]), outputs(net, digits(8)[0]))

    fitted(model, [callback, held, Look()])
    assert rewound == {"held": 0, "module": 0, "nested": 0}
    assert plan_of(held.average).is_like(plan_of(model)) and plan_of(model).cuts.keys() >= {"net.0.weight"}


class Auxiliary(nn.Module):
    """Two heads of the same class and size; in training it returns the outputs of both."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.pools = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Identity()) for _ in range(2))  # without parameters
        self.head, self.other = (
            nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))
            for _ in range(2)
        )

    def forward(self, x):
        x = self.stem(x)
        return (self.head(x), self.other(x)) if self.training else self.head(x)


def test_an_auxiliary_head_that_no_loss_reaches_is_no_copy_of_another_part():
    class UsesOne(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0])[0], batch[1])

    model, callback = UsesOne(Auxiliary()), pruning()
    fitted(model, [callback])
    report = callback.report()
    assert not report.not_removed
    assert {layer.name for layer in report.layers} == {"net.stem.1", "net.head.1", "net.other.1"}
    assert report.after.params == sum(p.numel() for p in model.parameters()) < report.before.params
