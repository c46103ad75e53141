"""Slimming by switched-off channels, against the masked network."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from lightning_fscreen import load_slimmed, models, save_slimmed
from lightning_fscreen.slimming import CaptureError, SlimmingPlan, VerificationError, find_gates, slim
from lightning_fscreen.slimming.plan import plan_of
from lightning_fscreen.slimming.select import SELECT
from tests.slimming import difference, outputs, snapshot, untouched
from tests.slimming.networks import (
    ACTIVATIONS,
    ANY_SIZE,
    AVG_POOL,
    BLOCKS,
    CONV,
    HEADS,
    MAX_POOL,
    NORM,
    NORM_BLOCKS,
    TRANSPOSED,
    Auxiliary,
    conv,
    glu,
    grouped,
    linear_norm,
    shuffle,
    shuffle_unit,
)
from tests.slimming.test_dead import sharing, sizes_match

CASES = int(os.environ.get("FSCREEN_CASES", "40"))
BIASES = ["zero", "fold"]


@dataclass(repr=False)
class Case:
    """A random network in float64 with random batch norms, masks, an input, and whether it takes other resolutions.

    `dead` ones have layers that nobody reads: of those only the shape is kept.
    """

    network: Any
    keep: dict[str, Tensor]
    example: Tensor
    any_size: bool
    bias: str
    dead: bool = False

    def __repr__(self) -> str:
        masks = {name: mask.int().tolist() for name, mask in self.keep.items()}
        return f"{self.network} on {tuple(self.example.shape)}, {self.bias}, {masks}"


def randomize(network: nn.Module) -> None:
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                module.weight.normal_()
                module.bias.normal_()
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 2.0)


def masks(network: nn.Module, example: Any, rng: random.Random, share: float, together: bool) -> dict[str, Tensor]:
    """Random masks of all gates, of at least one channel; arbitrary ones, or such that prune whole units."""
    decided: dict[int, bool] = {}
    keep = {}
    for gate in find_gates(network, example):
        if network.get_submodule(gate.name).weight is None or (together and gate.excluded):
            continue
        kept = [
            decided.setdefault(unit, rng.random() >= share) if together and unit >= 0 else rng.random() >= share
            for unit in gate.units
        ]
        if not any(kept):
            kept[rng.randrange(gate.channels)] = True
        keep[gate.name] = torch.tensor(kept)
    return keep


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.sampled_from([2, 2, 1, 3]))
    blocks = draw(st.lists(st.sampled_from([*NORM_BLOCKS, *NORM_BLOCKS, *BLOCKS]), min_size=1, max_size=5))
    head = draw(st.sampled_from([*HEADS, linear_norm]))
    bias = draw(st.sampled_from(BIASES))
    together = draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(3, 4, *[6 if rank == 3 else 8] * rank)
        layers: list[nn.Module] = [conv(4, rank, rng)]
        value = layers[0](x)
        for make in blocks:
            if make in (grouped, glu, shuffle, shuffle_unit) and value.shape[1] % 2:
                continue
            layers.append(make(value.shape[1], rank, rng))
            value = layers[-1].eval()(value)
        if rng.random() < 0.3:
            layers[-1] = nn.Sequential(layers[-1])
        layers.append(head(value.shape[1:], rank, rng))
        network: nn.Module = nn.Sequential(*layers)
        if rng.random() < 0.2:
            network = Auxiliary(network, 4, rank)
        network = network.double()
        randomize(network)
        for parameter in network.parameters():
            parameter.requires_grad_(rng.random() < 0.95)
        for module in network.modules():
            module.training = rng.random() < 0.5
        keep = masks(network, x.double(), rng, rng.choice([0.3, 0.5, 0.9]), together)
    return Case(network, keep, x.double(), head in ANY_SIZE, bias)


class Dag(nn.Module):
    """Any operators on any earlier feature maps, all of one resolution.

    Args:
        steps: (kind, and three numbers that choose operands and sizes), one for each operator.
        rank: number of positional dimensions.
        rng: chooses everything else.
        unread: share of the last maps that nobody reads.
    """

    def __init__(
        self, steps: list[tuple[str, int, int, int]], rank: int, rng: random.Random, unread: float = 0.0
    ) -> None:
        super().__init__()
        self.rank = rank
        self.parts = nn.ModuleList([CONV[rank](4, 4, 3, padding=1), CONV[rank](2, 6, 1), NORM[rank](6)])
        self.program: list[tuple[str, int | None, tuple[int, ...]]] = [
            ("call", 0, (0,)),
            ("call", 1, (1,)),
            ("call", 2, (3,)),
        ]
        self.channels = [4, 2, 4, 6, 6]  # of the inputs, and of what every step puts out
        for kind, *numbers in steps:
            self._add(kind, numbers, rng)
        read = {source for _, _, sources in self.program for source in sources}
        leaves = [index for index in range(2, len(self.channels)) if index not in read]
        self.leaves = [leaf for leaf in leaves if leaf == leaves[-1] or rng.random() >= unread]
        self.aside = leaves[-1] if rng.random() < 0.2 else None  # read in train mode only
        self.norm = nn.BatchNorm1d(self.channels[leaves[-1]])
        self.aux = nn.Linear(self.channels[leaves[-1]], 3)
        self.fc = nn.Linear(sum(self.channels[leaf] for leaf in self.leaves), 3)

    def _add(self, kind: str, numbers: list[int], rng: random.Random) -> None:
        first, second, size = numbers
        source = len(self.channels) - 1 - first % min(len(self.channels), 4)
        width = self.channels[source]
        others = [index for index, channels in enumerate(self.channels) if channels == width]
        other = others[second % len(others)]
        if kind in ("add", "mul", "gate"):
            self._append(kind, None, (source, other), width)
        elif kind == "cat":
            third = size % len(self.channels)
            if width + self.channels[third] <= 16:
                self._append(kind, None, (source, third), width + self.channels[third])
        elif kind in ("halves", "slices") and width % 2 == 0:
            self._append(kind + "0", None, (source,), width // 2)
            self._append(kind + "1", None, (source,), width // 2)
        elif kind == "shuffle" and width % 2 == 0:
            self._append(kind, None, (source,), width)
        elif kind == "again":  # one module, another map
            called = [
                (again, self.channels[index + 2])
                for index, (_, again, sources) in enumerate(self.program)
                if again is not None and self.channels[sources[0]] == width
            ]
            if called:
                again, out = called[second % len(called)]
                self._append("call", again, (source,), out)
        elif kind not in ("halves", "slices", "shuffle"):
            part, out = self._part(kind, width, [2, 3, 4, 6, 8][size % 5], rng)
            self.parts.append(part)
            self._append("call", len(self.parts) - 1, (source,), out)

    def _append(self, kind: str, part: int | None, sources: tuple[int, ...], channels: int) -> None:
        self.program.append((kind, part, sources))
        self.channels.append(channels)

    def _part(self, kind: str, width: int, size: int, rng: random.Random) -> tuple[nn.Module, int]:
        rank, bias = self.rank, rng.random() < 0.5
        if kind == "norm":
            return NORM[rank](width), width
        if kind == "activation":
            make: Any = rng.choice([*ACTIVATIONS, partial(nn.PReLU, width), nn.Hardsigmoid, nn.Dropout])
            return make(), width
        if kind == "pool":
            pools: Any = rng.choice([AVG_POOL, MAX_POOL])
            return pools[rank](3, 1, 1), width
        if kind == "depthwise":
            spread = 2 if width <= 4 and rng.random() < 0.4 else 1
            layers: Any = rng.choice([CONV, TRANSPOSED])
            return layers[rank](width, width * spread, 3, padding=1, groups=width, bias=bias), width * spread
        if kind == "grouped" and width % 2 == 0 and size % 2 == 0:
            convolutions: Any = rng.choice([CONV, TRANSPOSED])
            return convolutions[rank](width, size, 3, padding=1, groups=2, bias=bias), size
        if kind == "transposed":
            return TRANSPOSED[rank](width, size, 3, padding=1, bias=bias), size
        kernel, padding = rng.choice([(1, 0), (3, 1)])
        layer = partial(CONV[rank], padding_mode="replicate") if padding and rng.random() < 0.3 else CONV[rank]
        return layer(width, size, kernel, padding=padding, bias=bias), size

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        maps = [x, x[:, :2] * 2 if extra is None else extra]
        for kind, part, sources in self.program:
            maps.append(self._step(kind, part, [maps[source] for source in sources]))
        pooled = torch.cat([maps[leaf].flatten(2).mean(2) for leaf in self.leaves], 1)
        out = self.fc(pooled)
        if self.aside is not None and self.training:
            return out, {"aux": self.aux(self.norm(maps[self.aside].flatten(2).amax(2)))}
        return out

    def _step(self, kind: str, part: int | None, maps: list[Tensor]) -> Tensor:
        if part is not None:
            result: Tensor = self.parts[part](maps[0])
            return result
        x, half = maps[0], maps[0].shape[1] // 2
        if kind == "add":
            return x + maps[1]
        if kind == "mul":
            return x * maps[1]
        if kind == "gate":
            return x * maps[1].mean(list(range(2, x.ndim)), keepdim=True).sigmoid()
        if kind == "cat":
            return torch.cat(maps, 1)
        if kind.startswith("halves"):
            return x.chunk(2, 1)[int(kind[-1])]
        if kind.startswith("slices"):
            return x[:, :half] if kind[-1] == "0" else x[:, half:]
        return x.view(len(x), 2, half, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


KINDS = [
    *["conv", "norm", "norm", "activation"] * 3,
    *"add add cat cat mul gate halves slices shuffle again again pool depthwise grouped transposed".split(),
]


@st.composite
def dags(draw: st.DrawFn) -> Case:
    number = st.integers(0, 11)
    rank = draw(st.sampled_from([1, 1, 2]))
    steps = draw(st.lists(st.tuples(st.sampled_from(KINDS), number, number, number), min_size=3, max_size=24))
    bias = draw(st.sampled_from(BIASES))
    together = draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unread = rng.choice([0.0, 0.0, 0.5])
        network = Dag(steps, rank, rng, unread).double()
        randomize(network)
        for parameter in network.parameters():
            parameter.requires_grad_(rng.random() < 0.95)
        for module in network.modules():
            module.training = rng.random() < 0.5
            if isinstance(module, nn.ReLU | nn.LeakyReLU):
                module.inplace = False  # what another step reads must not be written to
        example = torch.randn(4, 4, *[5] * rank).double()
        keep = masks(network, example, rng, rng.choice([0.3, 0.5, 0.9]), together)
    return Case(network, keep, example, True, bias, unread > 0)


def masked_copy(network: nn.Module, keep: dict[str, Tensor], bias: str) -> Any:
    network = copy.deepcopy(network)
    with torch.no_grad():
        for name, kept in keep.items():
            module: Any = network.get_submodule(name)
            module.weight[~kept] = 0
            if bias == "zero":
                module.bias[~kept] = 0
    return network


class SameForAllChannels(nn.Module):
    """Dropout that networks of different widths can draw alike."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand([len(x), *[1] * (x.ndim - 1)], dtype=x.dtype) < 0.7) / 0.7 if self.training else x


