"""Soft pruning, rewinding of weights, L1 on the scales: what the recipes of the literature need beside a criterion."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_fscreen import ScreeningPruningCallback
from tests.conftest import Classifier, ConvNet, loader, mlp, trainer
from tests.test_channel_fit import residual_net


class Watch(Callback):
    """Values at the beginning of every epoch."""

    def __init__(self):
        self.states, self.momenta = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.states.append(copy.deepcopy(pl_module.state_dict()))
        self.momenta.append(len(trainer.optimizers[0].state))


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_soft_pruning_zeroes_what_may_grow_again_until_the_window_ends(granularity):
    callback = ScreeningPruningCallback(
        granularity=granularity, amount=0.5, soft=True, criterion="random", schedule="constant", end_epoch=3, slim=False
    )
    watch = Watch()
    model = Classifier(residual_net() if granularity == "channel" else mlp())
    trainer([callback, watch], max_epochs=5).fit(model, loader())
    total, kept = callback.report().total, callback.report().kept
    assert total - kept == pytest.approx(0.5 * total, abs=1)
    assert [entry["applied"] for entry in callback.history] == [pytest.approx(0.5, abs=0.02)] * 5

    def zeros(state):
        return {name: state[f"{name}.weight"] == 0 for name in callback.masks}

    def count(masks):
        return sum(int(mask.sum()) for mask in masks.values())

    assert count(zeros(watch.states[1])) == count(zeros(watch.states[2])) == total - kept
    moved = sum(int((a & ~zeros(watch.states[2])[n]).sum()) for n, a in zeros(watch.states[1]).items())
    assert moved > 0  # some came back
    held = {name: ~mask for name, mask in callback.masks.items()}
    for state in (*watch.states[3:], model.state_dict()):
        assert all(bool((state[f"{name}.weight"][mask] == 0).all()) for name, mask in held.items())


def test_softly_pruned_weights_are_reported_as_they_are_when_training_ends_early():
    callback = ScreeningPruningCallback(granularity="weight", amount=0.5, soft=True, schedule="constant", end_epoch=4)
    model = Classifier(mlp())
    trainer([callback], max_epochs=5, max_steps=6).fit(model, loader(batch_size=64))
    assert callback.history[0]["applied"] == pytest.approx(0.5, abs=0.01)
    left = sum(int(model.get_parameter(f"{name}.weight").count_nonzero()) for name in callback.masks)
    report = callback.report()
    assert report.kept - sum(layer.dead for layer in report.layers) == left  # these went with their units


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_rewound_weights_are_the_initial_ones_where_they_are_left(granularity):
    callback = ScreeningPruningCallback(
        granularity=granularity, amount=0.5, rewind_weights=True, schedule="one_shot", end_epoch=2
    )
    watch = Watch()
    model = Classifier(residual_net() if granularity == "channel" else mlp())
    initial = copy.deepcopy(model.state_dict())
    trainer([callback, watch], max_epochs=3).fit(model, loader())
    assert watch.momenta[1] > 0
    rewound = watch.states[2]
    cut = callback.plan.cut if granularity == "channel" else lambda name, tensor: tensor
    for name, value in initial.items():
        found, expected = rewound[name], cut(name, value)
        layer = name.rpartition(".")[0]
        if layer in callback.masks and name.endswith(("weight", "bias")) and granularity == "channel":
            expected = expected * cut(name, callback.masks[layer])
        elif layer in callback.masks and name.endswith("weight"):
            expected = expected * callback.masks[layer]
        assert torch.equal(found, expected), name


def test_rewinding_goes_on_from_a_checkpoint_before_it(tmp_path):
    def fit(callbacks, **arguments):
        torch.manual_seed(1)
        model = Classifier(mlp())
        callback = ScreeningPruningCallback(granularity="weight", amount=0.5, rewind_weights=True, end_epoch=2)
        own = trainer([callback, *callbacks], max_epochs=4, enable_checkpointing=bool(callbacks))
        own.fit(model, loader(), weights_only=True, **arguments)
        return model

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit([saver])
    resumed = fit([], ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_gradients_that_somebody_changes_after_us_move_nothing_beyond_the_epoch():
    class Noisy(Classifier):
        def on_before_optimizer_step(self, optimizer):
            for parameter in self.parameters():
                parameter.grad += 0.01 * torch.randn_like(parameter)

    callback = ScreeningPruningCallback(granularity="weight", amount=0.7, slim=False, end_epoch=2)
    model = Noisy(ConvNet())
    trainer([callback]).fit(model, loader())
    modules = dict(model.named_modules())
    assert all(bool((modules[name].weight[~kept] == 0).all()) for name, kept in callback.masks.items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"soft": True, "end_epoch": 0}, "soft=True.*end_epoch later"),
        ({"rewind_weights": True, "bias": "mean"}, 'bias=.mean.*bias="zero"'),
        ({"end_epoch": 0, "start_epoch": 1}, "end_epoch must lie after start_epoch=1"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        ScreeningPruningCallback(**arguments)
