"""Windows in optimizer steps: within an epoch, over a stream, with accumulated gradients and several optimizers."""

import logging

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_fscreen import ScreeningPruningCallback
from tests.conftest import Classifier, digits, loader, trainer
from tests.test_channel_fit import residual_net

BATCH = 16  # of 256 digits: 16 batches


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*digits(), strict=True)


class Watched(Classifier):
    """Notes after which batches the network is smaller."""

    def __init__(self, net):
        super().__init__(net)
        self.sizes = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.sizes.append(sum(p.numel() for p in self.parameters()))

    @property
    def batches_at_full_size(self):
        return self.sizes.count(self.sizes[0])


class TwoOptimizers(Watched):
    """Steps by itself, with one optimizer for the head and one for the others, every other batch."""

    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.05, momentum=0.9) for part in (self.net[:-1], self.net[-1])]

    def training_step(self, batch, batch_idx):
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


def fit(callback, data=None, model=Watched, **arguments):
    torch.manual_seed(0)
    made = model(residual_net())
    run = trainer([callback], **{"max_epochs": 1, **arguments})
    run.fit(made, loader(BATCH) if data is None else data)
    return made, run


def pruning(**arguments):
    return ScreeningPruningCallback(**{"amount": 0.5, "collect_every": 1, **arguments})


def steps(callback):
    return [entry["step"] for entry in callback.history]


def test_one_epoch_prunes_in_its_first_half_and_fine_tunes_the_smaller_network_in_its_second():
    callback = pruning()
    model, _ = fit(callback)
    assert (callback.window, callback.window_unit) == ((0, 8), "step")
    assert model.batches_at_full_size == 8 and len(model.sizes) == 16 and callback.fine_tuning
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=0.02)
    for entry in callback.history:
        assert entry["applied"] == pytest.approx(entry["scheduled"], abs=2 / callback.report().total)
    assert steps(callback) == list(range(1, 17))


@pytest.mark.parametrize(
    ("arguments", "model", "options", "ends", "batches"),
    [
        ({"start_step": 2, "end_step": 9, "prune_every": 3}, Watched, {}, [3, 6, 9, 12, 15], 9),
        ({"end_step": 4, "prune_every": 2}, Watched, {"accumulate_grad_batches": 3}, [2, 4, 6], 12),
        ({"end_step": 7, "prune_every": 4}, TwoOptimizers, {}, [4, 8, 12, 16], 8),
        ({}, Watched, {"data": DataLoader(Stream(), BATCH), "max_epochs": None, "max_steps": 20}, range(1, 21), 10),
    ],
    ids=["within", "accumulated", "manual", "stream"],
)
def test_rounds_end_where_steps_say(arguments, model, options, ends, batches):
    callback = pruning(schedule="linear", **arguments)
    trained, run = fit(callback, model=model, **options)
    assert steps(callback) == list(ends)
    assert trained.batches_at_full_size == batches < len(trained.sizes)
    own = {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert own == set(map(id, trained.parameters()))


@pytest.mark.parametrize("model", [Watched, TwoOptimizers])
def test_slimming_between_two_steps_changes_nothing_but_the_size(model):
    """The masked network in float64 is trained alike."""
    outputs = []
    for slim in (True, False):
        callback = pruning(start_step=2, end_step=6, prune_every=2, slim=slim)
        trained, _ = fit(callback, model=model, precision="64-true", accumulate_grad_batches=1)
        assert (callback.plan is not None) is slim
        outputs.append(trained.double().eval()(digits()[0].double()))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


def test_statistics_are_those_of_the_steps_before_a_pruning():
    seen = []
    labels = lambda batch: seen.append(batch[1]) or batch[1]  # noqa: E731
    fit(pruning(end_step=10, prune_every=3, schedule="one_shot", num_classes=10, labels=labels))
    assert torch.equal(torch.cat(seen), digits()[1][7 * BATCH : 10 * BATCH])


@pytest.mark.parametrize(
    ("arguments", "options", "warns"),
    [
        ({"end_epoch": 1}, {}, "pruning ends with epoch 1, and so does the training"),
        ({"end_step": 16}, {}, "pruning ends with step 16, and so does the training"),
        ({"end_epoch": 2}, {"max_epochs": 4, "max_steps": 3, "limit_train_batches": 2}, "pruning ends with epoch 2"),
        ({}, {"data": DataLoader(Stream(), BATCH)}, "pruning ends with epoch 1, and so does the training"),
        ({"end_epoch": 1}, {"max_epochs": 2, "limit_train_batches": 1}, None),
        ({}, {}, None),
        ({"end_epoch": 1}, {"fast_dev_run": True}, None),
    ],
)
def test_a_fit_that_ends_with_its_last_pruning_warns_at_the_start(arguments, options, warns, caplog):
    class First(Watched):
        def training_step(self, batch, batch_idx):
            self.warned = "nothing is trained after the last pruning" in caplog.text
            return super().training_step(batch, batch_idx)

    with caplog.at_level(logging.WARNING):
        model, _ = fit(pruning(criterion="magnitude", **arguments), model=First, **options)
    assert model.warned is (warns is not None) and (warns is None or warns in caplog.text)
    assert "end earlier (end_epoch=" in caplog.text or warns is None


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            {"end_step": 5, "end_epoch": 1},
            {},
            "end_epoch=1 is in epochs, but end_step=5 in steps",
        ),
        ({"prune_every": 5, "collect_epochs": 2}, {}, "collect_epochs=2 .* prune_every steps before each pruning"),
        ({"end_step": 5, "start_step": 5}, {}, "end_step must lie after start_step=5, got 5.*end_epoch=0"),
        ({"prune_every": 0}, {}, "prune_every must be at least 1"),
        ({"end_step": 17}, {}, "would end with step 17 .* has 16 optimizer steps; lower end_step"),
        ({"prune_every": 2}, {"data": DataLoader(Stream(), BATCH)}, "not known how many optimizer steps.*end_step="),
        ({}, {"max_epochs": -1}, "no max_epochs, so end_epoch= .*end_step=.* must be given"),
    ],
)
def test_windows_that_cannot_be_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        fit(pruning(**arguments), **options)