def with_comparable_dropout(network: Any) -> Any:
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.Dropout):
                setattr(parent, name, SameForAllChannels())
    return network


def train_outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of a train-mode pass that leaves gradients, and writes to the running statistics."""
    network.train()
    torch.manual_seed(0)  # the same noise
    leaves = [leaf for leaf in pytree.tree_leaves(network(x)) if isinstance(leaf, Tensor)]
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for leaf in leaves:
        total = total + (leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).sum()
    if total.requires_grad:
        total.backward()
    return [leaf.detach() for leaf in leaves]


def check_training(masked: nn.Module, slimmed: nn.Module, case: Case, plan: SlimmingPlan) -> None:
    masked, slimmed = with_comparable_dropout(masked), with_comparable_dropout(slimmed)
    x = case.example
    try:
        expected = train_outputs(masked, x)
    except RuntimeError as error:  # two in-place activations in a row cannot be trained, slim or not
        assert "inplace" in str(error)
        return
    assert difference(expected, train_outputs(slimmed, x)) < 1e-7
    own = dict(slimmed.named_parameters())
    pruned = {f"{name}.{part}": ~kept for name, kept in case.keep.items() for part in ("weight", "bias")}
    carriers = {
        f"{name}.{part}"
        for name, module in masked.named_modules()
        if isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels
        for part in ("weight", "bias")
    }
    gradients = {name: p.grad for name, p in masked.named_parameters() if p.grad is not None}
    scale = max((float(gradient.abs().max()) for gradient in gradients.values()), default=1.0)
    for name, parameter in masked.named_parameters():
        gradient, found = parameter.grad, own[name].grad
        if gradient is None or found is None:
            assert (gradient is None) == (found is None) or gradient is None or not bool(gradient.any())
            continue
        if name in pruned:
            gradient[pruned[name]] = 0
            found[plan.cut(name, pruned[name])] = 0
        if name in carriers:  # see test_gradients_of_a_depthwise_bias_are_those_of_the_masked_network
            continue
        assert float((plan.cut(name, gradient) - found).abs().max()) < 1e-7 * max(scale, 1.0), name
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        batch = torch.randn(x.shape, generator=generator).double()
        for network in (masked, slimmed):
            torch.manual_seed(0)
            network(batch)
    if case.dead:
        return
    buffers = dict(slimmed.named_buffers())
    for name, buffer in masked.named_buffers():
        if buffer.is_floating_point():
            assert torch.allclose(plan.cut(name, buffer), buffers[name], rtol=1e-8, atol=1e-8), name
        else:
            assert torch.equal(buffer, buffers[name]), name


def check_slimming(case: Case) -> None:
    network, example = case.network, case.example
    full = copy.deepcopy(network)
    masked = masked_copy(network, case.keep, case.bias)
    modes = [module.training for module in network.modules()]
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    state = torch.get_rng_state()
    plan = slim(network, case.keep, example, case.bias)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in network.modules()] == modes
    assert {name: p.requires_grad for name, p in network.named_parameters() if name in flags} == flags
    assert sizes_match(network) and sharing(network) >= sharing(full)
    generator = torch.Generator().manual_seed(1)
    for batch, more in [(1, 0), (3, 3 * case.any_size)]:
        x = torch.randn(batch, 4, *(size + more for size in example.shape[2:]), generator=generator).double() * 2
        assert difference(outputs(masked, x), outputs(network, x)) < 1e-9
    check_training(masked, network, case, plan)
    added = sum(len(network.get_submodule(name).bias) for name in plan.biases)
    assert sum(p.numel() for p in network.parameters()) <= sum(p.numel() for p in full.parameters()) + added
    assert SlimmingPlan.from_json(plan.to_json()) == plan
    assert difference(outputs(network, example), outputs(copy.deepcopy(network), example)) == 0


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_masks_leave_the_function_of_the_masked_network(case: Case) -> None:
    check_slimming(case)


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(dags())
def test_any_graph_keeps_the_function_of_the_masked_network(case: Case) -> None:
    check_slimming(case)


@settings(max_examples=max(CASES // 4, 5), deadline=None, suppress_health_check=list(HealthCheck))
@given(cases() | dags(), st.integers(0, 2**31))
def test_a_second_slimming_goes_on_and_a_file_holds_both(tmp_path_factory: Any, case: Case, seed: int) -> None:
    network, example = case.network, case.example
    fresh = copy.deepcopy(network)
    slim(network, case.keep, example, case.bias)
    generator = torch.Generator().manual_seed(seed)
    second = {}
    for name in case.keep:
        size = network.get_submodule(name).num_features
        second[name] = torch.rand(size, generator=generator) < 0.7
        second[name][int(torch.randint(size, (), generator=generator))] = True
    masked = masked_copy(network, second, case.bias)
    slim(network, second, example, case.bias)
    assert difference(outputs(masked, example), outputs(network, example)) < 1e-9
    path = Path(tmp_path_factory.mktemp("slim")) / "model.safetensors"
    save_slimmed(network, path)
    loaded = load_slimmed(fresh, path)
    assert difference(outputs(network, example), outputs(loaded, example)) == 0
    program = torch.export.export(network.eval(), (example,))
    assert difference(outputs(network, example), outputs(program.module(), example)) < 1e-12


# ---- sizes, by hand


def mask(channels: int, *pruned: int) -> Tensor:
    kept = torch.ones(channels, dtype=torch.bool)
    kept[list(pruned)] = False
    return kept


def plain(padding: int = 1, bias: bool = False) -> Any:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=bias),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=padding, bias=bias),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    randomize(network)
    return network


def test_a_chain_keeps_just_the_channels_that_are_kept() -> None:
    network = plain()
    plan = slim(network, {"1": mask(8, 0, 3, 5), "4": mask(6, 1)}, torch.randn(2, 3, 8, 8))
    assert network[0].weight.shape == (5, 3, 3, 3) and network[3].weight.shape == (5, 5, 3, 3)
    assert network[1].num_features == 5 and network[4].num_features == 5 and network[8].in_features == 5
    assert plan.cuts["1.weight"] == {0: (1, 2, 4, 6, 7)} and not plan.selects and not plan.biases


def test_one_channel_carries_the_constants_into_a_padded_convolution() -> None:
    network = plain()
    with torch.no_grad():
        network[1].bias.abs_()
    slim(network, {"1": mask(8, 0, 3, 5)}, torch.randn(2, 3, 8, 8), bias="fold")
    assert network[1].num_features == 6 and int((network[1].weight == 0).sum()) == 1 and network[3].bias is None


def test_without_padding_the_constants_become_a_bias() -> None:
    network = plain(padding=0)
    plan = slim(network, {"1": mask(8, 0, 3, 5)}, torch.randn(2, 3, 8, 8), bias="fold")
    assert network[1].num_features == 5 and network[3].bias is not None and plan.biases == ("3",)


def test_pre_activation_batch_norms_select_and_the_stream_stays() -> None:
    network: Any = models.resnet20()
    before = network.stem.weight.shape
    plan = slim(network, {"blocks.0.norms.0": mask(16, 2, 5)}, torch.randn(2, 3, 16, 16))
    assert network.stem.weight.shape == before and network.blocks[0].convs[0].in_channels == 14
    assert plan.selects == {"blocks.0.norms.0": tuple(i for i in range(16) if i not in (2, 5))}
    assert SELECT not in "".join(network.state_dict())


def test_a_feature_that_nobody_selects_dies_in_its_own_convolution() -> None:
    network: Any = models.densenet40()
    keep = {}
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            keep[name] = mask(module.num_features, 0)
    slim(network, keep, torch.randn(2, 3, 16, 16))
    assert network.stem.out_channels == 23


def test_coupled_channels_go_when_all_of_them_are_off() -> None:
    from torchvision.models import resnet18

    network, x = resnet18(), torch.randn(2, 3, 64, 64)
    keep = {name: mask(64, 7) for name in ("bn1", "layer1.0.bn2", "layer1.1.bn2")}
    slim(network, {"bn1": keep["bn1"]}, x)
    assert network.bn1.num_features == 64 and float(network.bn1.weight[7]) == 0
    slim(network, keep, x)
    assert network.bn1.num_features == 63 and network.layer2[0].conv1.in_channels == 63


# ---- what stays, and what is refused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_layout_and_hooks_stay(dtype: torch.dtype) -> None:
    network = plain().to(dtype).to(memory_format=torch.channels_last)
    calls: list[str] = []
    network[1].register_forward_hook(lambda module, args, output: calls.append("hook"))
    classes = [type(module) for module in network.modules()]
    slim(network, {"1": mask(8, 0)}, torch.randn(2, 3, 8, 8, dtype=dtype))
    assert {p.dtype for p in network.parameters()} == {dtype}
    assert [type(module) for module in network.modules()] == classes
    assert network[3].weight.is_contiguous(memory_format=torch.channels_last)
    calls.clear()
    network.float()(torch.randn(2, 3, 8, 8))
    assert calls == ["hook"]


class Literal(nn.Module):
    """Sizes written as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = plain()[:6], nn.Linear(6 * 64, 2)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.body(x).view(-1, 2, 3, 8, 8).flatten(1))


