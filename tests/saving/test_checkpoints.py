"""Resuming equals an uninterrupted run, wherever the run was stopped."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from lightning_fscreen import ScreeningPruningCallback, load_from_checkpoint
from lightning_fscreen.slimming import PlanError, SlimmingPlan
from lightning_fscreen.slimming.carried import plan_of
from lightning_fscreen.slimming.state import PLAN_KEY
from tests.conftest import Classifier, ConvNet, digits, loader, trainer
from tests.test_channel_fit import residual_net
from tests.test_unit_fit import Attentive, convnext

EPOCHS = 4
BATCHES = 4


class Batches:
    """Batches in an order that depends on the epoch, which goes on where it was interrupted."""

    def __init__(self, size=32):
        self.size, self.epoch, self.next = size, 0, 0
        self.sampler = self  # Lightning tells it the epoch

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return BATCHES

    def __iter__(self):
        images, labels = digits(self.size * BATCHES)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.epoch)).chunk(BATCHES)
        for batch in order[self.next :]:
            self.next = (self.next + 1) % BATCHES
            yield images[batch], labels[batch]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def two_networks():
    """A ModuleList, which cannot be called: training_step calls its parts."""
    head = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))
    return nn.ModuleList([residual_net()[:-1], head])


class Scheduled(Classifier):
    def training_step(self, batch, batch_idx):
        if not isinstance(self.net, nn.ModuleList):
            return super().training_step(batch, batch_idx)
        return nn.functional.cross_entropy(self.net[1](self.net[0](batch[0])), batch[1])

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)


CASES = {
    "channel": lambda: (residual_net(), momentum, {"bias": "zero"}),
    "channel-fold": lambda: (residual_net(), adamw, {"bias": "fold", "collect_epochs": 2}),
    "channel-one-shot": lambda: (residual_net(), adamw, {"schedule": "one_shot", "rewind_lr": True}),
    "weight": lambda: (ConvNet(), momentum, {"granularity": "weight", "amount": 0.98}),
    "weight-exact": lambda: (ConvNet(), adamw, {"granularity": "weight", "connections": "exact", "amount": 0.8}),
    "taylor": lambda: (residual_net(), momentum, {"criterion": "taylor", "collect_epochs": 2}),
    "snip": lambda: (ConvNet(), adamw, {"granularity": "weight", "criterion": "taylor", "end_epoch": 0}),
    "steps": lambda: (two_networks(), momentum, {"end_epoch": None, "start_step": 1, "end_step": 11, "prune_every": 3}),
    "lottery": lambda: (residual_net(), momentum, {"schedule": "one_shot", "rewind_weights": True}),
    "unit": lambda: (convnext(), adamw, {"granularity": "unit", "bias": "mean"}),
    "head": lambda: (Attentive(), adamw, {"granularity": "unit", "criterion": "taylor"}),
    "soft": lambda: (ConvNet(), adamw, {"granularity": "weight", "soft": True, "schedule": "constant"}),
}


def fit(case, folder, checkpoint=None, **saver):
    torch.manual_seed(0)
    net, optimizer, arguments = CASES[case]()
    model = Scheduled(net, optimizer)
    callback = ScreeningPruningCallback(**{"amount": 0.5, "end_epoch": 3, **arguments})
    callbacks = [callback, ModelCheckpoint(dirpath=folder, filename="{epoch}-{step}", save_top_k=-1, **saver)]
    run = trainer(callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
    run.fit(model, Batches(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return model, callback, run


def state_of(model, callback, run):
    """Everything that has to be equal in the end."""
    return {
        "weights": model.state_dict(),
        "optimizer": run.optimizers[0].state_dict(),
        "rate": run.optimizers[0].param_groups[0]["lr"],
        "masks": callback.masks,
        "history": callback.history,
        "plan": "" if callback.plan is None else callback.plan.to_json(),
        "report": callback.report().to_dict(),
    }


def equal(first, second):
    """Bit by bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


# Every third step, of four an epoch: after the first, second, third and last batch of some epoch.
SAVERS = {
    "steps": {"every_n_train_steps": 3},
    "epochs": {"every_n_epochs": 1},
    "epoch-ends": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
}


@pytest.mark.parametrize(
    ("saver", "case"),
    [("steps", case) for case in CASES]
    + [(saver, case) for saver in ("epochs", "epoch-ends") for case in ("channel", "weight", "lottery")],
)
def test_resuming_from_every_checkpoint_equals_the_uninterrupted_run(saver, case, tmp_path):
    expected = state_of(*fit(case, tmp_path / "whole", **SAVERS[saver]))
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(checkpoints) >= EPOCHS
    for checkpoint in checkpoints:
        resumed = state_of(*fit(case, tmp_path / checkpoint.stem, checkpoint, every_n_train_steps=1000))
        wrong = [part for part, value in expected.items() if not equal(value, resumed[part])]
        assert not wrong, (checkpoint.name, wrong)


