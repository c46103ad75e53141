"""Latency of masks, against the slim network, under a clock that counts what operations compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_fscreen import Latency
from lightning_fscreen.candidates.latency import capture_for, operations_of
from lightning_fscreen.candidates.units import Units
from lightning_fscreen.costs.size import Size
from lightning_fscreen.costs.timings import Operation, Timings
from lightning_fscreen.models import lenet300_100, resnet20, vgg16_bn, vit
from lightning_fscreen.slimming.select import SELECT
from tests.candidates.test_costs import random_masks
from tests.test_channel_fit import post_net
from tests.test_unit_fit import convnext, plain_net


def counted(operation: Operation) -> float:
    """A layer takes a microsecond for each entry of its weight, another call one for each element."""
    tensors = [value for value in operation.args if isinstance(value, Tensor)]
    dense = operation.target.name().startswith(("aten::linear", "aten::conv")) and operation.args[6:] in ((), (1,))
    if operation.target.name().startswith("aten::index_select"):
        return 1e-3 * tensors[0].numel() / tensors[0].shape[1] * len(tensors[1])
    return 1e-3 * (tensors[1].numel() if dense else max(tensor.numel() for tensor in tensors))


class Clock(Timings):
    """Counts."""

    def of(self, operation: Operation) -> float:
        return counted(operation)

    def overhead(self) -> float:
        return 0.0


def latency_of(network: nn.Module, x: Tensor, batch_size: int) -> int:
    """Nanoseconds of its operations."""
    return round(1e6 * sum(map(counted, operations_of(capture_for(network, (x,), {}, batch_size)))))


def check(network: nn.Module, x: Tensor, batch_size: int) -> None:
    clock = Clock(Latency(batch_size), torch.device("cpu"))
    dense = latency_of(network, x, batch_size) + 500
    units = Units(network, None, None)
    units.learn(network, (x,), {})
    costs = units.costs(Size(0, 0, None, latency=dense), "latency", clock)
    assert costs is not None
    masks = random_masks(units, 0)
    cost, prices, _ = costs.priced(masks)
    assert cost == costs.of(masks)
    assert costs.of({name: torch.ones_like(mask) for name, mask in masks.items()}) == pytest.approx(dense)
    assert all(bool((own > 0).all()) for own in prices.values())
    units.slim(network, (x,), {}, masks)
    selects = any(hasattr(module, SELECT) for module in network.modules())  # for how many norms is not known before
    slim = latency_of(network, x, batch_size) + 500  # that the operations do not take
    assert cost == pytest.approx(slim, rel=0.01 if selects else 1e-8)


@pytest.mark.parametrize(
    ("net", "size", "batch_size"),
    [
        (post_net, (1, 8, 8), 1),
        (convnext, (1, 8, 8), 1),
        (post_net, (1, 8, 8), 6),
        (plain_net, (1, 8, 8), 6),
        (resnet20, (3, 32, 32), 6),
        (lambda: vgg16_bn(width_mult=0.25), (3, 32, 32), 6),
        (lenet300_100, (1, 28, 28), 6),
        (vit, (3, 32, 32), 6),
    ],
)
def test_it_is_that_of_the_slim_network(net: Callable[[], nn.Module], size: tuple[int, ...], batch_size: int) -> None:
    torch.manual_seed(0)
    check(net(), torch.randn(2, *size), batch_size)


def test_layers_are_measured_at_odd_multiples() -> None:
    """Of 8 for widths in multiples of 8: few widths are multiples of more."""
    seen = set()

    class Watching(Clock):
        def of(self, operation: Operation) -> float:
            if operation.target.name().startswith("aten::conv"):
                seen.add(tuple(operation.args[1].shape[:2]))
            return super().of(operation)

    network = resnet20()
    units = Units(network, None, None, round_to=8)
    units.learn(network, (torch.randn(2, 3, 8, 8),), {})
    units.costs(Size(0, 0, None, latency=1), "latency", Watching(Latency(), torch.device("cpu")))
    assert {width for width, _ in seen} == {8, 16, 24, 32, 40, 56, 64}
    assert {width for _, width in seen} == {3, 8, 16, 24, 32, 40, 56, 64}
