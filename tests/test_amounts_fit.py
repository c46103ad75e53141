"""Amounts by patterns in real trainings."""

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_fscreen import ScreeningPruningCallback, prune
from tests.conftest import ConvNet, loader
from tests.test_channel_fit import fitted, post_net, residual_net
from tests.test_unit_fit import mixed_net


@pytest.mark.parametrize(
    ("granularity", "net", "amount", "options"),
    [
        ("channel", residual_net, {"net.2.*": 0.25, "*": 0.5}, {}),
        ("unit", mixed_net, {"net.1": 0.5, "net.5": 0.2}, {"scope": "layer"}),
        ("unit", mixed_net, {"net.1": 0.5}, {"schedule": "linear", "end_epoch": 3}),
        ("weight", ConvNet, {"net.*": 0.9}, {}),
    ],
)
def test_every_part_meets_its_amount(granularity, net, amount, options):
    config = OmegaConf.create({"_target_": "lightning_fscreen.ScreeningPruningCallback", "amount": amount})
    callback = instantiate(config, granularity=granularity, **{"end_epoch": 2, **options})
    fitted(callback, net=net, max_epochs=4)
    kept = {layer.name: (layer.kept, layer.total) for layer in callback.report().layers}
    left = dict(kept)
    for pattern, value in amount.items():
        own = [left.pop(name) for name in list(left) if name.startswith(pattern.rstrip("*."))]
        assert sum(count for count, _ in own) == pytest.approx((1 - value) * sum(total for _, total in own), abs=1)
    assert all(count == total for count, total in left.values())
    total, count = sum(total for _, total in kept.values()), sum(count for count, _ in kept.values())
    assert callback.total_amount == pytest.approx(1 - count / total, abs=2 / total)
    assert callback.history[-1]["applied"] == pytest.approx(callback.history[-1]["scheduled"], abs=2 / total)


def test_without_a_trainer():
    net = mixed_net()
    _, report = prune(net, loader(), {"1": 0.5, "5": 0.1}, budget="candidates", progress=False)
    assert {layer.name: layer.kept for layer in report.layers} == {"1": 6, "5": 36}


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({"net.0": 0.5, "*": 0.3}, r"amount\['net.0'\] matches no layer"),
        ({"net.0.a.*": 0.5, "*": 0.3}, r"pruned together, but their amounts are 0.5 and 0.3"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused_before_anything_is_pruned(amount, message):
    callback = ScreeningPruningCallback(amount=amount, end_epoch=2)
    with pytest.raises(ValueError, match=message):
        fitted(callback, net=post_net)
    assert not callback.history
    with pytest.raises(ValueError, match="amounts by patterns count candidates; with budget='macs'"):
        ScreeningPruningCallback(amount=amount, budget="macs")
