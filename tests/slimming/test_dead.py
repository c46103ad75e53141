from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from lightning_fscreen.slimming import SlimmingPlan, remove_dead_units
from tests.slimming import difference, outputs, snapshot, untouched, zero_columns, zero_rows
from tests.slimming.masked import CASES, sharing, sizes_match
from tests.slimming.networks import ANY_SIZE, BLOCKS, CONV, HEADS, conv, glu, grouped, shuffle


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


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_a_second_pass_finds_nothing_and_the_result_can_be_exported(case: Case) -> None:
    network, example = case.network, case.example
    groups = max((module.groups for module in network.modules() if isinstance(module, _ConvNd)), default=1)
    for _ in range(groups + (groups > 1)):  # groups lose alike in one pass, whole ones one by one, what they fed last
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


def test_learned_constants_of_a_dense_network_stay_trainable() -> None:
    """A learned query is no unit without incoming weights: nothing was pruned, nothing may go."""

    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 8))
            self.project, self.fc, self.head = nn.Linear(8, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.fc(x) + self.project(self.query)).relu())

    network = Query()
    plan = remove_dead_units(network, (torch.randn(2, 4),))
    assert not plan, plan.cuts
    assert network.query.shape == (1, 8)


# ---- constants


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_where_zero_padding_meets_constants_one_channel_carries_them(rank: int, bias: bool) -> None:
    first, second = CONV[rank](2, 6, 1), CONV[rank](6, 4, 3, padding=1, bias=bias)
    zero_rows(first, 1, 3, 4)
    network = nn.Sequential(first, nn.Sigmoid(), second, nn.ReLU(), CONV[rank](4, 2, 1)).double()
    masked = copy.deepcopy(network)
    plan = remove_dead_units(network, (torch.randn(2, 2, *[6] * rank).double(),))
    assert first.out_channels == 4 and plan.removed == {"0": 2}
    x = torch.randn(1, 2, *[9] * rank).double()
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


def test_without_padding_constants_go_into_a_new_bias() -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2, bias=False)).double()
    network[2].weight.requires_grad_(False)
    zero_rows(network[0], 0, 4)
    weight, constant = network[2].weight.detach().clone(), network[0].bias.detach().sigmoid()
    plan = remove_dead_units(network, (torch.randn(2, 3).double(),))
    assert plan.biases == ("2",)
    assert torch.allclose(network[2].bias, weight[:, [0, 4]] @ constant[[0, 4]], rtol=1e-12)
    assert not network[2].bias.requires_grad  # as its layer


def test_a_weak_carrier_does_not_ruin_float32() -> None:
    """Exact in float64 is not enough: a carrier with a vanishing constant needs weights that float32 cannot use."""
    first, second = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 3, padding=1)
    zero_rows(first, 0, 1)
    with torch.no_grad():
        first.bias.copy_(torch.tensor([-5.0, 1.0, 0.0]))  # gelu(-5) = -1e-6, in float32 only to a few percent
    skip = nn.Conv2d(3, 3, 1)
    zero_columns(skip, 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.skip = first, second, skip

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x)
            return self.second(F.gelu(h)), h[:, ::2]

    class Reads(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x)
            return self.second(F.gelu(h)), self.skip(h + x.abs())  # unit 0 lives: its sum with x is no constant

    network = Reads()
    x = torch.randn(4, 1, 6, 6)
    with torch.no_grad():
        before = network(x)[0]
        remove_dead_units(network, (torch.randn(2, 1, 6, 6),))
        after = network(x)[0]
    assert torch.allclose(before, after, atol=1e-4), (before - after).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_and_agree_to_their_precision(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, 4)).to(dtype)
    zero_rows(network[0], *range(0, 12, 2))
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 6, dtype=dtype),))
    assert network[0].out_features == 6
    assert {p.dtype for p in network.parameters()} == {dtype}
    x = torch.randn(9, 6)
    assert difference(outputs(masked, x), outputs(network, x)) < 4 * torch.finfo(dtype).eps


# ---- what stays as it was


