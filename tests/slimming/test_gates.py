"""Gates: which channels can be pruned, which of them together, and why others cannot."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from lightning_fscreen.slimming import CaptureError, Gate, slim
from lightning_fscreen.slimming.gates import STAYS
from tests.slimming import difference, outputs, snapshot, untouched
from tests.slimming.masked import CASES, KINDS, Dag, find_gates, masked_copy, randomize
from tests.slimming.networks import Function

X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(channels: int, out: int, kernel: int = 1, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, **kwargs)


def normed(channels: int, out: int, **kwargs: Any) -> nn.Sequential:
    return nn.Sequential(conv(channels, out, **kwargs), nn.BatchNorm2d(out))


def gates(network: nn.Module, example: Any = X) -> dict[str, Gate]:
    return {gate.name: gate for gate in find_gates(network, example)}


def free(gate: Gate) -> bool:
    """Whether every channel can be pruned alone, as far as this gate goes."""
    return gate.excluded is None and STAYS not in gate.units and len(set(gate.units)) == gate.channels


# ---- hand-made networks


def test_gates_of_a_chain_are_free_and_apart() -> None:
    network = nn.Sequential(normed(3, 8), nn.ReLU(), normed(8, 4, kernel=3), nn.SiLU(), conv(4, 2))
    found = find_gates(network, X)
    assert [(gate.name, gate.channels) for gate in found] == [("0.1", 8), ("2.1", 4)]
    assert all(map(free, found)) and found[0].group != found[1].group
    assert not set(found[0].units) & set(found[1].units)


def test_finding_gates_changes_nothing() -> None:
    network = nn.Sequential(normed(3, 8), nn.ReLU(), nn.Dropout(), conv(8, 2))
    network[0].eval()
    before, modes, state = snapshot(network), [m.training for m in network.modules()], torch.get_rng_state()
    find_gates(network, X)
    assert untouched(network, before) and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes


@pytest.mark.parametrize("inputs", [X, (X,), [X], {"x": X}])
def test_inputs_in_all_their_forms(inputs: Any) -> None:
    network = Function(lambda x, first, last: last(first(x).relu()), normed(3, 8), conv(8, 2))
    assert free(gates(network, inputs)["parts.0.1"])


def residual(combine: Callable[..., Tensor], **kwargs: Any) -> nn.Module:
    return Function(
        lambda x, left, right, last: last(combine(left(x), right(x))), normed(3, 8), normed(3, 8, **kwargs), conv(8, 2)
    )


@pytest.mark.parametrize("combine", [torch.add, torch.sub, lambda a, b: (a + b).relu(), torch.maximum])
def test_what_is_added_is_coupled(combine: Callable[..., Tensor]) -> None:
    found = gates(residual(combine))
    left, right = found["parts.0.1"], found["parts.1.1"]
    assert free(left) and left.units == right.units and left.group == right.group


def test_pre_activation_gates_are_all_free() -> None:
    network = Function(
        lambda x, stem, first, second, last: last((x := stem(x)) + second(first(x).relu()).relu()),
        conv(3, 8),
        nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6)),
        nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8)),
        nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2)),
    )
    found = find_gates(network, X)
    assert [gate.channels for gate in found] == [8, 6, 8] and all(map(free, found))
    assert len({gate.group for gate in found}) == 3


def test_a_concatenation_couples_its_parts_in_their_places() -> None:
    """cat([a, b]) + c: the first channels of c go with a, the others with b."""
    network = Function(
        lambda x, a, b, c, last: last((torch.cat([a(x), b(x)], 1) + c(x)).relu()),
        normed(3, 2),
        normed(3, 4),
        normed(3, 6),
        conv(6, 2),
    )
    a, b, c = find_gates(network, X)
    assert free(a) and free(b) and free(c)
    assert c.units == (*a.units, *b.units) and a.group == b.group == c.group


def test_channels_that_meet_one_that_cannot_be_switched_off_stay() -> None:
    """cat([a, plain convolution]) + c: half of c is coupled to a, the other half has to stay."""
    network = Function(
        lambda x, a, b, c, last: last((torch.cat([a(x), b(x)], 1) + c(x)).relu()),
        normed(3, 4),
        conv(3, 4),
        normed(3, 8),
        conv(8, 2),
    )
    a, c = find_gates(network, X)
    assert free(a) and c.excluded is None
    assert c.units == (*a.units, *[STAYS] * 4) and a.group == c.group


def test_depthwise_convolutions_couple_the_gates_on_both_sides() -> None:
    network = nn.Sequential(
        normed(3, 6), nn.ReLU6(), conv(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(), normed(6, 4),
        nn.ReLU(), conv(4, 2),
    )  # fmt: skip
    first, second, third = find_gates(network, X)
    assert first.units == second.units and free(first) and free(third)
    assert first.group == second.group != third.group


@pytest.mark.parametrize("spread", [2, 3])
def test_a_depthwise_multiplier_couples_all_that_a_channel_is_spread_to(spread: int) -> None:
    network = nn.Sequential(
        normed(3, 4), nn.ReLU(), conv(4, 4 * spread, 3, groups=4), nn.BatchNorm2d(4 * spread), nn.ReLU(),
        conv(4 * spread, 2),
    )  # fmt: skip
    first, second = find_gates(network, X)
    assert second.units == tuple(unit for unit in first.units for _ in range(spread))


def test_groups_of_a_convolution_keep_the_same_channels_each() -> None:
    network = nn.Sequential(normed(3, 8), nn.ReLU(), conv(8, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2))
    first, second = find_gates(network, X)
    assert first.units == (*first.units[:4], *first.units[:4]) and len(set(first.units)) == 4
    assert second.units == (*second.units[:3], *second.units[:3]) and len(set(second.units)) == 3
    assert first.group != second.group


def test_a_channel_shuffle_is_followed() -> None:
    def shuffled(x: Tensor, first: nn.Module, second: nn.Module, last: nn.Module) -> Tensor:
        h = first(x)
        mixed = h.view(len(h), 2, h.shape[1] // 2, *h.shape[2:]).transpose(1, 2).reshape(h.shape)
        out: Tensor = last((mixed + second(x)).relu())
        return out

    first, second = find_gates(Function(shuffled, normed(3, 6), normed(3, 6), conv(6, 2)), X)
    assert second.units == tuple(first.units[i] for i in (0, 3, 1, 4, 2, 5))


def test_squeeze_and_excitation_leaves_channels_free() -> None:
    def scaled(x: Tensor, first: nn.Module, down: nn.Module, up: nn.Module, last: nn.Module) -> Tensor:
        h = first(x).relu()
        gate = up(down(h.mean((2, 3), keepdim=True)).relu()).sigmoid()
        out: Tensor = last(h * gate)
        return out

    network = Function(scaled, normed(3, 8), conv(8, 2), conv(2, 8), conv(8, 2))
    assert free(find_gates(network, X)[0])


def squeezed(spread: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    def function(x: Tensor, first: nn.Module, up: nn.Module, last: nn.Module) -> Tensor:
        h = first(x).relu()
        out: Tensor = last(h * spread(up(h.mean((2, 3))).sigmoid(), h))
        return out

    return Function(function, normed(3, 8), nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8)), conv(8, 2))


@pytest.mark.parametrize(
    "spread",
    [
        lambda gate, h: gate[:, :, None, None],
        lambda gate, h: gate.unsqueeze(-1).unsqueeze(-1),
        lambda gate, h: gate.view(h.shape[0], h.shape[1], 1, 1),
        lambda gate, h: gate.view(h.size(0), h.size(1), 1, 1).expand(h.shape),
        lambda gate, h: gate.view(h.size(0), h.size(1), 1, 1).expand_as(h),
        lambda gate, h: gate.unflatten(1, (-1, 1, 1)),
    ],
)
def test_squeeze_and_excitation_as_people_write_it(spread: Callable[[Tensor, Tensor], Tensor]) -> None:
    network = squeezed(spread)
    assert free(find_gates(network, X)[0])
    kept = torch.tensor([False, False] + [True] * 6)
    slim(network, {"parts.0.1": kept}, X)
    assert gates(network)["parts.0.1"].channels == 6


@pytest.mark.parametrize(
    "head",
    [
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveMaxPool2d(1),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ZeroPad2d(1),
        nn.ReflectionPad2d(1),
        nn.Dropout2d(),
        nn.Identity(),
    ],
)
def test_layers_without_weights_keep_channels_apart(head: nn.Module) -> None:
    assert free(find_gates(nn.Sequential(normed(3, 8), nn.ReLU(), head, conv(8, 2)), X)[0])


def test_a_batch_norm_that_is_called_twice_is_one_gate() -> None:
    network = Function(
        lambda x, a, b, norm, last: last(norm(a(x)).relu() + norm(b(x)).relu()),
        conv(3, 8),
        conv(3, 8),
        nn.BatchNorm2d(8),
        conv(8, 2),
    )
    (gate,) = find_gates(network, X)
    assert gate.name == "parts.2" and free(gate)


def test_heads_that_only_train_mode_has_are_seen() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.aux = normed(3, 8), conv(8, 2), nn.Sequential(normed(8, 4), conv(4, 2))

        def forward(self, x: Tensor) -> Any:
            h = self.body(x).relu()
            return (self.head(h), self.aux(h)) if self.training else self.head(h)

    network = Auxiliary().eval()
    assert {name: free(gate) for name, gate in gates(network).items()} == {"body.1": True, "aux.0.1": True}
    assert not any(module.training for module in network.modules())


# ---- what is excluded, and why


def sequential(norm: nn.Module) -> nn.Module:
    return nn.Sequential(conv(3, 8), norm, nn.ReLU(), conv(8, 2))


def excluded(network: nn.Module, name: str) -> str:
    gate = gates(network)[name]
    assert gate.excluded is not None and gate.units == (STAYS,) * gate.channels
    return gate.excluded


def test_frozen_gates_say_so() -> None:
    network = sequential(nn.BatchNorm2d(8).requires_grad_(False))
    assert excluded(network, "1") == "frozen (requires_grad is False)"


def test_gates_without_a_scale_say_so() -> None:
    assert "affine=False" in excluded(sequential(nn.BatchNorm2d(8, affine=False)), "1")


def test_the_output_of_the_network_stays() -> None:
    assert excluded(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8)), "1") == "it is an output of the network"
    network = Function(lambda x, a, last: {"features": [a(x)], "out": last(a(x))}, normed(3, 8), conv(8, 2))
    assert excluded(network, "parts.0.1") == "it is an output of the network"


def test_a_gate_that_is_added_to_what_no_gate_switches_off_names_the_reader() -> None:
    network = Function(lambda x, a, b, last: last(a(x) + b(x)), normed(3, 8), conv(3, 8), conv(8, 2))
    assert excluded(network, "parts.0.1") == "'parts.2' reads it mixed with channels that no gate can switch off"


def test_a_gate_that_is_added_to_a_frozen_one_is_excluded_with_it() -> None:
    network = residual(torch.add)
    network.get_submodule("parts.1.1").requires_grad_(False)
    assert "frozen" in excluded(network, "parts.1.1")
    assert "no gate can switch off" in excluded(network, "parts.0.1")


def test_a_gate_that_is_added_to_the_input_stays() -> None:
    network = Function(lambda x, a, last: last(a(x) + x), normed(3, 3), conv(3, 2))
    assert excluded(network, "parts.0.1") == "it is added to, or multiplied by, a tensor whose channels all stay"


def test_a_gate_that_is_not_reached_says_so() -> None:
    network: Any = nn.Sequential(normed(3, 8), conv(8, 2))
    network[0].unused = nn.BatchNorm2d(5)
    network[0].forward = nn.Sequential(*network[0][:2]).forward
    assert excluded(network, "0.unused") == "the example inputs do not reach it"


def test_gates_that_share_their_scale_are_one() -> None:
    network: Any = nn.Sequential(normed(3, 8), nn.ReLU(), normed(8, 8), nn.ReLU(), conv(8, 2))
    network[2][1].weight = network[0][1].weight
    assert excluded(network, "2.1") == "shares its scale with '0.1', which can be pruned"
    assert free(gates(network)["0.1"])


def test_an_unknown_operator_is_named() -> None:
    network = Function(lambda x, a, last: last(a(x).softmax(1)), normed(3, 8), conv(8, 2))
    assert "softmax" in excluded(network, "parts.0.1")


def test_a_scale_that_is_computed_says_so() -> None:
    network: Any = nn.Sequential(normed(3, 8), nn.ReLU(), conv(8, 2))
    nn.utils.parametrize.register_parametrization(network[0][1], "weight", nn.Softplus())
    assert "parametrization" in excluded(network, "0.1")


def test_a_scale_or_shift_that_is_no_parameter_says_so() -> None:
    network: Any = nn.Sequential(normed(3, 8), nn.ReLU(), conv(8, 2))
    nn.utils.prune.random_unstructured(network[0][1], "weight", 0.5)
    assert excluded(network, "0.1").startswith("its scale is not a parameter")
    network = nn.Sequential(normed(3, 8), nn.ReLU(), conv(8, 2))
    nn.utils.parametrize.register_parametrization(network[0][1], "bias", nn.Softplus())
    assert excluded(network, "0.1") == "its shift is missing, or not a parameter of its own"


def test_a_network_that_cannot_be_captured_is_refused() -> None:
    network = Function(lambda x, a: a(x) if x.sum() > 0 else -a(x), normed(3, 8))
    before = snapshot(network)
    with pytest.raises(CaptureError, match="Function cannot be captured"):
        find_gates(network, X)
    assert untouched(network, before)


# ---- real networks


@pytest.mark.parametrize(("build", "channels", "count"), [("densenet40", 9_360, 39), ("resnet20", 688, 19)])
def test_every_channel_of_a_pre_activation_network_is_free(build: str, channels: int, count: int) -> None:
    from lightning_fscreen import models

    found = find_gates(getattr(models, build)(), torch.randn(2, 3, 16, 16))
    assert sum(gate.channels for gate in found) == channels and len(found) == count
    assert all(map(free, found))
    units = [unit for gate in found for unit in gate.units]
    assert len(set(units)) == channels and len({gate.group for gate in found}) == count


def torchvision(build: str) -> Any:
    return getattr(pytest.importorskip("torchvision").models, build)()


def test_gates_of_resnet18_are_coupled_by_stage() -> None:
    found = gates(torchvision("resnet18"), torch.randn(2, 3, 64, 64))
    assert len(found) == 20 and all(map(free, found.values()))
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        stem = ["bn1"] if stage == 1 else [f"layer{stage}.0.downsample.1"]
        names = [*stem, f"layer{stage}.0.bn2", f"layer{stage}.1.bn2"]
        assert {len(found[name].units) for name in names} == {width}
        assert len({found[name].units for name in names}) == len({found[name].group for name in names}) == 1
        inner = [found[f"layer{stage}.{block}.bn1"] for block in range(2)]
        assert len({found[names[0]].group, *(gate.group for gate in inner)}) == 3


@pytest.mark.parametrize("build", ["shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_whole_units_of_torchvision_networks_go(build: str) -> None:
    network = getattr(pytest.importorskip("torchvision").models, build)().eval()
    x = torch.randn(2, 3, 64, 64)
    found = find_gates(network, x)
    assert all(gate.excluded is None for gate in found)
    randomize(network)
    check_whole_units(network, found, x, random.Random(0), 0.5, exact=build != "shufflenet_v2_x0_5")


# ---- the promise: whole units go


def choose(found: list[Gate], rng: random.Random, share: float) -> dict[str, Tensor]:
    """Masks that prune whole units, and leave one channel of every gate at least."""
    left = {gate.name: gate.channels for gate in found}
    sizes: dict[int, dict[str, int]] = {}
    for gate in found:
        for unit in gate.units:
            if unit != STAYS:
                sizes.setdefault(unit, {}).setdefault(gate.name, 0)
                sizes[unit][gate.name] += 1
    pruned = set()
    for unit, by_gate in sizes.items():
        if rng.random() < share and all(left[name] > count for name, count in by_gate.items()):
            pruned.add(unit)
            for name, count in by_gate.items():
                left[name] -= count
    return {gate.name: torch.tensor([unit not in pruned for unit in gate.units]) for gate in found}


def check_whole_units(
    network: nn.Module, found: list[Gate], x: Tensor, rng: random.Random, share: float, exact: bool
) -> None:
    keep = choose([gate for gate in found if gate.excluded is None], rng, share)
    masked = masked_copy(network, keep, "zero")
    plan = slim(network, keep, x)
    for name, kept in keep.items():
        left = plan.cuts.get(f"{name}.weight", {0: tuple(range(len(kept)))})[0]
        assert not set(left) & set((~kept).nonzero().flatten().tolist()), f"{name} keeps channels that were pruned"
        if exact:
            assert list(left) == kept.nonzero().flatten().tolist(), f"{name} lost channels that were kept"
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-9 or x.dtype == torch.float32


SILENT: list[Callable[[], nn.Module]] = [nn.ReLU, nn.SiLU, nn.Tanh, nn.GELU, nn.ELU, nn.PReLU, nn.Hardswish]


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([1, 2]),
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 11), st.integers(0, 11), st.integers(0, 11)),
        min_size=3,
        max_size=20,
    ),
    st.integers(0, 2**31),
    st.sampled_from([0.2, 0.5, 0.9]),
)
def test_whole_units_go_where_activations_are_silent_at_zero(
    rank: int, steps: list[tuple[str, int, int, int]], seed: int, share: float
) -> None:
    """What is promised to go goes, whatever else the graph does, and whether or not other gates are excluded."""
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Dag(steps, rank, rng)
        for index, part in enumerate(network.parts):
            if not isinstance(part, _BatchNorm | _ConvNd | _MaxPoolNd | _AvgPoolNd):
                network.parts[index] = rng.choice(SILENT)()
        network = network.double()
        randomize(network)
        x = torch.randn(4, 4, *[5] * rank).double()
        check_whole_units(network, find_gates(network, x), x, rng, share, exact=False)


def chain(widths: list[int], rng: random.Random) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        kernel = rng.choice([1, 3])
        layers += [normed(channels, width, kernel=kernel, bias=rng.random() < 0.5), rng.choice(SILENT)()]
        channels = width
    return nn.Sequential(*layers, conv(channels, 2))


@settings(max_examples=CASES // 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**31), st.sampled_from([0.2, 0.5, 0.9]))
def test_chains_lose_just_what_is_pruned(widths: list[int], seed: int, share: float) -> None:
    rng = random.Random(seed)
    network = chain(widths, rng).double()
    randomize(network)
    before = copy.deepcopy(network)
    found = find_gates(network, X.double())
    assert all(map(free, found)) and [gate.channels for gate in found] == widths
    check_whole_units(network, found, X.double(), rng, share, exact=True)
    assert sum(p.numel() for p in network.parameters()) <= sum(p.numel() for p in before.parameters())
