"""The callback in real trainings: what is pruned, what stays zero, what is left behind."""

import copy
import functools
import inspect
import logging
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.feature_selection import f_classif
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.ranking.criteria import CRITERIA, Criterion
from lightning_fscreen.ranking.schedule import SCHEDULES
from tests.conftest import Classifier, ConvNet, digits, loader, mlp, trainer
from tests.test_channel_fit import residual_net

WeightPruning = functools.partial(ScreeningPruningCallback, granularity="weight")

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


class ZeroWatcher(pl.Callback):
    """After every step, before anything else looks: how many pruned weights are not zero."""

    def __init__(self, callback):
        self.callback = callback
        self.steps = 0
        self.moved = 0

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        modules = dict(pl_module.named_modules())
        for name, kept in self.callback.masks.items():
            self.moved += int((modules[name].weight.detach()[~kept] != 0).sum())
        self.steps += 1


def hooks_of(model):
    return [
        (name, len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_budget_is_met_exactly_at_every_epoch(schedule, scope):
    callback = WeightPruning(amount=0.83, schedule=schedule, scope=scope, start_epoch=1, end_epoch=5)
    trainer([callback], max_epochs=6).fit(Classifier(mlp()), loader())
    total = callback.report().total
    for entry in callback.history:
        progress = min(max((entry["epoch"] + 1 - 1) / 4, 0), 1)
        assert entry["scheduled"] == pytest.approx(0.83 * SCHEDULES[schedule](progress))
        assert abs(entry["applied"] * total - entry["scheduled"] * total) <= 1
    assert [entry["applied"] for entry in callback.history] == sorted(entry["applied"] for entry in callback.history)
    assert abs(callback.report().pruned_fraction * total - 0.83 * total) <= 1
    if scope == "layer":
        assert all(abs(layer.kept - 0.17 * layer.total) <= 1 for layer in callback.report().layers)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("net", [mlp, ConvNet])
def test_pruned_weights_stay_exactly_zero_whatever_the_optimizer_does(optimizer, net):
    callback = WeightPruning(amount=0.7, slim=False, end_epoch=3)
    watcher = ZeroWatcher(callback)
    model = Classifier(net(), OPTIMIZERS[optimizer])
    trainer([callback, watcher], gradient_clip_val=0.5).fit(model, loader())
    assert watcher.steps == 16
    assert watcher.moved == 0
    modules = dict(model.named_modules())
    zeros = sum(int((modules[layer.name].weight == 0).sum()) for layer in callback.report().layers)
    assert zeros == callback.report().total - callback.report().kept == round(0.7 * callback.report().total)


def test_several_optimizers_under_manual_optimization():
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                loss = F.cross_entropy(self(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            first, second = self.net[:3].parameters(), self.net[3:].parameters()
            return torch.optim.SGD(first, lr=0.1, momentum=0.9), torch.optim.AdamW(second, weight_decay=0.1)

    callback = WeightPruning(amount=0.7, slim=False, end_epoch=2)
    model = Manual(mlp())
    trainer([callback]).fit(model, loader())
    modules = dict(model.named_modules())
    assert all(bool((modules[name].weight[~kept] == 0).all()) for name, kept in callback.masks.items())
    assert callback.report().pruned_fraction == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("collect_every", [1, 2])
@pytest.mark.parametrize("connections", ["factored", "exact"])
def test_decision_follows_the_f_statistics_of_the_activations_seen(connections, collect_every):
    """λ = 1, one layer, one epoch, weights that do not move: the lowest F goes, as scikit-learn computes it."""

    def frozen(parameters):
        return torch.optim.SGD(parameters, lr=0.0)

    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), frozen)
    weight = model.net[1].weight.detach().clone()
    callback = WeightPruning(
        amount=0.5,
        screening_weight=1.0,
        schedule="one_shot",
        end_epoch=1,
        slim=False,
        connections=connections,
        collect_every=collect_every,
    )
    trainer([callback], max_epochs=1).fit(model, loader())
    images, labels = (torch.cat(part.split(64)[::collect_every]) for part in digits())
    contributions = (weight.unsqueeze(0) * images.flatten(1).unsqueeze(1)).flatten(1).double().numpy()
    varies = contributions.std(0) > 0
    f = np.zeros(contributions.shape[1])
    f[varies] = f_classif(contributions[:, varies], labels.numpy())[0]
    kept = callback.masks["net.1"].flatten().numpy()
    assert f[kept].min() >= f[~kept].max() * (1 - 1e-5)


@pytest.mark.parametrize(("needed", "gathered"), [(10_000, 8), (256, 8), (128, 4), (100, 4), (64, 2), (32, 1)])
def test_automatic_collection_gathers_evenly_spaced_batches_with_as_many_instances_as_are_needed(
    needed, gathered, monkeypatch
):
    monkeypatch.setattr("lightning_fscreen.statistics.sampling.instances_needed", lambda num_classes: needed)
    open_in = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if any(module._forward_pre_hooks for module in pl_module.net.modules() if isinstance(module, nn.Linear)):
                open_in.append((trainer.current_epoch, batch_idx))

    callback = WeightPruning(amount=0.5, schedule="one_shot", start_epoch=1, end_epoch=3)
    trainer([callback, Watch()]).fit(Classifier(mlp()), loader(batch_size=32))
    assert open_in == [(2, 8 // gathered * place) for place in range(gathered)]
    open_in.clear()
    callback = WeightPruning(amount=0.5, schedule="one_shot", start_epoch=1, end_epoch=3, collect_epochs=2)
    trainer([callback, Watch()]).fit(Classifier(mlp()), loader(batch_size=32))
    assert {epoch for epoch, _ in open_in} == {1, 2}
    assert len(open_in) * 32 >= min(needed, 512) and len(open_in) <= 2 * gathered


def parity(count=2000, noise=24):
    """Whether two of the inputs have the same sign."""
    x = torch.randn(count, 2 + noise, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def test_inputs_that_matter_only_jointly_are_found_and_noise_goes_first():
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=5e-3)

    data = parity()
    kept = {}
    for criterion in ("screening", "magnitude"):
        torch.manual_seed(0)
        model = Classifier(mlp(inputs=26, hidden=48, classes=2), adam)
        callback, seen = WeightPruning(amount=0.8, criterion=criterion, end_epoch=12), []

        class Watch(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module, callback=callback, seen=seen):
                seen.append(callback.report().layers[0].evidence)

        fit = trainer([callback, Watch()], max_epochs=16)
        fit.fit(model, DataLoader(data, batch_size=64, shuffle=True))
        x, labels = data.tensors
        assert float((model.net(x).argmax(1) == labels).double().mean()) > 0.95
        first, *others = callback.report().layers
        mask = callback.masks[first.name]
        kept[criterion] = int(mask[:, :2].sum()), int(mask[:, 2:].sum())
        if criterion == "screening":
            assert any(found["joint"] == 2 and found["shrunk"] == 24 and not found["trusted"] for found in seen)
            assert all("learned" in layer.evidence["trusted"] for layer in others)
        else:
            assert first.evidence is None
    assert kept["screening"][0] > 40
    assert kept["screening"][1] < kept["magnitude"][1] / 2


def test_channels_behind_trained_weights_are_ranked_by_magnitude():
    masks = []
    for criterion in ("screening", "magnitude"):
        torch.manual_seed(0)
        callback = ScreeningPruningCallback(amount=0.5, criterion=criterion, end_epoch=2, slim=False)
        trainer([callback]).fit(Classifier(residual_net()), loader())
        masks.append(callback.masks)
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_evidence_is_in_the_report_and_in_checkpoints():
    callback = WeightPruning(amount=0.5, end_epoch=2)
    trainer([callback]).fit(Classifier(mlp()), loader())
    first, second, *_ = callback.report().to_dict()["layers"]
    assert {"features", "mean", "spread", "joint", "shrunk", "trusted"} == first["evidence"].keys()
    assert first["evidence"]["features"] == 64 and second["evidence"]["features"] == 32
    restored = WeightPruning(amount=0.5, end_epoch=2)
    restored.load_state_dict(callback.state_dict())
    trainer([restored], max_epochs=5).fit(Classifier(mlp()), loader())
    assert restored.report().to_dict()["layers"][0]["evidence"] == first["evidence"]


def test_without_pruning_training_is_bit_equal_to_training_without_the_callback():
    results = []
    for callbacks in (
        [],
        [WeightPruning(amount=0.0)],
        [WeightPruning(amount=0.5, end_epoch=4, schedule="one_shot", slim=False)],
    ):
        torch.manual_seed(0)
        model = Classifier(ConvNet())
        trainer(callbacks).fit(model, loader(shuffle=True))
        results.append(model)
    assert results[0].losses == results[1].losses == results[2].losses  # one-shot prunes after the last step
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_criteria_that_need_no_statistics_collect_none_and_random_leaves_the_generator_alone():
    states = []
    for criterion in ("magnitude", "random"):
        torch.manual_seed(0)
        callback = WeightPruning(amount=0.5, criterion=criterion)
        trainer([callback]).fit(Classifier(mlp()), loader())
        states.append(torch.random.get_rng_state())
        assert callback.report().pruned_fraction == pytest.approx(0.5, abs=1e-3)
    assert torch.equal(*states)


def test_logs_sparsity_and_kept_fractions_per_layer(tmp_path):
    callback = WeightPruning(amount=0.9)
    logger = CSVLogger(tmp_path, name="", version="")
    fit = trainer([callback], logger=logger)
    fit.fit(Classifier(mlp()), loader())
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"fscreen/sparsity", "fscreen/kept/net.1", "fscreen/kept/net.3", "fscreen/kept/net.5"} <= set(
        rows[0].split(",")
    )
    assert float(fit.callback_metrics["fscreen/sparsity"]) == pytest.approx(callback.history[-1]["applied"])
    assert "fscreen/sparsity" in fit.progress_bar_metrics


@pytest.mark.parametrize("net", [mlp, ConvNet])
def test_slimming_removes_parameters_and_keeps_the_function(net):
    torch.manual_seed(0)
    dense = Classifier(net())
    slim = copy.deepcopy(dense)
    masked, slimmed = (WeightPruning(amount=0.93, slim=slim) for slim in (False, True))
    trainer([masked]).fit(dense, loader())
    trainer([slimmed]).fit(slim, loader())
    images = digits()[0].double()
    dense.double().eval()
    slim.double().eval()
    assert torch.allclose(dense(images), slim(images), rtol=1e-5, atol=1e-6)  # folded in float32
    before, after = slimmed.report().before, slimmed.report().after
    assert after.params == sum(p.numel() for p in slim.parameters()) < before.params
    assert after.macs < before.macs
    assert sum(slimmed.report().removed.values()) > 0
    assert set(slimmed.report().removed) <= {layer.name for layer in slimmed.report().layers}
    assert masked.plan is None and slimmed.plan


def test_leaves_no_hook_behind_after_a_fit_and_after_an_error():
    model = Classifier(mlp())
    before = hooks_of(model)
    fit = trainer([WeightPruning(amount=0.5)])
    fit.fit(model, loader())
    assert hooks_of(model) == before
    assert not fit.optimizers[0]._optimizer_step_post_hooks

    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    model = Failing(mlp())
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer([WeightPruning(amount=0.5)]).fit(model, loader())
    assert hooks_of(model) == before


def test_resuming_equals_an_uninterrupted_run(tmp_path):
    def run(epochs, checkpoint=None):
        torch.manual_seed(0)
        model = Classifier(mlp())
        callback = WeightPruning(amount=0.9, end_epoch=5)
        saver = ModelCheckpoint(dirpath=tmp_path / f"{epochs}", save_last=True)
        fit = trainer([callback, saver], max_epochs=6, enable_checkpointing=True, limit_train_batches=4)
        if epochs < 6:
            fit.fit_loop.max_epochs = 6
            fit.should_stop = False
            stop = StopAfter(epochs)
            fit.callbacks.append(stop)
        fit.fit(model, loader(), ckpt_path=checkpoint, weights_only=True)
        return model, callback

    class StopAfter(pl.Callback):
        def __init__(self, epochs):
            self.epochs = epochs

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch + 1 >= self.epochs

    whole, expected = run(6)
    run(3)
    resumed, callback = run(6, tmp_path / "3" / "last.ckpt")
    assert callback.history == expected.history
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_fits_and_two_callbacks_in_one_process():
    callback = WeightPruning(amount=0.5, slim=False)
    model = Classifier(mlp())
    trainer([callback]).fit(model, loader())
    trainer([callback]).fit(Classifier(mlp()), loader())
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=1e-3)
    first = WeightPruning(amount=0.5, include="net.1", slim=False)
    second = WeightPruning(amount=0.25, include="net.3", slim=False)
    model = Classifier(mlp())
    trainer([first, second]).fit(model, loader())
    assert float((model.net[1].weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
    assert float((model.net[3].weight == 0).float().mean()) == pytest.approx(0.25, abs=1e-3)


def test_another_fit_of_the_same_model_keeps_what_is_pruned():
    callback = WeightPruning(amount=0.5, slim=False)
    model = Classifier(mlp())
    trainer([callback]).fit(model, loader())
    first = callback.masks
    trainer([callback], max_epochs=2).fit(model, loader())
    assert all(torch.equal(callback.masks[name], kept) for name, kept in first.items())
    more = WeightPruning(amount=0.7, slim=False)
    more.load_state_dict(callback.state_dict())
    trainer([more], max_epochs=2).fit(model, loader())
    assert more.report().pruned_fraction == pytest.approx(0.7, abs=1e-3)
    assert not any(bool((more.masks[name] & ~kept).any()) for name, kept in first.items())


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_report_masks_and_history_agree_while_pruning_is_soft(granularity):
    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            report = callback.report()
            kept = sum(int(mask.sum()) for mask in callback.masks.values())
            seen.append((report.pruned_fraction, 1 - kept / report.total, callback.history[-1]["applied"]))

    seen = []
    callback = ScreeningPruningCallback(granularity=granularity, amount=0.5, end_epoch=3, soft=True, slim=False)
    model = Classifier(ConvNet())
    trainer([callback, Look()], max_epochs=4).fit(model, loader())
    assert all(reported == pytest.approx(masked) == pytest.approx(applied) for reported, masked, applied in seen)
    assert [applied for *_, applied in seen] == sorted(applied for *_, applied in seen) and 0 < seen[1][2] < 0.5
    assert seen[2][2] == seen[3][2] == pytest.approx(0.5, abs=1e-3)


def test_soft_labels_and_dict_batches():
    class Mixed(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {"image": batch[0], "label": F.one_hot(batch[1], 10).float() * 0.9 + 0.01}

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["image"]), batch["label"])

    callback = WeightPruning(amount=0.5)
    trainer([callback]).fit(Mixed(mlp()), loader())
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=1e-3)


def test_network_that_is_never_called_as_a_whole_is_pruned_but_not_slimmed(caplog):
    class Parts(Classifier):
        def training_step(self, batch, batch_idx):
            x = batch[0]
            for layer in self.net:
                x = layer(x)
            return F.cross_entropy(x, batch[1])

    callback = WeightPruning(amount=0.9)
    with caplog.at_level(logging.WARNING):
        trainer([callback]).fit(Parts(mlp()), loader())
    assert callback.report().pruned_fraction == pytest.approx(0.9, abs=1e-3)
    assert "'net' was not called" in callback.report().not_removed
    assert "nothing was physically removed" in caplog.text


def _batches(change):
    images, labels = digits(64)
    batches = [change(images[i : i + 16].clone(), labels[i : i + 16].clone()) for i in range(0, 64, 16)]
    return DataLoader(batches, batch_size=None)


class _Unlabelled(Classifier):
    def training_step(self, batch, batch_idx):
        return self(batch if isinstance(batch, torch.Tensor) else batch[0]).square().mean()


def _frozen(parameters):
    return torch.optim.SGD(parameters, lr=0)


def _as_they_are(x, y):
    return x, y


BAD_RUNS = [
    ({"exclude": ["net.*"]}, _as_they_are, r"nothing to prune in .*\n  net.1: left out by exclude"),
    (
        {},
        lambda x, y: (x, y.float()),
        r'batch 0 of epoch 0: .*not one class per instance: .*regression.*criterion="mag',
    ),
    ({"num_classes": 4}, lambda x, y: (x, y[:, None, None]), r"batch 0 of epoch 0: .*segmentation"),
]


def test_classes_are_understood_however_they_are_written():
    masks = []
    for change in (
        _as_they_are,
        lambda x, y: (x, {"label": y}),
        lambda x, y: (x, y.unsqueeze(1)),
        lambda x, y: (x, y.to(torch.uint8)),
        lambda x, y: (x, F.one_hot(y, 10)),
        lambda x, y: (torch.cat([x, x[:1]]), torch.cat([y, torch.tensor([-100])])),  # one more, which does not count
    ):
        torch.manual_seed(0)
        callback = WeightPruning(amount=0.5, end_epoch=1, screening_weight=1, include="net.1")
        trainer([callback], max_epochs=1).fit(_Unlabelled(mlp(), _frozen), _batches(change))
        masks.append(callback.masks["net.1"])
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize(
    ("granularity", "criterion"), [("weight", "magnitude"), ("channel", "magnitude"), ("channel", "taylor")]
)
def test_without_labels_some_criteria_work(granularity, criterion):
    callback = ScreeningPruningCallback(granularity, amount=0.5, criterion=criterion, end_epoch=1)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    trainer([callback], max_epochs=2).fit(_Unlabelled(net), _batches(lambda x, y: x))
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("arguments", "change", "message"), BAD_RUNS)
def test_bad_runs_say_what_is_wrong_and_what_to_do(arguments, change, message):
    with pytest.raises(ValueError, match=message):
        trainer([WeightPruning(**{"amount": 0.5, **arguments})]).fit(_Unlabelled(mlp()), _batches(change))


def test_nothing_to_prune_lists_why():
    model = Classifier(mlp())
    model.net.requires_grad_(False)
    model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"nothing to prune(.|\n)*net\.1: frozen"):
        trainer([WeightPruning(amount=0.5)]).fit(model, loader())