def test_sizes_written_into_forward_keep_their_channels() -> None:
    network, x = Literal(), torch.randn(2, 3, 8, 8)
    keep = {"body.1": mask(8, 0, 1), "body.4": mask(6, 0, 3)}
    masked = masked_copy(network, keep, "zero")
    plan = slim(network, keep, x)
    assert network.body[1].num_features == 6 and network.body[4].num_features == 6
    assert "written into forward" in "".join(plan.pinned.values())
    assert difference(outputs(masked, x), outputs(network, x)) < 1e-6


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x: Tensor) -> Any:
        hidden = self.body[:6](x)
        return self.body[6:](hidden) * hidden.shape[1]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"9": mask(8)}, r"'9', which is no batch norm of Sequential; they are \['1', '4'\]"),
        ({"0": mask(8)}, "'0', which is no batch norm"),
        ({"1": mask(7)}, r"keep\['1'\] must be a bool tensor of shape \(8,\), got torch.bool of shape \(7,\)"),
        ({"1": torch.ones(8)}, "got torch.float32"),
        ({"1": [True] * 8}, "got list"),
        ({"4": mask(6, *range(6))}, r"keep\['4'\] keeps none of 6 channels"),
    ],
)
def test_bad_masks_are_named_and_change_nothing(keep: Any, message: str) -> None:
    network = plain()
    before = snapshot(network)
    with pytest.raises(ValueError, match=message):
        slim(network, keep, torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="unknown bias 'mean'"):
        slim(network, {}, torch.randn(2, 3, 8, 8), bias="mean")
    assert untouched(network, before)