@pytest.mark.parametrize(("rank", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_memory_format_stays(rank: int, layout: torch.memory_format) -> None:
    network = nn.Sequential(CONV[rank](3, 8, 3, bias=False), nn.ReLU(), CONV[rank](8, 4, 3)).to(memory_format=layout)
    zero_rows(network[0], 1, 2)
    remove_dead_units(network, (torch.randn(2, 3, *[7] * rank),))
    assert network[0].out_channels == 6
    assert all(network[i].weight.is_contiguous(memory_format=layout) for i in (0, 2))


def test_hooks_stay_and_the_random_state_is_not_used() -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2))
    zero_columns(network[3], 0)
    calls: list[tuple[int, ...]] = []
    handle = network[0].register_forward_hook(lambda module, args, output: calls.append(tuple(output.shape)))
    state = torch.get_rng_state()
    remove_dead_units(network, (torch.randn(2, 3, generator=torch.Generator()),))
    assert torch.equal(torch.get_rng_state(), state)
    calls.clear()
    network(torch.randn(7, 3))
    assert calls == [(7, 4)]
    handle.remove()
    network(torch.randn(7, 3))
    assert len(calls) == 1


def test_buffers_that_forward_writes_are_left_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)
            self.register_buffer("calls", torch.tensor(7))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.fc2(self.fc1(x).relu())

    network = Counting()
    zero_columns(network.fc2, 0)
    remove_dead_units(network, (torch.randn(2, 3),))
    assert network.fc1.out_features == 4
    assert network.calls == 7


def test_shared_parameters_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).relu()).relu())

    network = Tied().double()
    zero_columns(network.head, 1)
    zero_columns(network.a, 1)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 4).double(),))
    assert network.a.weight is network.b.weight
    x = torch.randn(5, 4).double()
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


def test_depthwise_layers_sharing_a_weight_both_change_their_groups() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
            self.a, self.b = (nn.Conv2d(6, 6, 3, padding=1, groups=6) for _ in range(2))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.stem(x)).relu()))

    network = Shared().double()
    zero_columns(network.head, 0, 5)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 3, 5, 5).double(),))
    assert (network.a.groups, network.b.groups) == (4, 4)
    x = torch.randn(3, 3, 6, 7).double()
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


def test_boolean_and_integer_buffers_are_cut_with_their_units() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)
            self.register_buffer("gate", torch.tensor([True, True, False, True, True]))
            self.register_buffer("times", torch.tensor([1, 2, 3, 4, 5]))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).relu() * self.gate * self.times)

    network = Gated().double()
    zero_columns(network.fc2, 0)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 3).double(),))
    assert network.gate.dtype == torch.bool and network.times.tolist() == [2, 4, 5]
    x = torch.randn(5, 3).double()
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


def test_keyword_and_nested_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, batch: dict[str, Tensor], *, scale: Tensor) -> Tensor:
            return self.fc2(self.fc1(batch["x"]).relu()) * scale

    network = Net().double()
    zero_columns(network.fc2, 1)
    masked = copy.deepcopy(network)
    remove_dead_units(network, ({"x": torch.randn(2, 3).double()},), {"scale": torch.ones(2, 1).double()})
    assert network.fc1.out_features == 4
    inputs = {"x": torch.randn(4, 3)}
    scale = torch.randn(4, 1)
    assert difference(outputs(masked, inputs, scale=scale), outputs(network, inputs, scale=scale)) < 1e-9


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)])
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2)).double()
    zero_rows(network[0], 1)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(shape).double(),))
    assert network[0].out_features == 4
    x = torch.randn(shape)
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_images_without_a_batch_dimension(rank: int) -> None:
    network = nn.Sequential(CONV[rank](2, 5, 2), nn.ReLU(), CONV[rank](5, 2, 2)).double()
    zero_rows(network[0], 1)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, *[5] * rank).double(),))
    assert network[0].out_channels == 4
    x = torch.randn(2, *[6] * rank)
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


@pytest.mark.parametrize("method", ["view", "reshape"])
def test_convolutions_are_viewed_into_a_linear_layer(method: str) -> None:
    """LeNet's `x.view(x.size(0), -1)`: each channel is a run of columns."""

    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 6, 3), nn.Linear(6 * 16, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x).sigmoid()
            return self.fc(getattr(h, method)(h.size(0), -1))

    network = LeNet().double()
    zero_rows(network.conv, 1, 4)
    zero_columns(network.fc, *range(32, 48))
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randn(2, 1, 6, 6).double(),))
    assert (network.conv.out_channels, network.fc.in_features) == (3, 48)
    x = torch.randn(5, 1, 6, 6)
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9


def test_a_network_that_casts_its_input_to_float32_can_be_slimmed() -> None:
    """As networks fed with bytes do: `x.float() / 255`."""

    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x.float() / 255).relu())

    network = Bytes()
    zero_columns(network.fc2, 1)
    masked = copy.deepcopy(network)
    remove_dead_units(network, (torch.randint(0, 256, (2, 3), dtype=torch.uint8),))
    assert network.fc1.out_features == 4
    x = torch.randint(0, 256, (9, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(masked(x), network(x), atol=1e-5)