def test_report_before_a_fit_says_so():
    with pytest.raises(RuntimeError, match=r"before Trainer\.fit"):
        ScreeningPruningCallback().report()


def test_state_survives_weights_only_loading(tmp_path):
    callback = WeightPruning(amount=0.5)
    trainer([callback]).fit(Classifier(mlp()), loader())
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["history"] == callback.history


def test_config_lists_every_argument_with_its_default():
    config = yaml.safe_load((Path(__file__).parents[1] / "conf" / "callbacks" / "fscreen.yaml").read_text())["fscreen"]
    config.pop("_target_")
    signature = inspect.signature(ScreeningPruningCallback)
    assert config == {name: parameter.default for name, parameter in signature.parameters.items()}


def test_constants_that_slimming_put_into_pruned_weights_stay_in_this_fit_and_in_the_next(monkeypatch):
    """Where zero padding meets a constant, a retained channel carries it into a weight whose connection is pruned."""
    torch.manual_seed(0)
    model = Classifier(residual_net(), OPTIMIZERS["sgd"])
    masked = {}

    class Keep(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            masked["net"] = copy.deepcopy(pl_module.net).double().eval()

    def every_other_unit_first(layers, screening_weight, generator):
        return {
            name: layer.weight.abs() + (torch.arange(len(layer.weight)) % 2).view(-1, *[1] * (layer.weight.ndim - 1))
            for name, layer in layers.items()
        }

    monkeypatch.setitem(CRITERIA, "every_other", Criterion(every_other_unit_first, lambda screening_weight: False))
    callback = WeightPruning(amount=0.7, end_epoch=2, criterion="every_other")
    trainer([callback, Keep()], limit_train_batches=3).fit(model, loader(batch_size=48))
    x = digits(64)[0].double()
    weights = dict(model.named_modules())
    carried = sum(
        int((weights[name].weight[~callback.plan.cut(f"{name}.weight", kept)] != 0).sum())
        for name, kept in callback.masks.items()
    )
    assert carried > 0
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model.net).double().eval()(x), masked["net"](x), rtol=1e-6, atol=1e-8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    trainer([callback], max_epochs=3).fit(model, loader(batch_size=48))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def with_fresh_head():
    torch.manual_seed(0)
    net = mlp()
    nn.init.zeros_(net[-1].weight)
    return Classifier(net, functools.partial(torch.optim.SGD, lr=1e-3))


def test_a_fresh_head_on_a_trained_network_is_left_alone_also_when_its_fit_goes_on(tmp_path):
    whole, saving = WeightPruning(amount=0.9, end_epoch=3), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer([whole, saving], enable_checkpointing=True).fit(with_fresh_head(), loader())
    assert "net.5" not in whole.masks and "zero when the fit began" in whole.report().not_pruned["net.5"]
    chosen = WeightPruning(amount=0.9, end_epoch=3, include="*")
    trainer([chosen]).fit(with_fresh_head(), loader())
    assert chosen.masks["net.5"].sum() < 10  # of 320: what would become of it

    rest = WeightPruning(amount=0.9, end_epoch=3)
    trainer([rest]).fit(with_fresh_head(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert rest.masks.keys() == whole.masks.keys() and "net.5" in rest.report().not_pruned
    assert all(torch.equal(mask, rest.masks[name]) for name, mask in whole.masks.items())


def test_where_all_layers_begin_with_zeros_they_are_alike():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(net[1].weight)
    callback = WeightPruning(amount=0.5, end_epoch=2)
    trainer([callback], max_epochs=2).fit(Classifier(net), loader())
    assert callback.report().kept == 320
