from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from lightning_fscreen.slimming.gates import capture_training
from lightning_fscreen.slimming.paths import Paths
from tests.slimming.masked import CASES
from tests.slimming.pruned import Case, networks


def left(network: nn.Module) -> dict[str, Tensor]:
    """Masks of the weights that are not zero."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | _ConvNd)}
    return {f"{name}.weight": module.weight != 0 for name, module in layers.items()}


def idle(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return Paths(network, capture_training(network, (x,), {})).idle(left(network))


class Observed:
    """What the layers of a network read, and the gradients of what they write, call by call, on an input."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, list[Tensor]] = {}
        handles = []
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | _ConvNd):

                def note(module, args, output, name=name):
                    self.inputs.setdefault(name, []).append(args[0].detach().clone())
                    calls = self.gradients.setdefault(name, [])
                    place = len(calls)
                    calls.append(torch.zeros_like(output))
                    output = output * 1 if output.requires_grad else output.detach().requires_grad_()
                    output.register_hook(lambda gradient: calls.__setitem__(place, gradient))
                    return output.clone()  # which the network may overwrite

                handles.append(module.register_forward_hook(note))
        leaves = [leaf for leaf in pytree.tree_leaves(network(x)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        for handle in handles:
            handle.remove()
        if leaves:
            generator = torch.Generator().manual_seed(0)
            try:
                sum((leaf * torch.randn(leaf.shape, generator=generator)).sum() for leaf in leaves).backward()
            except RuntimeError as error:  # two activations in place, one after the other: nobody can train that
                assume("inplace operation" not in str(error))
                raise


def by_channel(tensor: Tensor, module: nn.Module) -> Tensor:
    """(channels, all else)."""
    return tensor.movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1)


def doing_nothing(network: nn.Module, shape: torch.Size) -> dict[str, Tensor]:
    """(out, in) bool: on two inputs the layer reads the same in a channel, or nothing depends on what it writes."""
    generator = torch.Generator().manual_seed(3)
    first, second = (
        Observed(network, 3 * torch.randn(shape, generator=generator, dtype=torch.float64)) for _ in range(2)
    )
    found = {}
    for name in first.inputs:
        module = network.get_submodule(name)
        same = [
            (by_channel(a, module) == by_channel(b, module)).all(1)
            for a, b in zip(first.inputs[name], second.inputs[name], strict=True)
        ]
        unread = [
            (by_channel(a, module) == 0).all(1) & (by_channel(b, module) == 0).all(1)
            for a, b in zip(first.gradients[name], second.gradients[name], strict=True)
        ]
        found[name] = torch.stack([u.unsqueeze(1) | s for u, s in zip(unread, same, strict=True)]).all(0)
    return found


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_what_is_idle_does_nothing_in_any_network(case: Case) -> None:
    network = case.network.eval()
    found = idle(network, case.example)
    for name, nothing in doing_nothing(network, case.example.shape).items():
        module = network.get_submodule(name)
        if f"{name}.weight" in found:
            own = found[f"{name}.weight"]
            own = own.transpose(0, 1) if getattr(module, "transposed", False) else own
            own = own.flatten(2).all(2) if own.ndim > 2 else own
            assert not bool((own & ~nothing).any()), name


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(1, 7), min_size=3, max_size=6), st.integers(0, 2**31), st.sampled_from([0.1, 0.3, 0.6]))
def test_all_that_is_idle_is_found_in_a_chain(widths: list[int], seed: int, density: float) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.GELU()]
        layers[-2].weight.data.mul_(torch.rand(b, a) < density)
    network = nn.Sequential(*layers[:-1]).double()
    found = idle(network, torch.randn(2, widths[0], dtype=torch.float64))
    for name, nothing in doing_nothing(network, torch.Size([4, widths[0]])).items():
        assert torch.equal(found[f"{name}.weight"], nothing)


def test_a_skip_keeps_what_it_passes() -> None:
    """A block that adds nothing leaves its stream as it is; only what is inside the block has nothing to do."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up, self.down, self.head = (
                nn.Linear(3, 4),
                nn.Linear(4, 6),
                nn.Linear(6, 4),
                nn.Linear(4, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.down(self.up(x).relu()))

    network = Block()
    network.down.weight.data.zero_()
    found = idle(network, torch.randn(2, 3))
    assert {name: bool(own.all()) for name, own in found.items() if own.any()} == {"up.weight": True}


@pytest.mark.parametrize("transposed", [False, True])
def test_channels_behind_batch_norms(transposed: bool) -> None:
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    network = nn.Sequential(make(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), make(4, 5, 3), nn.Flatten())
    network.append(nn.Linear(5 * (10 if transposed else 6) ** 2, 2))
    rows = network[0].weight.transpose(0, 1) if transposed else network[0].weight
    rows.data[1] = 0
    found = idle(network, torch.randn(2, 3, 8, 8))["3.weight"]
    columns = found.transpose(0, 1) if transposed else found
    assert bool(columns[:, 1].all()) and not bool(columns[:, [0, 2, 3]].any())


def test_a_weight_that_is_used_twice_is_idle_only_if_both_uses_are() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.shared(self.shared(self.first(x)).relu()))

    network = Twice()
    network.first.weight.data[2] = 0  # the first use reads a constant there, the second does not
    assert not any(bool(own.any()) for name, own in idle(network, torch.randn(2, 3)).items() if name != "first.weight")


@pytest.mark.parametrize("attends", [True, False])
def test_a_constant_channel_under_spatial_attention_says_where_it_attends(attends: bool) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 1, 3), nn.Conv2d(4, 2, 1)
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            gate = self.gate(x).sigmoid() if attends else self.temperature
            return self.last(self.first(x) * gate)

    network = Attending()
    network.first.weight.data[2] = 0
    found = idle(network, torch.randn(2, 3, 8, 8))["last.weight"]
    assert bool(found[:, 2].all()) is not attends and not bool(found[:, [0, 1, 3]].any())
