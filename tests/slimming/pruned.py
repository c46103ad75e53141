"""Random networks of which many weights are zero."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from tests.slimming.networks import ANY_SIZE, BLOCKS, HEADS, conv, glu, grouped, shuffle


def prune(network: nn.Module, rng: random.Random) -> None:
    """Random weights, biases and statistics, many of them zero, whole rows, columns and layers too."""

    def some(size: int) -> list[int]:
        return rng.sample(range(size), rng.randint(0, size))

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 2.0)
                if module.weight is not None:
                    module.weight.normal_()
                    module.bias.normal_()
                    if rng.random() < 0.3:
                        module.weight[some(len(module.weight))] = 0
            elif isinstance(module, nn.Linear | _ConvNd):
                kind = rng.choice(["rows", "rows", "columns", "columns", "both", "some", "all", "none"])
                if kind in ("rows", "both"):
                    module.weight[some(module.weight.shape[0])] = 0
                if kind in ("columns", "both"):
                    module.weight[:, some(module.weight.shape[1])] = 0
                if kind == "some":
                    module.weight.mul_(torch.rand_like(module.weight) < 0.3)
                if kind == "all":
                    module.weight.zero_()
                if module.bias is not None and rng.random() < 0.3:
                    module.bias[some(len(module.bias))] = 0


@dataclass(repr=False)
class Case:
    """A random pruned network in float64, an input, and whether it takes other resolutions."""

    network: nn.Module
    example: Tensor
    any_size: bool

    def __repr__(self) -> str:
        return f"{self.network} on {tuple(self.example.shape)}"


@st.composite
def networks(draw: st.DrawFn) -> Case:
    rank = draw(st.sampled_from([2, 1, 3]))
    blocks = draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6))
    head = draw(st.sampled_from(HEADS))
    seed = draw(st.integers(0, 2**31))
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(2, 4, *[7 if rank == 3 else 8] * rank)
        layers: list[nn.Module] = [conv(4, rank, rng)]
        value = layers[0](x)
        for make in blocks:
            if make in (grouped, glu, shuffle) and value.shape[1] % 2:
                continue
            layers.append(make(value.shape[1], rank, rng))
            value = layers[-1].eval()(value)
        layers.append(head(value.shape[1:], rank, rng))
        network = nn.Sequential(*layers).double()
        prune(network, rng)
        for parameter in network.parameters():
            parameter.requires_grad_(rng.random() < 0.9)
        for module in network.modules():
            module.training = rng.random() < 0.5
    return Case(network, x.double(), head in ANY_SIZE)