@pytest.mark.parametrize("case", ["channel", "weight", "soft"])
def test_checkpoints_of_the_version_before_resume_to_the_bit(case, tmp_path):
    """They know one network and epochs alone, not whether masks are held; the plan has a short key.

    They have no masks while pruning is soft.
    """
    expected = state_of(*fit(case, tmp_path, every_n_train_steps=2 * BATCHES - 1))
    for checkpoint in sorted(tmp_path.glob("*.ckpt")):
        saved = torch.load(checkpoint, weights_only=True)
        (own,) = (state for state in saved["callbacks"].values() if "pruner" in state)
        if not own["pruner"].pop("held"):
            own["pruner"]["kept"] = {name: mask | True for name, mask in own["pruner"]["kept"].items()}
        state = saved["state_dict"]
        for key in [key for key in state if "fscreen_plan" in key]:
            plan = SlimmingPlan.from_json(bytes(state.pop(key).tolist()).decode()).under("net")
            state["fscreen_plan"] = torch.tensor(list(plan.to_json().encode()), dtype=torch.uint8)
        round_end, (network,) = own.pop("round_end"), own["pruner"].pop("networks")
        own["epoch"] = None if round_end is None else round_end - 1
        own["pruner"] |= {"network": network["name"], "inputs": network["inputs"], "dtype": network["dtype"]}
        for sums in own["collections"]:
            if "activations" in sums:
                (sums["activations"],) = sums["activations"].values()
        del own["unit"], own["batches"], own["pruner"]["settled"]
        torch.save(saved, checkpoint)
        resumed = state_of(*fit(case, tmp_path / checkpoint.stem, checkpoint, every_n_train_steps=1000))
        wrong = [part for part, value in expected.items() if not equal(value, resumed[part])]
        assert not wrong, (checkpoint.name, wrong)


@pytest.mark.parametrize("case", ["channel", "weight"])
def test_checkpoints_of_any_size_can_be_tested_after_the_fit(case, tmp_path):
    model, _, run = fit(case, tmp_path, every_n_epochs=1)
    final = copy.deepcopy(model.state_dict())
    for checkpoint in sorted(tmp_path.glob("*.ckpt")):
        saved = torch.load(checkpoint, weights_only=True)["state_dict"]
        run.test(model, loader(), ckpt_path=checkpoint, weights_only=True, verbose=False)
        assert equal(dict(model.state_dict()), dict(saved))
    model.load_state_dict(final)
    assert equal(dict(model.state_dict()), dict(final)) and plan_of(model)


def test_a_slim_model_takes_any_checkpoint_without_a_trainer(tmp_path):
    model, _, _ = fit("channel", tmp_path, every_n_epochs=1)
    slim, sizes = copy.deepcopy(model.state_dict()), set()
    for checkpoint in sorted(tmp_path.glob("*.ckpt")):
        saved = torch.load(checkpoint, weights_only=True)["state_dict"]
        model.load_state_dict(saved)
        sizes.add(sum(p.numel() for p in model.parameters()))
        model(digits(8)[0]).sum().backward()
    assert len(sizes) == 2
    partial = {name: tensor for name, tensor in slim.items() if name.startswith("net.2")}
    model.load_state_dict(partial, strict=False)
    assert len({sum(p.numel() for p in model.parameters())} | sizes) == 2


def evaluate(model, checkpoint, callback=None):
    run = trainer([callback or ScreeningPruningCallback()])
    run.test(model, loader(), ckpt_path=checkpoint, weights_only=True, verbose=False)


class WithArguments(Scheduled):
    def __init__(self, width=8):
        super().__init__(residual_net(), momentum)
        self.save_hyperparameters()


@pytest.mark.parametrize("weights_only", [False, True])
def test_load_from_checkpoint_gives_the_slim_model_of_the_same_class(weights_only, tmp_path):
    torch.manual_seed(0)
    model, callback = WithArguments(width=8), ScreeningPruningCallback(amount=0.5, end_epoch=2)
    run = trainer([callback], max_epochs=3)
    run.fit(model, Batches())
    run.save_checkpoint(tmp_path / "slim.ckpt", weights_only=weights_only)
    loaded = load_from_checkpoint(WithArguments, tmp_path / "slim.ckpt")
    assert type(loaded) is WithArguments and loaded.hparams == {"width": 8}
    assert equal(dict(loaded.state_dict()), dict(model.state_dict()))
    images = digits(8)[0]
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    fresh = WithArguments()
    evaluate(fresh, tmp_path / "slim.ckpt")
    assert torch.equal(fresh.eval()(images), model.eval()(images))


