"""What people do with a Trainer: every fit ends on budget, with a smaller network of the same function, or says no."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_fscreen import ScreeningPruningCallback, find_gates, load_slimmed, save_slimmed, slim
from tests.conftest import Classifier, digits, loader, trainer
from tests.saving.test_checkpoints import momentum
from tests.test_channel_fit import Block, residual_net

AMOUNT = {"channel": 0.5, "weight": 0.97}


class Manual(Classifier):
    def __init__(self, net):
        super().__init__(net, momentum)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss / 2)
        if batch_idx % 2:  # gradients may be pending when an epoch ends
            optimizer.step()
            optimizer.zero_grad()


class TwoOptimizers(Manual):
    def configure_optimizers(self):
        parameters = list(self.parameters())
        return [torch.optim.SGD(parameters[::2], lr=0.05, momentum=0.9), torch.optim.AdamW(parameters[1::2], lr=1e-3)]

    def training_step(self, batch, batch_idx):
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class Recomputes(Classifier):
    """Activation checkpointing: blocks run again in the backward pass."""

    def __init__(self, net):
        super().__init__(CheckpointedBlocks(net), momentum)


class CheckpointedBlocks(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.layers = net

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if isinstance(layer, Block) else layer(x)
        return x


class ConfiguredLater(Classifier):
    def __init__(self, net):
        super().__init__(None, momentum)
        self.later = [net]

    def configure_model(self):
        if self.net is None:
            self.net = self.later[0]


class ChannelsLast(Classifier):
    def __init__(self, net):
        super().__init__(net.to(memory_format=torch.channels_last), momentum)

    def forward(self, x):
        return self.net(x.to(memory_format=torch.channels_last))


class SeveralLoaders(Classifier):
    def training_step(self, batch, batch_idx):
        return sum(F.cross_entropy(self(images), labels) for images, labels in batch.values()) / len(batch)


def plain(net):
    return Classifier(net, momentum)


def compiled_part(net):
    net[3] = torch.compile(net[3], backend="aot_eager")
    return plain(net)


def compiled_in_place(net):
    net.compile(backend="aot_eager")
    return plain(net)


def several_loaders():
    return CombinedLoader({"a": loader(32, 128), "b": loader(32, 128)}, "min_size")


CELLS = {
    "plain": (plain, {}, {}),
    "bf16-mixed": (plain, {"precision": "bf16-mixed"}, {}),
    "16-mixed": (plain, {"precision": "16-mixed"}, {}),
    "bf16-true": (plain, {"precision": "bf16-true"}, {}),
    "64-true": (plain, {"precision": "64-true"}, {}),
    "accumulation": (plain, {"accumulate_grad_batches": 3}, {}),
    "clipping by norm": (plain, {"gradient_clip_val": 0.1}, {}),
    "clipping by value": (plain, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {}),
    "manual optimization": (Manual, {}, {}),
    "two optimizers": (TwoOptimizers, {}, {}),
    "activation checkpointing": (Recomputes, {}, {}),
    "configure_model": (ConfiguredLater, {}, {}),
    "channels_last": (ChannelsLast, {}, {}),
    "torch.compile": (lambda net: Classifier(torch.compile(net, backend="aot_eager"), momentum), {}, {}),
    "torch.compile of a part": (compiled_part, {}, {}),
    "torch.compile in place": (compiled_in_place, {}, {}),
    "overfit_batches": (plain, {"overfit_batches": 2}, {}),
    "limit_train_batches": (plain, {"limit_train_batches": 3}, {}),
    "fast_dev_run": (plain, {"fast_dev_run": 2}, {}),
    "barebones": (plain, {"barebones": True}, {}),
    "deterministic": (plain, {"deterministic": True}, {}),
    "detect_anomaly": (plain, {"detect_anomaly": True}, {}),
    "inference_mode off": (plain, {"inference_mode": False}, {}),
    "several loaders": (
        lambda net: SeveralLoaders(net, momentum),
        {},
        {"labels": lambda batch: torch.cat([labels for _, labels in batch.values()]), "criterion": "magnitude"},
    ),
}


class Around(pl.Callback):
    """What the network put out at the end of the last epoch before slimming, and just after it."""

    def __init__(self, callback):
        self.callback, self.before, self.after = callback, None, None

    def outputs(self, model):
        network = copy.deepcopy(getattr(model.net, "_orig_mod", model.net)).double().eval()
        with torch.no_grad():
            return network(digits(64)[0].double())

    def on_train_epoch_end(self, trainer, pl_module):
        if self.callback.plan is None:
            self.before = self.outputs(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.after is None and self.callback.plan is not None:
            self.after = self.outputs(pl_module)


def test_a_compiled_lightning_module():
    model, amount = plain(residual_net()), AMOUNT["weight"]
    callback = ScreeningPruningCallback("weight", amount=amount, end_epoch=2)
    trainer([callback], max_epochs=3).fit(torch.compile(model, backend="aot_eager"), loader(48, 96))
    report = callback.report()
    assert abs(report.kept - round((1 - amount) * report.total)) <= 1
    assert callback.plan and report.after.params == sum(p.numel() for p in model.parameters()) < report.before.params


def test_a_compiled_network_is_slimmed_saved_and_loaded_as_what_it_wraps(tmp_path):
    network, x = residual_net().eval(), digits(8)[0]
    compiled = torch.compile(network, backend="aot_eager")
    assert [gate.name for gate in find_gates(compiled, x)] == [gate.name for gate in find_gates(network, x)]
    expected = compiled(x)
    slim(compiled, {"2.norm1": torch.arange(8) < 8, "4": torch.arange(16) < 16}, x)
    assert torch.equal(compiled(x), expected)
    slim(compiled, {"2.norm1": torch.arange(8) < 5}, x)
    torch.testing.assert_close(compiled(x), network(x))
    save_slimmed(compiled, tmp_path / "slim.safetensors")
    for fresh in (residual_net(), torch.compile(residual_net(), backend="aot_eager")):
        load_slimmed(fresh, tmp_path / "slim.safetensors")
        torch.testing.assert_close(fresh.eval()(x), network(x))


@pytest.mark.parametrize("granularity", list(AMOUNT))
@pytest.mark.parametrize("cell", list(CELLS))
def test_the_fit_ends_on_budget_and_slimming_changes_nothing(cell, granularity):
    make, options, arguments = CELLS[cell]
    model = make(residual_net())
    amount = AMOUNT[granularity]
    callback = ScreeningPruningCallback(granularity, amount=amount, end_epoch=2, **arguments)
    around = Around(callback)
    defaults = {"barebones": True, "max_epochs": 3, "accelerator": "cpu", "callbacks": [callback, around]}
    fit = pl.Trainer(**defaults) if cell == "barebones" else trainer([callback, around], max_epochs=3, **options)
    fit.fit(model, several_loaders() if cell == "several loaders" else loader(48, 144))
    report = callback.report()
    assert abs(report.kept - round((1 - amount) * report.total)) <= 1
    assert callback.plan and report.after.params == sum(p.numel() for p in model.parameters()) < report.before.params
    assert granularity == "weight" or not report.not_removed  # outputs without weights stay
    after = around.outputs(model) if around.after is None else around.after
    tolerance = {"bf16-true": 0.05}.get(cell, 1e-5)  # half precision rounds what is carried into biases
    torch.testing.assert_close(after, around.before, rtol=tolerance, atol=tolerance * float(around.before.abs().max()))
    listed = {id(p) for optimizer in fit.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert granularity == "weight" or listed == set(map(id, model.parameters()))


@pytest.mark.parametrize("granularity", list(AMOUNT))
def test_a_second_fit_after_a_change_of_dtype(granularity):
    model, amount = plain(residual_net()), AMOUNT[granularity]
    callback = ScreeningPruningCallback(granularity, amount=amount, end_epoch=2)
    trainer([callback], max_epochs=3).fit(model, loader(batch_size=48))
    first = callback.report()
    trainer([callback], max_epochs=3, precision="64-true").fit(model.double(), loader(batch_size=48))
    second = callback.report()
    assert second.kept == first.kept and second.after.params == first.after.params
    assert next(model.parameters()).dtype == torch.float64
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert (zeros > 0) == (granularity == "weight")
    assert second.after.nonzero == second.after.params - zeros
    listed = trainer([callback], max_epochs=3)
    listed.fit(model.float(), loader(batch_size=48))
    assert callback.report().kept == first.kept


@pytest.mark.parametrize("channels_first", [True, False])
def test_a_callback_for_weights_goes_on_when_another_one_has_slimmed(channels_first):
    channels = ScreeningPruningCallback("channel", amount=0.5, end_epoch=2)
    weights = ScreeningPruningCallback("weight", amount=0.97, end_epoch=3)
    model = plain(residual_net())
    trainer([channels, weights] if channels_first else [weights, channels]).fit(model, loader(batch_size=48))
    report = weights.report()
    assert abs(report.kept - round(0.03 * report.total)) <= 1
    assert channels.report().kept <= channels.report().total / 2  # weights have taken some more along
    assert channels.plan and sum(p.numel() for p in model.parameters()) < sum(
        p.numel() for p in residual_net().parameters()
    )


def test_repeated_saving_changes_nothing(tmp_path):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for weights_only in (False, True):
                trainer.save_checkpoint(tmp_path / "again.ckpt", weights_only=weights_only)

    models = []
    for callbacks in ([], [Saves()]):
        torch.manual_seed(0)
        model = plain(residual_net())
        trainer([ScreeningPruningCallback(amount=0.5, end_epoch=2), *callbacks]).fit(model, loader(batch_size=48))
        models.append(model)
    for (name, first), second in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(first, second), name
