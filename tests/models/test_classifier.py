from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_fscreen.models import ImageClassifier


def loader(count=50, batch_size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(3, (count,), generator=generator)), batch_size=batch_size)


def classifier(**arguments):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, arguments.get("num_classes", 3)))
    return ImageClassifier(net, **{"optimizer": partial(SGD, lr=0.1), "num_classes": 3} | arguments)


def trainer(tmp_path, **arguments):
    defaults = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return Trainer(**defaults | quiet | arguments)


def test_evaluation_is_exact_over_uneven_batches(tmp_path):
    model = classifier(label_smoothing=0.1)
    images, labels = loader().dataset.tensors
    logits = model(images)
    (validation,) = trainer(tmp_path).validate(model, loader(), verbose=False)
    (test,) = trainer(tmp_path).test(model, loader(), verbose=False)
    for logged, stage in ((validation, "val"), (test, "test")):
        assert logged[f"{stage}/error"] == pytest.approx((logits.argmax(1) != labels).double().mean().item(), abs=1e-7)
        assert logged[f"{stage}/loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_fit_follows_plain_sgd_and_logs_the_epoch_loss(tmp_path):
    model, fit = classifier(label_smoothing=0.1), trainer(tmp_path)
    fit.fit(model, loader())

    reference = classifier().net
    optimizer = SGD(reference.parameters(), lr=0.1)
    batches = list(loader())
    losses = []
    for images, labels in batches * 2:
        loss = nn.functional.cross_entropy(reference(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * len(labels))

    for trained, expected in zip(model.net.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(trained, expected)
    assert set(fit.callback_metrics) == {"train/loss"}
    assert fit.callback_metrics["train/loss"].item() == pytest.approx(sum(losses[len(batches) :]) / 50, rel=1e-5)


def test_predict_returns_logits(tmp_path):
    model = classifier()
    logits = torch.cat(trainer(tmp_path).predict(model, loader()))
    assert torch.allclose(logits, model(loader().dataset.tensors[0]))


@pytest.mark.parametrize(
    ("scheduler", "interval", "name", "length"),
    [
        (CosineAnnealingLR, "epoch", "T_max", 2),
        (partial(CosineAnnealingLR, eta_min=0.01), "epoch", "T_max", 2),
        (partial(CosineAnnealingLR), "step", "T_max", 8),
        (partial(CosineAnnealingLR, T_max=5), "epoch", "T_max", 5),
        (partial(OneCycleLR, max_lr=0.1), "step", "total_steps", 8),
        (partial(OneCycleLR, max_lr=0.1, epochs=3, steps_per_epoch=4), "step", "total_steps", 12),
        (partial(StepLR, step_size=7), "epoch", "step_size", 7),
    ],
)
def test_scheduler_lasts_as_long_as_the_training(tmp_path, scheduler, interval, name, length):
    model = classifier(scheduler=scheduler, scheduler_interval=interval)
    fit = trainer(tmp_path)
    fit.fit(model, loader())
    (config,) = fit.lr_scheduler_configs
    assert config.interval == interval
    assert getattr(config.scheduler, name) == length


def test_scheduler_cannot_follow_an_endless_training(tmp_path):
    fit = trainer(tmp_path, max_epochs=None, max_steps=3)
    with pytest.raises(ValueError, match=r"T_max .* set trainer\.max_epochs"):
        fit.fit(classifier(scheduler=CosineAnnealingLR), loader())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="'epoch' or 'step', got 'batch'"):
        classifier(scheduler_interval="batch")
    with pytest.raises(ValueError, match=r"label_smoothing .* got 2"):
        classifier(label_smoothing=2)


def test_wrong_number_of_logits_is_named():
    model = ImageClassifier(nn.Flatten(), partial(SGD, lr=0.1), num_classes=3)
    with pytest.raises(ValueError, match=r"\(2, 16\), not \(N, 3\)"):
        model(torch.zeros(2, 1, 4, 4))