@pytest.mark.parametrize("bias", BIASES)
def test_a_failed_verification_changes_nothing(bias: str) -> None:
    network = Counts()
    before, text = snapshot(network), repr(network)
    with pytest.raises(VerificationError, match="Counts"):
        slim(network, {"body.4": mask(6, 0)}, torch.randn(2, 3, 8, 8), bias)
    assert untouched(network, before) and repr(network) == text
    assert not network.body[1]._forward_pre_hooks


def test_a_batch_norm_without_a_scale_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="'1' has no scale"):
        slim(network, {"1": mask(4, 0)}, torch.randn(2, 3, 8, 8))


def _call(network: nn.Module) -> Callable[..., Any]:
    return network.forward


def test_forward_is_the_same_method() -> None:
    network = plain()
    before = _call(network)
    slim(network, {"1": mask(8, 0)}, torch.randn(2, 3, 8, 8))
    assert _call(network) == before


class ChecksItsSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x: Tensor) -> Any:
        hidden = self.body[:3](x)
        if hidden.shape[1] != 8:
            raise ValueError("expected 8 channels")
        return self.body[3:](hidden)


class Branches(ChecksItsSize):
    def forward(self, x: Tensor) -> Any:
        return self.body(x if x.sum() > 0 else -x)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("kind", "error"), [(ChecksItsSize, VerificationError), (Branches, CaptureError)])