def test_a_plan_of_another_model_is_refused_and_changes_nothing(tmp_path):
    model, _, run = fit("channel", tmp_path, every_n_epochs=1)
    other = Scheduled(ConvNet(), momentum)
    before = copy.deepcopy(other.state_dict())
    run.save_checkpoint(tmp_path / "slim.ckpt")
    with pytest.raises(PlanError, match="Scheduled does not have"):
        evaluate(other, tmp_path / "slim.ckpt")
    assert equal(dict(other.state_dict()), dict(before))
    wrong = {**model.state_dict(), PLAN_KEY: torch.zeros(5, dtype=torch.uint8)}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="not a slimming plan"):
        model.load_state_dict(wrong)
    assert equal(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize("case", ["channel", "weight"])
def test_best_scores_are_forgotten_when_fine_tuning_begins(case, tmp_path):
    """The score is made to get worse all the time, so that a dense best would hide all that come later."""
    torch.manual_seed(0)
    net, optimizer, arguments = CASES[case]()

    class Worse(Scheduled):
        def validation_step(self, batch, batch_idx):
            self.log("worse", float(self.current_epoch))

    callback = ScreeningPruningCallback(**{"amount": 0.5, "end_epoch": 2, **arguments})
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", monitor="worse", save_last=True)
    stopper = EarlyStopping("worse", patience=3)
    run = trainer([callback, saver, stopper], max_epochs=5, enable_checkpointing=True)
    model = Worse(net, optimizer)
    run.fit(model, Batches(), loader())
    assert saver.best_model_path.endswith("epoch=2.ckpt") and run.current_epoch == 5
    best = torch.load(saver.best_model_path, weights_only=True)
    assert any("fscreen_plan" in key for key in best["state_dict"]) == (case == "channel")
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=2.ckpt", "last.ckpt"}  # and no dense one
    for which in ("best", "last"):
        run.test(ckpt_path=which, dataloaders=loader(), weights_only=True, verbose=False)


def test_stopping_before_everything_is_pruned_warns(tmp_path, caplog):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    callback = ScreeningPruningCallback(amount=0.5, end_epoch=3)
    torch.manual_seed(0)
    trainer([callback, Stop()], max_epochs=5).fit(Scheduled(residual_net()), Batches())
    assert "training ended with epoch 0, before everything was pruned (end_epoch=3)" in caplog.text


def test_two_callbacks_with_different_layers_slim_one_after_another(tmp_path):
    torch.manual_seed(0)
    model = Scheduled(residual_net(), momentum)
    first = ScreeningPruningCallback(amount=0.5, end_epoch=1, include="net.2.*")
    second = ScreeningPruningCallback(amount=0.25, end_epoch=3, include=["net.3.*", "net.4"])
    run = trainer([first, second], max_epochs=5)
    run.fit(model, Batches())
    assert first.report().pruned_fraction == pytest.approx(0.5, abs=0.05) and first.plan
    assert second.report().pruned_fraction == pytest.approx(0.25, abs=0.05) and second.plan
    size = sum(p.numel() for p in model.parameters())
    assert size == first.report().after.params == second.report().after.params
    listed = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert listed == set(map(id, model.parameters()))
    run.save_checkpoint(tmp_path / "both.ckpt")
    fresh = Scheduled(residual_net(), momentum)
    evaluate(fresh, tmp_path / "both.ckpt")
    assert equal(dict(fresh.state_dict()), dict(model.state_dict()))
    trainer([first, second], max_epochs=3).fit(model, Batches())  # goes on as it is
    assert size == sum(p.numel() for p in model.parameters())


def test_another_fit_goes_on_from_what_was_loaded(tmp_path):
    model, callback, run = fit("channel", tmp_path, every_n_epochs=1)
    slim = callback.report()
    dense = min(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    run.test(model, loader(), ckpt_path=dense, weights_only=True, verbose=False)
    assert sum(p.numel() for p in model.parameters()) == slim.before.params
    trainer([callback], max_epochs=EPOCHS).fit(model, Batches())
    assert callback.report().kept == slim.kept and callback.plan
    assert callback.report().after.params == sum(p.numel() for p in model.parameters()) < slim.before.params
    fresh = Scheduled(residual_net(), momentum)
    trainer([callback], max_epochs=EPOCHS).fit(fresh, Batches())
    assert callback.report().kept == slim.kept and callback.plan
