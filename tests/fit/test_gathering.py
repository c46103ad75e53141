"""What the statistics of a fit are: which batches, which labels, and what they decide."""

import functools

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.feature_selection import f_classif
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fscreen import ScreeningPruningCallback, screen
from tests.conftest import Classifier, digits, loader, mlp, trainer
from tests.test_channel_fit import residual_net

WeightPruning = functools.partial(ScreeningPruningCallback, granularity="weight")


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
    callback = WeightPruning(amount=0.5, end_epoch=2, slim=False)
    trainer([callback]).fit(Classifier(mlp()), loader())
    first, second, *_ = callback.report().to_dict()["layers"]
    counts = {"features", "mean", "spread", "shared", "joint", "shrunk", "learned"}
    assert counts | {"preferred", "trusted"} == first["evidence"].keys()
    assert first["evidence"]["features"] == 64 and second["evidence"]["features"] == 32
    restored = WeightPruning(amount=0.5, end_epoch=2, slim=False)
    restored.load_state_dict(callback.state_dict())
    trainer([restored], max_epochs=5).fit(Classifier(mlp()), loader())
    assert restored.report().to_dict()["layers"][0]["evidence"] == first["evidence"]


def test_criteria_that_need_no_statistics_collect_none_and_random_leaves_the_generator_alone():
    states = []
    for criterion in ("magnitude", "random"):
        torch.manual_seed(0)
        callback = WeightPruning(amount=0.5, criterion=criterion)
        trainer([callback]).fit(Classifier(mlp()), loader())
        states.append(torch.random.get_rng_state())
        assert callback.report().pruned_fraction == pytest.approx(0.5, abs=1e-3)
    assert torch.equal(*states)


def test_soft_labels_and_dict_batches():
    class Mixed(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {"image": batch[0], "label": F.one_hot(batch[1], 10).float() * 0.9 + 0.01}

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["image"]), batch["label"])

    callback = WeightPruning(amount=0.5)
    trainer([callback]).fit(Mixed(mlp()), loader())
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=1e-3)


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


@pytest.mark.parametrize("labels", [None, lambda batch: batch[1]])
@pytest.mark.parametrize("door", ["fit", "screen"])
def test_labels_that_are_taken_from_one_of_two_possible_items_are_warned_of(door, labels, caplog):
    batches = _batches(lambda x, y: (x, y // 5, y))
    if door == "fit":
        callback = WeightPruning(amount=0.5, end_epoch=1, labels=labels)
        trainer([callback], max_epochs=1).fit(_Unlabelled(mlp()), batches)
    else:
        screen(mlp(), batches, progress=False, **({} if labels is None else {"labels": labels}))
    warned = [record for record in caplog.records if "labels=lambda batch: batch[2]" in record.getMessage()]
    assert len(warned) == (labels is None)


def test_an_error_says_which_item_was_taken_for_the_labels():
    batches = _batches(lambda x, y: (x, y + 40, y))  # lengths
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 9.*second item of the list of 3 \(tensor \(16, 1, 8"):
        trainer([WeightPruning(amount=0.5, end_epoch=1)], max_epochs=1).fit(_Unlabelled(mlp()), batches)
