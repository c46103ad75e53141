"""The callback in real trainings: what is pruned, what stays zero, what is left behind."""

import functools
import inspect
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_fscreen import ScreeningPruningCallback
from tests.conftest import Classifier, ConvNet, loader, mlp, trainer

WeightPruning = functools.partial(ScreeningPruningCallback, granularity="weight")


def hooks_of(model):
    return [
        (name, len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    ]


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
    config["latency"] = instantiate(config["latency"])
    signature = inspect.signature(ScreeningPruningCallback)
    assert config == {name: parameter.default for name, parameter in signature.parameters.items()}
