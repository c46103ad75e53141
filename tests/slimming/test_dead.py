from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from lightning_fscreen.slimming import SlimmingPlan, remove_dead_units
from tests.slimming import difference, outputs, snapshot, untouched
from tests.slimming.masked import CASES, sharing, sizes_match
from tests.slimming.pruned import Case, networks


def gradients(network: nn.Module, x: Tensor) -> set[str]:
    """Names of the parameters that a training step reaches."""
    network = copy.deepcopy(network).train()
    leaves = [leaf for leaf in pytree.tree_leaves(network(x)) if leaf.requires_grad]
    try:
        if leaves:
            sum(leaf.sum() for leaf in leaves).backward()
    except RuntimeError as error:  # two in-place activations in a row cannot be trained, slim or not
        assert "inplace" in str(error)
        return {"cannot be trained"}
    return {name for name, parameter in network.named_parameters() if parameter.grad is not None}


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_any_pruned_network_computes_the_same(case: Case) -> None:
    network, example, any_size = case.network, case.example, case.any_size
    masked = copy.deepcopy(network)
    plan = remove_dead_units(network, (example,))
    generator = torch.Generator().manual_seed(1)
    for batch, more in [(1, 0), (3, 3 * any_size)]:
        x = torch.randn(batch, 4, *(size + more for size in example.shape[2:]), generator=generator).double() * 3
        assert difference(outputs(masked, x), outputs(network, x)) < 1e-9
    added = sum(len(network.get_submodule(name).bias) for name in plan.biases)
    before, after = (sum(p.numel() for p in n.parameters()) for n in (masked, network))
    assert after <= before + added
    assert sizes_match(network)
    assert sharing(masked) == {g for g in sharing(network) if not g <= {f"{b}.bias" for b in plan.biases}}
    modes = [module.training for module in masked.modules()]
    assert [module.training for module in network.modules()] == modes
    flags = {name: (p.requires_grad, p.dtype) for name, p in masked.named_parameters()}
    slim_flags = {name: (p.requires_grad, p.dtype) for name, p in network.named_parameters()}
    assert {name: slim_flags[name] for name in flags} == flags
    added_names = {f"{name}.bias" for name in plan.biases}
    assert slim_flags.keys() == flags.keys() | added_names
    assert gradients(network, example) - added_names == gradients(masked, example)
    assert difference(outputs(network, example), outputs(copy.deepcopy(network), example)) == 0
    assert SlimmingPlan.from_json(plan.to_json()) == plan


@settings(max_examples=max(CASES // 4, 1), deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_a_second_pass_finds_nothing_and_the_result_can_be_exported(case: Case) -> None:
    network, example = case.network, case.example
    groups = max((module.groups for module in network.modules() if isinstance(module, _ConvNd)), default=1)
    # Groups lose alike in one pass (of a shuffle, too: two, of which one is left), whole ones one by one, what they fed
    # last.
    for _ in range(groups + (groups > 1) + 1):
        remove_dead_units(network, (example,))
    before = snapshot(network)
    assert not remove_dead_units(network, (example,))
    assert untouched(network, before)
    torch.compiler.reset()  # torch 2.6 counts exports of other networks as recompilations, and has a limit
    program = torch.export.export(network.eval(), (example,)).module()
    with torch.no_grad():
        exported = [leaf for leaf in pytree.tree_leaves(program(example)) if isinstance(leaf, Tensor)]
    assert difference(outputs(network, example), exported) < 1e-9


# ---- minimality on chains


def units_left(weights: list[Tensor]) -> list[int]:
    """Hidden units left per layer: drop zero rows and zero columns by hand until nothing changes."""
    matrices = [weight.flatten(2).abs().sum(2) if weight.ndim > 2 else weight.abs() for weight in weights]
    alive = [torch.ones(len(matrix), dtype=torch.bool) for matrix in matrices[:-1]]
    alive = [
        torch.ones(matrices[0].shape[1], dtype=torch.bool),
        *alive,
        torch.ones(len(matrices[-1]), dtype=torch.bool),
    ]
    while True:
        new = [mask.clone() for mask in alive]
        for layer, matrix in enumerate(matrices):
            left = matrix * alive[layer + 1][:, None] * alive[layer]
            if layer < len(matrices) - 1:
                new[layer + 1] &= left.sum(1) > 0
            if layer > 0:
                new[layer] &= left.sum(0) > 0
        if all(torch.equal(a, b) for a, b in zip(alive, new, strict=True)):
            return [int(mask.sum()) for mask in alive[1:-1]]
        alive = new


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Sequential, Tensor, list[Tensor]]:
    kind = draw(st.sampled_from(["linear", "conv", "padded"]))
    widths = draw(st.lists(st.integers(1, 7), min_size=3, max_size=6))
    bias = draw(st.booleans()) and kind != "padded"
    torch.manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.15, 0.3, 0.5]))
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layer = (
            nn.Linear(a, b, bias) if kind == "linear" else nn.Conv2d(a, b, 3, padding=int(kind == "padded"), bias=bias)
        )
        with torch.no_grad():
            keep = torch.rand(b, a) < density
            layer.weight.mul_(keep if kind == "linear" else keep[:, :, None, None])
        layers += [layer, nn.Sigmoid() if bias else nn.ReLU()]
    x = torch.randn(2, widths[0]) if kind == "linear" else torch.randn(2, widths[0], 13, 13)
    network = nn.Sequential(*layers[:-1]).double()
    return network, x.double(), [layer.weight.detach().clone() for layer in network[::2]]


@settings(max_examples=CASES // 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(chains())
def test_chains_get_as_small_as_by_hand(drawn: tuple[nn.Sequential, Tensor, list[Tensor]]) -> None:
    network, x, weights = drawn
    expected = units_left(weights)
    assume(min(expected) > 0)
    masked = copy.deepcopy(network)
    plan = remove_dead_units(network, (x,))
    assert [len(layer.weight) for layer in network[:-1:2]] == expected
    assert bool(plan) == (expected != [len(weight) for weight in weights[:-1]])
    y = torch.randn_like(x)
    assert difference(outputs(masked, y), outputs(network, y)) < 1e-9


@pytest.mark.parametrize("dead", [1, 2, 3])
def test_a_chain_that_is_cut_through_shrinks_to_one_unit_everywhere(dead: int) -> None:
    network = nn.Sequential(*[nn.Linear(6, 6) if i % 2 == 0 else nn.ReLU() for i in range(9)])
    nn.init.zeros_(network[2 * dead].weight)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 6),))
    x = torch.randn(5, 6)
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-6  # biases are rounded to float32
    assert [network[i].out_features for i in (0, 2, 4, 6)] == [1] * 4


def test_a_dense_network_is_left_alone() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    )
    before = snapshot(network)
    plan = remove_dead_units(network, (torch.randn(2, 3, 4, 4),))
    assert not plan and plan.removed == {}
    assert untouched(network, before)