def test_a_network_that_cannot_be_slimmed_is_named_and_untouched(
    kind: type[ChecksItsSize], error: type[Exception], bias: str
) -> None:
    network = kind().train()
    network.body[1].eval()
    before, text, modes = snapshot(network), repr(network), [m.training for m in network.modules()]
    with pytest.raises(error, match=kind.__name__):
        slim(network, {"body.1": mask(8, 0, 5)}, torch.randn(2, 3, 8, 8), bias)
    assert untouched(network, before) and repr(network) == text
    assert [module.training for module in network.modules()] == modes


def test_masks_that_keep_everything_change_nothing() -> None:
    network = plain()
    before = snapshot(network)
    assert not slim(network, {"1": mask(8), "4": mask(6)}, torch.randn(2, 3, 8, 8))
    assert not slim(network, {}, torch.randn(2, 3, 8, 8))
    assert untouched(network, before)


def exact_or_refused(network: Any, keep: dict[str, Tensor], x: Tensor, bias: str) -> None:
    """Eval and train mode of a network in float64, on other inputs of three instances."""
    randomize(network)
    masked, before = masked_copy(network, keep, bias), snapshot(network)
    try:
        slim(network, keep, x, bias)
    except (CaptureError, VerificationError) as error:
        assert type(network).__name__ in str(error)
        assert untouched(network, before)
        return
    y = torch.randn(3, *x.shape[1:]).double()
    assert difference(outputs(masked, y), outputs(network, y)) < 1e-9
    masked, network = with_comparable_dropout(masked), with_comparable_dropout(network)
    assert difference(train_outputs(masked, y), train_outputs(network, y)) < 1e-9


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 3, padding=1)


