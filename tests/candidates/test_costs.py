"""Costs of masks in closed form, against the slim network counted by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lightning_fscreen.candidates.units import Units
from lightning_fscreen.costs.size import measure_size
from lightning_fscreen.models import densenet40, resnet20
from tests.slimming.attentions import random_block
from tests.slimming.masked import CASES
from tests.test_channel_fit import post_net, residual_net
from tests.test_unit_fit import convnext, mixed_net, sigmoid_net


def count(network: nn.Module, x: Tensor) -> dict[str, int]:
    """By torch's own counter."""
    counter = FlopCounterMode(display=False)
    with counter:
        network.eval()(x)
    return {"params": sum(p.numel() for p in network.parameters()), "macs": counter.get_total_flops() // 2 // len(x)}


def random_masks(units: Units, seed: int) -> dict[str, Tensor]:
    """Whole units, no layer emptied."""
    generator = torch.Generator().manual_seed(seed)
    numbers = units.units()
    assert numbers is not None
    kept = {unit: bool(torch.rand((), generator=generator) < 0.5) for own in numbers.values() for unit in own.tolist()}
    for own in numbers.values():
        kept[int(own[0])] = kept[-1] = True
    return {name: torch.tensor([kept[unit] for unit in own.tolist()]) for name, own in numbers.items()}


def check(network: nn.Module, x: Tensor, bias: Literal["zero", "fold"], seed: int) -> None:
    units = Units(network, None, None, bias=bias)
    units.learn(network, (x,), {})
    before, masks = measure_size(network, ((x,), {}), len(x)), random_masks(units, seed)
    found = {}
    for currency in ("params", "macs"):
        costs = units.costs(before, currency)  # type: ignore[arg-type]
        assert costs is not None
        found[currency], prices, _ = costs.priced(masks)
        assert found[currency] == costs.of(masks) and all(bool((own >= 0).all()) for own in prices.values())
    units.slim(network, (x,), {}, masks)
    assert found == pytest.approx(count(network, x), rel=1e-9)


@pytest.mark.parametrize("bias", ["zero", "fold"])
@pytest.mark.parametrize("net", [residual_net, post_net, mixed_net, sigmoid_net, convnext])
def test_channels_and_neurons(net, bias):  # type: ignore[no-untyped-def]
    for seed in range(3):
        torch.manual_seed(seed)
        network = net()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.bias)
        check(network, torch.randn(3, 1, 8, 8), bias, seed)


@pytest.mark.parametrize("seed", range(CASES // 2))
def test_heads(seed: int) -> None:
    """In float64, where torch counts every product, and in float32, where it does not see all of them."""
    for dtype in (torch.float64, torch.float32):
        network = random_block(seed).to(dtype)
        width = network.before.normalized_shape[0]
        check(network, torch.randn(2, 5, width, dtype=dtype), "zero", seed)


class Attending(nn.Module):
    """Multiplies activations in a module that has no parameters itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), x.shape[1], 3, -1, 3).permute(2, 0, 3, 1, 4)
        result: Tensor = self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_count_if_torch_counts_them(dtype: torch.dtype) -> None:
    for seed in range(3):
        check(Attending().to(dtype), torch.randn(2, 5, 12, dtype=dtype), "zero", seed)


@pytest.mark.parametrize("net", [residual_net, resnet20, densenet40])
def test_a_stream_costs_what_goes_with_its_readers(net: Callable[[], nn.Module]) -> None:
    network = net()
    x = torch.randn(2, 1 if net is residual_net else 3, 8, 8)
    units = Units(network, None, None, streams=True)
    units.learn(network, (x,), {})
    masks = random_masks(units, 0)
    lengths = [len(mask) for mask in masks.values()]
    numbers = dict(zip(masks, torch.arange(sum(lengths)).split(lengths), strict=True))
    for currency in ("params", "macs"):
        costs = units.costs(measure_size(network, ((x,), {}), len(x)), currency)  # type: ignore[arg-type]
        assert costs is not None
        cost, own, streams = costs.priced(masks)
        prices, (channels, readers) = torch.cat(list(own.values())), costs.streams(numbers)
        kept, several = torch.cat(list(masks.values())), 0
        for stream in (streams > 0).nonzero().flatten().tolist()[:40]:
            gone = readers[channels == stream]
            without = kept.clone()
            without[gone] = False
            left = dict(zip(masks, without.split(lengths), strict=True))
            if all(bool(mask.any()) for mask in left.values()):  # else one stays for the shape
                saved = float(streams[stream] + prices[gone][kept[gone]].sum())
                assert cost - costs.of(left) == pytest.approx(saved)
                several += int(kept[gone].sum() > 1)
        assert several >= 3


@pytest.mark.parametrize("bias", ["zero", "fold", "mean"])
def test_units_that_would_stay_cost_nothing(bias: Literal["zero", "fold", "mean"]) -> None:
    """Behind dropout a unit that is switched off is a constant only if it is zero; slimming says which stay."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    units = Units(network, None, None, bias=bias)
    units.learn(network, (x,), {})
    costs, numbers = units.costs(measure_size(network, ((x,), {}), len(x)), "macs"), units.units()
    assert costs is not None and numbers is not None
    masks = {name: torch.arange(len(own)) < 3 for name, own in numbers.items()}
    _, prices, _ = costs.priced({name: torch.ones_like(mask) for name, mask in masks.items()})
    plan = units.slim(network, (x,), {}, masks)
    free = {name for name, price in prices.items() if not bool(price.any())}
    assert free == set(plan.kept_for) == (set() if bias == "zero" else {"0"})


@pytest.mark.parametrize("streams", [False, True])
def test_a_channel_goes_though_the_constant_that_is_left_of_it_stays(streams: bool) -> None:
    """A convolution with groups cannot carry it; but the batch norm takes another channel for one that is off."""
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1, groups=2))
    network.append(nn.Flatten()).append(nn.Linear(8 * 16, 2))
    nn.init.uniform_(network[1].bias, 0.1, 0.2)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 6, 6)
    units = Units(network, None, None, bias="fold", streams=streams)
    units.learn(network, (x,), {})
    numbers = units.units()
    assert numbers is not None
    masks = {name: own != numbers["1"][0] for name, own in numbers.items()}
    found = {}
    for currency in ("params", "macs"):
        costs = units.costs(measure_size(network, ((x,), {}), len(x)), currency)  # type: ignore[arg-type]
        assert costs is not None
        full, prices, _ = costs.priced({name: torch.ones_like(own) for name, own in masks.items()})
        found[currency] = costs.of(masks)
        assert full - found[currency] == prices["1"][~masks["1"]].sum() > 0
    plan = units.slim(network, (x,), {}, masks)
    assert found == count(network, x) and "1" in plan.kept_for
