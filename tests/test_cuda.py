"""What only a GPU can show; skipped without one. `test_accelerator.py` has stand-ins for most of it."""

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.feature_selection import f_classif
from torch import nn

from lightning_fscreen import ScreeningPruningCallback
from lightning_fscreen.l1 import WeightL1
from lightning_fscreen.statistics.collector import ActivationCollector
from lightning_fscreen.statistics.probes import Probe
from tests.conftest import Classifier, ConvNet, digits, loader, mlp, trainer
from tests.test_channel_fit import residual_net

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


def fused_adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def fit(net, callbacks, make_optimizer=fused_adam, ckpt_path=None, **options):
    torch.manual_seed(0)
    model = Classifier(copy.deepcopy(net), make_optimizer)
    run = trainer(callbacks, accelerator={"cuda": "gpu"}.get(DEVICE, DEVICE), **{"max_epochs": 3, **options})
    run.fit(model, loader(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return model


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_fused_steps_of_a_slim_channels_last_network_are_those_of_the_masked_one(precision):
    net = residual_net().to(memory_format=torch.channels_last)
    models = [
        fit(net, [ScreeningPruningCallback(amount=0.5, end_epoch=1, slim=slim)], precision=precision)
        for slim in (True, False)
    ]
    small, masked = (sum(p.numel() for p in model.parameters()) for model in models)
    assert small < masked
    outputs = [model.eval().cpu()(digits(64)[0]).softmax(1) for model in models]
    tolerance = 1e-3 if precision == "32-true" else 0.1
    torch.testing.assert_close(outputs[0], outputs[1], atol=tolerance, rtol=0)


def test_the_penalty_is_not_scaled_with_the_loss():
    def step(callbacks):
        return fit(net, callbacks, fused_sgd, precision="16-mixed", max_epochs=1, limit_train_batches=1)

    def fused_sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.01, fused=True)

    net = ConvNet()
    plain, penalised = (dict(step(callbacks).named_parameters()) for callbacks in ([], [WeightL1(0.05)]))
    difference = (plain["net.left.weight"] - penalised["net.left.weight"]).detach().cpu()
    torch.testing.assert_close(difference, 0.01 * 0.05 * net.left.weight.detach().sign(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_resumed_when_only_the_end_of_the_last_epoch_is_left(granularity, tmp_path):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 12:
                trainer.save_checkpoint(tmp_path / "end.ckpt")

    net = residual_net()
    whole, again = (ScreeningPruningCallback(granularity, amount=0.5, end_epoch=3) for _ in range(2))
    model = fit(net, [Saves(), whole])
    resumed = fit(net, [again], ckpt_path=tmp_path / "end.ckpt")
    assert again.report().kept == whole.report().kept < whole.report().total
    for (name, first), second in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6, msg=name)


def test_a_deterministic_fit_asks_for_nothing_that_has_no_deterministic_form(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # Lightning sets it
    callback = ScreeningPruningCallback("weight", amount=0.5, end_epoch=2)
    try:
        fit(mlp(), [callback], deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert callback.report().pruned_fraction == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("weights", [False, True])
def test_sums_are_exact_whatever_products_are_rounded_to_and_wait_for_nothing(weights):
    x, labels = torch.randn(512, 40) + 100, torch.randint(5, (512,))
    x += 0.1 * labels[:, None]
    labels[::7] = labels[::7] if weights else -100
    layer = nn.Linear(40, 2).to(DEVICE)
    collector = ActivationCollector([Probe("layer", layer)], 5)
    collector.attach()
    given = nn.functional.one_hot(labels, 5).float() if weights else labels
    batches = [(batch.to(DEVICE), own.to(DEVICE)) for batch, own in zip(x.split(64), given.split(64), strict=True)]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for index, (batch, own) in enumerate(batches):
            layer(batch)
            torch.cuda.set_sync_debug_mode("error" if index else "default")  # an epoch's first labels are checked
            collector.update(own)
            collector._flush()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision(precision)
    expected, _ = f_classif((x[labels >= 0].double() - 100).numpy(), labels[labels >= 0].numpy())
    np.testing.assert_allclose(collector.statistics()["layer"].f.cpu().numpy(), expected, rtol=1e-5)