class CallsForward(Stem):
    """Past the hooks of the batch norm."""

    def forward(self, x: Tensor) -> Any:
        h = self.stem(x)
        return self.left(self.norm.forward(h).relu()) + self.right(h)


class CallsTheFunction(Stem):
    def forward(self, x: Tensor) -> Any:
        h, norm = self.stem(x), self.norm
        h = F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training) + 0 * h
        return self.left(h.relu()) + self.right(h)


class WritesThroughAView(Stem):
    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x))
        view = h.view(h.shape)
        h.sigmoid_()
        return self.left(view)


class WritesToAChannel(Stem):
    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x)) * 1
        h[:, :1] = 1.0
        return self.left(h)


class MixesChannels(Stem):
    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x))
        return self.left(h) * h.norm(dim=1, keepdim=True) + h.mean() + h.amax(1, keepdim=True)


class AddsAConstant(Stem):
    def forward(self, x: Tensor) -> Any:
        return self.right(self.norm(self.stem(x)).relu() + torch.ones(1, 8, 1, 1, dtype=x.dtype))


class RepeatsAChannel(Stem):
    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x)).relu()
        return self.right(torch.cat([h[:, :1].expand(-1, 4, -1, -1), h[:, 4:]], 1))


class NormsTwiceInARow(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        return self.right(self.second(self.norm(self.stem(x)).sigmoid()))


class NormsWithoutStatistics(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Any:
        return self.right(self.norm(self.stem(x)).sigmoid())


class NormalizesAnIntermediateResult(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.group, self.instance = nn.GroupNorm(4, 8), nn.InstanceNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x))
        return self.left(self.group(h)) + self.right(self.instance(h))


class ComputesItsWeight(Stem):
    def forward(self, x: Tensor) -> Any:
        weight = self.right.weight - self.right.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(self.norm(self.stem(x)).relu(), weight)


class SharesItsScale(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.middle, self.other = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.other.weight = self.norm.weight

    def forward(self, x: Tensor) -> Any:
        return self.right(self.other(self.middle(self.norm(self.stem(x)).relu())).relu())


class SharesItsShiftAndStatistics(SharesItsScale):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(8)
        self.other.bias = self.norm.bias
        self.other.running_mean, self.other.running_var = self.norm.running_mean, self.norm.running_var


KEPT = mask(8, 0, 1, 4)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    "kind",
    [
        CallsForward,
        CallsTheFunction,
        WritesThroughAView,
        WritesToAChannel,
        MixesChannels,
        AddsAConstant,
        RepeatsAChannel,
        NormsTwiceInARow,
        NormsWithoutStatistics,
        NormalizesAnIntermediateResult,
        ComputesItsWeight,
        SharesItsScale,
        SharesItsShiftAndStatistics,
    ],
)
def test_an_unusual_forward_stays_exact_or_is_refused(kind: type[Stem], bias: str) -> None:
    exact_or_refused(kind().double(), {"norm": KEPT}, torch.randn(3, 3, 6, 6).double(), bias)


class AuxiliaryNorm(Stem):
    """Reads the channels of `norm` in a head that only train mode has."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, **kwargs)
        self.aux = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.stem(x)).relu()
        return (self.right(h), self.aux(h.mean((2, 3)))) if self.training else self.right(h)


class AuxiliaryBranch(AuxiliaryNorm):
    def forward(self, x: Tensor) -> Any:
        if self.training and float(x.detach().sum()) == 0:
            return None
        return super().forward(x)


class DropsOut(Stem):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(8, **kwargs), nn.Dropout()
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.drop(self.norm(self.stem(x)).sigmoid()).mean((2, 3)))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (AuxiliaryNorm, 3),
        (AuxiliaryNorm, 1),  # a batch norm cannot train on a single value
        (AuxiliaryBranch, 3),
        (lambda: AuxiliaryNorm(momentum=None), 3),
        (DropsOut, 3),
        (DropsOut, 1),
        (lambda: DropsOut(momentum=None), 3),
    ],
    ids=["aux", "aux-single", "aux-branch", "aux-cumulative", "dropout", "dropout-single", "dropout-cumulative"],
)
def test_train_mode_stays_exact_or_is_refused_where_only_eval_mode_can_be_captured(
    build: Callable[[], nn.Module], batch: int, bias: str
) -> None:
    exact_or_refused(build().double(), {"norm": KEPT}, torch.randn(batch, 3, 6, 6).double(), bias)


@pytest.mark.parametrize("bias", BIASES)
def test_scales_that_are_shared_are_put_back(bias: str) -> None:
    class Net(SharesItsScale):
        def forward(self, x: Tensor) -> Any:
            h = self.other(self.middle(self.norm(self.stem(x)).relu())).relu()
            return self.right(h) * h.shape[1]

    network = Net()
    randomize(network)
    before = snapshot(network)
    with pytest.raises(VerificationError, match="Net"):
        slim(network, {"norm": mask(8, 0), "other": mask(8, 0, 1)}, torch.randn(2, 3, 6, 6), bias)
    assert untouched(network, before)


def test_buffers_of_a_parametrization_are_left_alone() -> None:
    """Reading the weight of a spectrally normalised layer in train mode writes to its buffers."""
    network: Any = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 2, 1))
    ).train()
    before = {name: tensor.clone() for name, tensor in network[3].state_dict().items()}
    slim(network, {"1": mask(8, 0)}, torch.randn(2, 3, 6, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network[3].state_dict().items())


def depthwise(spread: int = 1, bias: bool = True) -> Any:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4 * spread, 3, padding=1, groups=4, bias=bias),
        nn.BatchNorm2d(4 * spread) if spread > 1 else nn.Identity(),
        nn.Conv2d(4 * spread, 2, 3, padding=1),
    ).double()
    randomize(network)
    return network


def test_gradients_of_a_depthwise_bias_are_those_of_the_masked_network() -> None:
    """The bias of a pruned channel is a constant; where it carries another one's, its gradient is no longer its own."""
    network, x = depthwise(), torch.randn(3, 3, 6, 6).double()
    keep = {"1": mask(4, 0, 1)}
    masked = masked_copy(network, keep, "zero")
    plan = slim(network, keep, x)
    for net in (masked, network):
        (net(x) * torch.linspace(-1, 1, 36).double().view(6, 6)).sum().backward()
    assert torch.allclose(plan.cut("3.bias", masked[3].bias.grad), network[3].bias.grad)


def test_a_depthwise_multiplier_of_one_channel_can_be_slimmed_again_and_loaded() -> None:
    network, x = depthwise(spread=2), torch.randn(2, 3, 6, 6).double()
    fresh = copy.deepcopy(network)
    slim(network, {"1": mask(4, 1, 2, 3), "4": mask(8, 2, 3, 4, 5, 6, 7)}, x)
    assert (network[3].groups, network[3].out_channels) == (1, 2)
    slim(network, {"4": mask(2, 1)}, x)
    plan_of(network).check(fresh)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_that_casts_its_input_to_half_precision_can_be_slimmed(dtype: torch.dtype, bias: str) -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = plain(padding=0)

        def forward(self, x: Tensor) -> Any:
            return self.body(x.to(dtype))

    network = Casts()
    slim(network.to(dtype), {"body.1": mask(8, 0, 3, 4, 5)}, torch.randn(2, 3, 6, 6), bias)
    assert network.body[1].num_features == 4


def test_a_network_slimmed_in_inference_mode_can_be_trained() -> None:
    network = plain()
    with torch.inference_mode():
        slim(network, {"1": mask(8, 0)}, torch.randn(2, 3, 8, 8))
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert network[0].weight.grad is not None


def test_slopes_are_counted() -> None:
    network: Any = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 2, 1))
    slim(network, {"1": mask(8, 0, 1)}, torch.randn(2, 3, 6, 6))
    assert network[2].weight.shape == (6,) and network[2].num_parameters == 6


def test_hooks_of_a_batch_norm_that_selects_see_the_whole_stream_first() -> None:
    class Net(Stem):
        def forward(self, x: Tensor) -> Any:
            h = self.stem(x)
            return self.left(self.norm(h).relu()) + self.right(h)

    network, x = Net(), torch.randn(2, 3, 6, 6)
    seen: dict[str, int] = {}

    def count(module: nn.Module, inputs: Any, outputs: Any) -> None:
        seen["backward"] = outputs[0].shape[1]

    network.norm.register_forward_pre_hook(lambda module, args: seen.update(pre=args[0].shape[1]))
    network.norm.register_forward_hook(lambda module, args, output: seen.update(post=output.shape[1]))
    network.norm.register_full_backward_hook(count)
    slim(network, {"norm": KEPT}, x)
    seen.clear()
    network(x).sum().backward()
    assert seen == {"pre": 8, "post": 5, "backward": 5}


class TwoInputs(nn.Module):
    """Tuple of a dict and a list out; keyword inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.depth = plain()[:3], plain()[:3]
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, image: Tensor, *, depth: Tensor, scale: float = 1.0) -> Any:
        h = self.image(image) + scale * self.depth(depth)
        return {"out": self.last(h)}, [self.last(h.relu()), scale]


@pytest.mark.parametrize("bias", BIASES)
def test_several_inputs_by_name_and_nested_outputs(bias: str) -> None:
    network = TwoInputs().double()
    keep = {"image.1": KEPT, "depth.1": KEPT}
    masked = masked_copy(network, keep, bias)
    inputs = {"image": torch.randn(2, 3, 6, 6).double(), "depth": torch.randn(2, 3, 6, 6).double(), "scale": 2.0}
    plan = slim(network, keep, inputs, bias)
    assert plan.removed == ({"image.0": 3, "depth.0": 3} if bias == "zero" else {"image.0": 2, "depth.0": 2})
    other = {"image": torch.randn(4, 3, 9, 7).double(), "depth": torch.randn(4, 3, 9, 7).double(), "scale": 2.0}
    assert difference(outputs(masked, **other), outputs(network, **other)) < 1e-9
